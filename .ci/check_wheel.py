"""Compare a built wheel with the tree: every source file of the package is in it, and nothing else is.

Usage: python .ci/check_wheel.py WHEEL
"""

import sys
from pathlib import Path
from zipfile import ZipFile

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (".py", ".cu", ".cuh", ".typed")


def main(wheel: str) -> None:
    with ZipFile(wheel) as archive:
        names = archive.namelist()
        (entry_points,) = (archive.read(name).decode() for name in names if name.endswith("/entry_points.txt"))
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    packed = {name for name in names if ".dist-info/" not in name}
    files = (path for path in (ROOT / "rcnn").rglob("*") if path.suffix in SOURCES)
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    problems = [f"missing: {name}" for name in sorted(expected - packed)]
    problems += [f"not wanted: {name}" for name in sorted(packed - expected)]
    if "rcnn = rcnn.cli:main" not in entry_points:
        problems.append("no console script `rcnn`")
    if not any(name.endswith("LICENSE") for name in names):
        problems.append("no LICENSE")
    if "Requires-Python: >=3.10" not in metadata:
        problems.append("no Requires-Python")
    if problems:
        sys.exit(f"{Path(wheel).name}:\n" + "\n".join(problems))
    print(f"{Path(wheel).name}: {len(packed)} files, all of the package and nothing else")


if __name__ == "__main__":
    main(sys.argv[1])
