"""What the pages under docs/ promise: every public name, figures that can be drawn, options that exist."""

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import rcnn
from rcnn import kernels

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

#: Modules that are run and not called: `--help` is their reference. `config` has a page of tables.
COMMANDS = {"rcnn.cli", "rcnn.console", "rcnn.env", "rcnn.evaluate", "rcnn.predict", "rcnn.summary", "rcnn.train"}


#: Names of the front door that are documented in their own rooms.
INNER_DOORS = {"rcnn.ModelConfig", "rcnn.Targets", "rcnn.TrainConfig", "rcnn.kernels"}


def public_names() -> list[str]:
    """Full names of the public functions and classes of every public module that is no command."""
    found = []
    for info in pkgutil.walk_packages(rcnn.__path__, "rcnn."):
        if any(part.startswith("_") for part in info.name.split(".")) or info.name in COMMANDS:
            continue
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            own = inspect.isfunction(value) or inspect.isclass(value)
            if own and name != "main" and not name.startswith("_") and value.__module__ == info.name:
                found.append(f"{info.name}.{name}")
    return sorted(found)


def documented() -> set[str]:
    """What the directives of the reference pages name: whole modules, or single members."""
    found: set[str] = set()
    for page in ("api.md", "classic.md"):
        text = (DOCS / page).read_text(encoding="utf-8")
        for kind, target, options in re.findall(r"^\.\. auto(\w+):: (\S+)\n((?:   .*\n)*)", text, re.MULTILINE):
            members = re.search(r":members:(.*)", options)
            if kind == "module" and members and not re.search(r":no-members:", options):
                names = [name.strip() for name in members[1].split(",") if name.strip()]
                found.update(f"{target}.{name}" for name in names or vars(importlib.import_module(target)))
            else:
                found.add(target)
    return found


def test_every_public_name_is_in_the_reference() -> None:
    # Some names are documented where they are imported from: rcnn.load, rcnn.kernels.nms. Below the op of a room of
    # the kernels lie its parts, which are public to the other rooms alone.
    reference = documented()
    doors = {f"rcnn.{name}": value for name, value in vars(rcnn).items() if name in rcnn.__all__}
    doors |= {f"rcnn.kernels.{name}": getattr(kernels, name) for name in kernels.__all__}
    assert [name for name in doors if name not in reference and name not in INNER_DOORS] == []
    moved = {f"{value.__module__}.{value.__name__}" for value in doors.values() if not inspect.ismodule(value)}
    names = [name for name in public_names() if not name.startswith("rcnn.kernels.")]
    assert len(names) > 100
    assert [name for name in names if name not in reference | moved] == []


def test_every_public_name_has_a_docstring() -> None:
    bare = []
    for name in public_names():
        module, _, last = name.rpartition(".")
        if not inspect.getdoc(getattr(importlib.import_module(module), last)):
            bare.append(name)
    assert bare == []


def test_figures_are_drawn_by_their_script(tmp_path: Path) -> None:
    command = [sys.executable, str(DOCS / "figures" / "draw.py"), str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT)})
    drawn = {file.name for file in tmp_path.iterdir()}
    assert drawn == {file.name for file in (DOCS / "figures").glob("*.svg")}
    used = set(re.findall(r"\(figures/(\w+\.svg)\)", (DOCS / "how-the-kernels-work.md").read_text(encoding="utf-8")))
    assert used == drawn


def test_options_in_the_docs_exist() -> None:
    command = [sys.executable, "-m", "rcnn.train", "--help"]
    known = set(re.findall(r"--[a-z_.]+", subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout))
    assert len(known) > 60
    pages = [page for page in DOCS.rglob("*.md") if "_build" not in page.parts and "notebooks" not in page.parts]
    wrong = []
    for page in [*pages, ROOT / "README.md"]:
        for line in re.findall(r"-m rcnn\.train(?:[^\n`]|\\\n)*", page.read_text(encoding="utf-8")):
            wrong += [f"{page.name}: {option}" for option in re.findall(r"--[a-z_.]+", line) if option not in known]
    assert wrong == []
