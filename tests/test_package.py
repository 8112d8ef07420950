"""The package as a user meets it: what importing costs, what the metadata promises, what the README's commands are."""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import rcnn

ROOT = Path(__file__).resolve().parents[1]

# Seconds of work that `import rcnn` may add to `import torch`.
IMPORT_BUDGET = 1.5
# Packages that only some doors need: absent after `import rcnn`, so that it works without them and stays quick.
LAZY = ("cupy", "pycocotools", "tensorboardX", "matplotlib", "torchvision", "jsonargparse")


def run_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def requirements(text: str) -> list[str]:
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [line for line in lines if line]


def test_import_is_quick_and_brings_no_optional_package() -> None:
    # Processor time, not the clock: what else runs on the machine does not count.
    program = f"""
import json, sys, time
import torch
before, start = set(sys.modules), time.process_time()
import rcnn
seconds = time.process_time() - start
loaded = [name for name in {LAZY!r} if name in sys.modules and name not in before]
print(json.dumps([seconds, loaded, torch.cuda.is_initialized()]))
"""
    result = run_python("-c", program)
    assert result.returncode == 0, result.stderr
    seconds, loaded, cuda = json.loads(result.stdout)
    assert loaded == []
    assert cuda is False, "importing must not touch CUDA: DataLoader workers fork"
    assert seconds < IMPORT_BUDGET


def test_import_works_without_the_optional_packages() -> None:
    # A None in sys.modules makes the import of that name fail, as on a machine without it.
    program = f"import sys\nfor name in {LAZY!r}: sys.modules[name] = None\nimport rcnn\nprint(rcnn.__version__)"
    result = run_python("-c", program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == rcnn.__version__


@pytest.mark.parametrize("name", rcnn.__all__)
def test_public_names_exist(name: str) -> None:
    assert getattr(rcnn, name) is not None


@pytest.mark.parametrize(
    "command",
    ["rcnn.cli", "rcnn.train", "rcnn.evaluate", "rcnn.predict", "rcnn.summary", "rcnn.env", "rcnn.data.flowers"],
)
def test_commands_tell_their_options(command: str) -> None:
    result = run_python("-m", command, "--help")
    assert result.returncode == 0, result.stderr
    assert "usage" in result.stdout.lower()


def test_version_has_one_place() -> None:
    assert setup_cfg()["metadata"]["version"] == "attr: rcnn.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+|rc\d+)?", rcnn.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(rcnn.__version__)}\b", changelog, re.MULTILINE), "CHANGELOG.md lacks the version"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == rcnn.__version__ and citation["license"] == setup_cfg()["metadata"]["license"]


def test_requirements_file_is_the_package_with_cuda12() -> None:
    config = setup_cfg()
    expected = config["options"]["install_requires"] + config["options.extras_require"]["cuda12"]
    assert requirements((ROOT / "requirements.txt").read_text(encoding="utf-8")) == requirements(expected)


def test_extras_and_command_are_there() -> None:
    config = setup_cfg()
    assert set(config["options.extras_require"]) == {"cuda12", "cuda13", "plots", "export", "test", "docs"}
    assert config["options.entry_points"]["console_scripts"].strip() == "rcnn = rcnn.cli:main"
    assert config["options"]["python_requires"] == ">=3.10"


def readme_command(mark: str) -> str:
    """The fenced block under ``<!-- command: MARK -->``, as ``.ci/run`` reads it."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    found = re.findall(rf"^<!-- command: {mark} -->\n```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert len(found) == 1, f"README.md must have one block marked {mark!r}, got {len(found)}"
    return found[0].strip()


def test_readme_has_the_two_commands() -> None:
    train, test = readme_command("train"), readme_command("test")
    for block, end in ((train, "python -m rcnn.train"), (test, "python -m pytest -n 2 --dist loadfile")):
        assert "\n" not in block, "one line to copy"
        assert block.endswith(end)
    assert "'.[test,cuda12]'" in test


def test_links_of_the_readme_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text)
    local = [target for target in targets if "://" not in target]
    assert local
    assert [target for target in local if not (ROOT / target).exists()] == []


def test_the_workflow_runs_the_script_and_every_supported_python() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))["jobs"]
    assert {"run": ".ci/run"} in jobs["run"]["steps"]
    assert {"run": ".ci/try_wheel python"} in jobs["wheel"]["steps"]
    classifiers = setup_cfg()["metadata"]["classifiers"]
    assert jobs["wheel"]["strategy"]["matrix"]["python"] == re.findall(r"Python :: (3\.\d+)", classifiers)


@pytest.mark.parametrize("file", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda f: f.stem)
def test_issue_templates_are_forms(file: Path) -> None:
    form = yaml.safe_load(file.read_text(encoding="utf-8"))
    if file.stem != "config":
        assert {"name", "description", "body"} <= set(form)
        assert all(item["attributes"]["label"] for item in form["body"])
