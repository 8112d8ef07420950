"""The house rules, read from the source with ``ast``: who may import whom, who may import what, how long a file may be.

The tables below are the law that ``docs/design.md`` explains. A room is a module of ``rcnn/`` or a folder of it; a new
room needs a line in ``ROOMS`` before its first commit passes.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "rcnn"
MAX_LINES = 500

# Each room and the rooms that it may import. Imports inside a room are free; nothing reaches up.
ROOMS: dict[str, set[str]] = {}
ROOMS["boxes"] = set()
ROOMS["structures"] = set()
ROOMS["config"] = set()
ROOMS["files"] = set()
ROOMS["images"] = {"files"}
ROOMS["kernels"] = {"boxes", "structures", "files"}
ROOMS["models"] = {"kernels", "boxes", "structures", "config", "precision", "images", "files"}
ROOMS["data"] = {"boxes", "structures", "config", "images", "files"}
ROOMS["metrics"] = {"data"} | ROOMS["data"]
ROOMS["viz"] = {"boxes", "structures", "images", "files"}
ROOMS["checkpoint"] = {"config", "files"}
ROOMS["tracking"] = {"config", "files"}
ROOMS["distributed"] = set()
ROOMS["machine"] = {"kernels"}
# Builds a detector, and loads one from a checkpoint: the public ``rcnn.build`` and ``rcnn.load``.
ROOMS["detector"] = {"models", "checkpoint"} | ROOMS["models"]
ROOMS["optim"] = {"config"}
ROOMS["stopping"] = set()
ROOMS["run_folder"] = {"checkpoint"} | ROOMS["checkpoint"]
ROOMS["precision"] = {"config"}
ROOMS["graph"] = {"data", "kernels"} | ROOMS["data"]
ROOMS["engine"] = set(ROOMS)
ROOMS["replay"] = {"data", "detector"} | ROOMS["detector"]
ROOMS["training"] = set(ROOMS)
# What `python -m rcnn.X` runs. A command may use everything below it, and no other command but through `cli`.
COMMANDS = {"train", "evaluate", "predict", "env", "summary"}
LIBRARY = set(ROOMS)
for _command in COMMANDS:
    ROOMS[_command] = LIBRARY | {"console"}
ROOMS["env"] |= {"__init__"}  # the version
ROOMS["console"] = set(LIBRARY)  # what the commands share: the parser, the way an error is told
ROOMS["cli"] = LIBRARY | COMMANDS | {"console", "__init__"}
ROOMS["classic"] = set(LIBRARY)
# ``rcnn/__init__.py`` gives the public names and so must not be imported from within.
ROOMS["__init__"] = {"kernels", "config", "detector", "models", "structures"}

# Rooms that use torch and the standard library, and nothing else.
PLAIN = {"boxes", "structures", "config"}

# Third-party packages with few doors: the files that may import them.
DOORS: dict[str, set[str]] = {
    "cupy": {"kernels/_launch.py"},
    "cupy_backends": {"kernels/_launch.py"},
    "pycocotools": {"metrics/coco.py", "data/coco.py"},
    "tensorboardX": {"tracking.py"},
    "torchvision": set(),
}


def source_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """The path inside the package, with forward slashes: ``kernels/nms.py``."""
    return path.relative_to(PACKAGE).as_posix()


def room_of(name: str) -> str:
    """``kernels/nms.py`` is in the room ``kernels``, ``boxes.py`` is the room ``boxes``."""
    return name.removesuffix(".py").split("/")[0]


def imports(source: str, name: str) -> list[tuple[int, str]]:
    """Each import of a file as (line, absolute dotted name); ``from a import b`` counts as ``a.b``.

    Imports inside functions and under ``TYPE_CHECKING`` count too: a dependency is one wherever it stands.
    """
    package = ["rcnn", *name.split("/")[:-1]]
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            stem = ".".join([*base, node.module] if node.module else base)
            found += [(node.lineno, f"{stem}.{alias.name}") for alias in node.names]
    return found


def violations(source: str, name: str) -> list[str]:
    """One line for each import of a file that the tables forbid."""
    room = room_of(name)
    if room not in ROOMS:
        return [f"rcnn/{name}: room {room!r} has no line in ROOMS"]
    wrong = []
    for line, target in imports(source, name):
        top, _, rest = target.partition(".")
        where = f"rcnn/{name}:{line}"
        if top == "rcnn":
            other = "__init__" if rest == "__version__" else rest.split(".")[0]
            if other not in ROOMS:
                wrong.append(f"{where}: imports {target} by way of the public door rcnn/__init__.py")
            elif other != room and other not in ROOMS[room]:
                wrong.append(f"{where}: {room} may not import {other}")
        elif name not in DOORS.get(top, {name}):
            wrong.append(f"{where}: {top} may be imported only by {sorted(DOORS[top]) or 'nobody'}")
        elif room in PLAIN and top != "torch" and top not in sys.stdlib_module_names:
            wrong.append(f"{where}: {room} may import torch and the standard library only, not {top}")
        elif top in ("bench", "tests"):
            wrong.append(f"{where}: {top} is not part of the package")
    return wrong


@pytest.mark.parametrize("path", source_files(), ids=name_of)
def test_imports_go_down_only(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), name_of(path)) == []


@pytest.mark.parametrize(
    ("name", "source", "wrong"),
    [
        ("kernels/nms.py", "import math\nfrom rcnn import boxes\nfrom rcnn.kernels.anchors import anchors\n", False),
        ("kernels/nms.py", "from rcnn.config import RPNConfig\n", True),
        ("kernels/nms.py", "from .. import config\n", True),
        ("kernels/nms.py", "from ..boxes import iou\n", False),
        ("kernels/nms.py", "def f():\n    import cupy\n", True),
        ("kernels/_launch.py", "def f():\n    import cupy\n", False),
        ("models/rpn.py", "from torchvision.ops import nms\n", True),
        ("models/rpn.py", "from rcnn.data import open_dataset\n", True),
        ("data/loader.py", "from rcnn import FasterRCNN\n", True),
        ("data/loader.py", "import rcnn\n", True),
        ("data/loader.py", "import rcnn.engine\n", True),
        ("data/coco.py", "from pycocotools.coco import COCO\n", False),
        ("data/voc.py", "import pycocotools.mask as mask\n", True),
        ("engine.py", "from tensorboardX import SummaryWriter\n", True),
        ("boxes.py", "import numpy as np\n", True),
        ("images.py", "import numpy as np\nfrom PIL import Image\n", False),
        ("metrics/voc.py", "from rcnn.data.dataset import DetectionDataset\n", False),
        ("train.py", "from rcnn.evaluate import main\n", True),
        ("cli.py", "from rcnn.evaluate import main\n", False),
        ("train.py", "from bench import models\n", True),
        ("attic.py", "", True),
    ],
)
def test_the_checker_sees(name: str, source: str, wrong: bool) -> None:
    assert bool(violations(source, name)) is wrong


def calls(source: str, name: str) -> list[int]:
    """Lines that call the builtin ``name``."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
    ]


def test_library_rooms_do_not_print_or_parse_arguments() -> None:
    """Output belongs to the commands and to ``tracking``; arguments to the commands."""
    wrong = []
    for path in source_files():
        name, source = name_of(path), path.read_text(encoding="utf-8")
        room = room_of(name)
        # A data generator is run as `python -m rcnn.data.flowers`, so it has a few lines of a command at its end.
        if room in COMMANDS | {"cli", "console", "classic", "tracking"} or name == "data/flowers.py":
            continue
        wrong += [f"rcnn/{name}:{line}: print" for line in calls(source, "print")]
        for line, target in imports(source, name):
            if target.split(".")[0] in ("argparse", "jsonargparse"):
                wrong.append(f"rcnn/{name}:{line}: {target}")
    assert wrong == []


def test_kernels_know_no_module() -> None:
    """The ops are functions: state, parameters and configuration live above them."""
    wrong = [
        f"rcnn/{name_of(path)}:{line}: {target}"
        for path in sorted((PACKAGE / "kernels").glob("*.py"))
        for line, target in imports(path.read_text(encoding="utf-8"), name_of(path))
        if target == "torch.nn" or (target.startswith("torch.nn.") and not target.startswith("torch.nn.functional"))
    ]
    assert wrong == []


def repository_files() -> list[Path]:
    """Source files of the clone: those that git knows, or all of them outside a clone."""
    patterns = ("*.py", "*.cu", "*.cuh", ".ci/run")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns]
    try:
        listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        listing = "\n".join(
            path.relative_to(ROOT).as_posix() for room in ("rcnn", "tests") for path in (ROOT / room).rglob("*.py")
        )
    return [ROOT / line for line in listing.splitlines() if (ROOT / line).is_file()]


def test_no_file_is_too_long() -> None:
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in repository_files()}
    assert len(lengths) > 10
    long = {path.relative_to(ROOT).as_posix(): n for path, n in lengths.items() if n > MAX_LINES}
    assert long == {}, f"a file may have {MAX_LINES} lines"
