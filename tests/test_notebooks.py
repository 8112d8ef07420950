"""Each notebook runs from its first cell to its last, at a small setting, in an empty folder."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"

# What the cell of settings reads from the environment.
SMALL = {
    "voc_flowers": {"SIZE": "64", "HIDDEN": "64", "EPOCHS": "1", "STEPS": "2", "VAL_STEPS": "1"},
    "your_own_data": {"MODEL": "tiny", "COUNT": "14", "EPOCHS": "1"},
    "kernels": {},
}
# A word of the output of each, which shows that it came to the end.
LAST = {"voc_flowers": "proposals", "your_own_data": "AP50", "kernels": "training step"}


@pytest.mark.parametrize("name", SMALL)
def test_notebook(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for variable, value in SMALL[name].items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("JUPYTER_RUNTIME_DIR", str(tmp_path / "jupyter"))
    notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    where = NOTEBOOKS if name == "kernels" else tmp_path  # that one looks for the clone round it
    resources = {"metadata": {"path": str(where)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    # Tables of rich come as data that is shown, the rest as text that is printed.
    printed = "".join(output.get("text", "") + output.get("data", {}).get("text/plain", "") for output in outputs)
    assert LAST[name] in printed


def test_notebooks_are_committed_with_their_outputs() -> None:
    nbformat = pytest.importorskip("nbformat")
    assert {file.stem for file in NOTEBOOKS.glob("*.ipynb")} == set(SMALL)
    for name in SMALL:
        notebook = nbformat.read(NOTEBOOKS / f"{name}.ipynb", as_version=4)
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert outputs, f"{name} was committed without being run"
        assert not [output for output in outputs if output["output_type"] == "error"]
        assert "/tmp/" not in (NOTEBOOKS / f"{name}.ipynb").read_text("utf-8"), f"{name} shows a folder of its author's"
