"""The report, from a result as ``python -m bench`` writes it; and one case from end to end."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import report, stages, step

ROOT = Path(__file__).resolve().parents[1]


def row(**changed: Any) -> dict[str, Any]:
    sound = {
        "op": "nms",
        "case": "2,000 boxes",
        "dtype": "float32",
        "with": "rcnn",
        "median": 0.002,
        "p20": 0.0015,
        "p80": 0.003,
        "processor": 0.004,
        "bandwidth_share": 0.25,
        "peak_memory": 1_500_000,
        "speedup": 2.5,
    }
    return {**sound, **changed}


def test_the_page_has_a_row_for_each_and_a_plot_for_each_op(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row(), row(**{"with": "torchvision", "speedup": 1.0}), row(op="anchors", dtype="bfloat16", speedup=None)]
    result = {"machine": {"cpu": "X", "bandwidth": 2e10, "device": "cpu", "torchvision": None}, "rows": rows}
    file = tmp_path / "cpu.json"
    file.write_text(json.dumps(result))
    report.main([str(file)])
    page = (tmp_path / "cpu.md").read_text()
    assert "cpu X, device cpu. A copy moves 20.0 GB/s" in page
    assert "| 2,000 boxes | rcnn | 2 | 1.5 to 3 | 4 | 25.0% | 1.5 | 2.50 |" in page
    assert "| 2,000 boxes, bfloat16 | rcnn | 2 | 1.5 to 3 | 4 | 25.0% | 1.5 |  |" in page
    assert "![Speed-up of nms by case](cpu-nms.png)" in page
    assert (tmp_path / "cpu-nms.png").read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "cpu-anchors.png").exists()
    assert "written" in capsys.readouterr().out


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": []', '{"machine": {}}'])
def test_another_file_is_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(file)])
    assert stopped.value.code == 1
    assert "other.json is no output of python -m bench" in capsys.readouterr().err


def test_one_op_from_end_to_end(tmp_path: Path) -> None:
    """Gate, timing, table and JSON, on the smallest op and without a peer."""
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "bench", "--op", "anchors", "--device", "cpu", "--against", "--repeats", "1"]
    done = subprocess.run([*command, "--out", str(out)], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "268,569 anchors" in done.stdout
    result = json.loads(out.read_text())
    assert {row["op"] for row in result["rows"]} == {"anchors"}
    assert all(row["median"] > 0 for row in result["rows"])
    assert result["machine"]["device"] == "cpu"


def test_a_folder_that_is_not_there_is_told_before_anything_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench", "--op", "anchors", "--out", str(tmp_path / "no" / "x.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "but its folder does not exist" in done.stderr


def test_every_moment_belongs_to_the_innermost_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter((0.0, 1.0, 3.0, 6.0, 10.0, 15.0))
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(now))

    class Net:
        def heads(self) -> None:
            pass

        def trunk(self) -> str:
            self.heads()
            return "maps"

    net = Net()
    found = stages.stages(net.trunk, [(net, "heads", "heads")], 1, torch.device("cpu"))
    assert found == {"heads": 2.0, "rest": 4.0}  # 0..1 before, 1..3 within, 3..6 after
    now = iter((0.0, 1.0, 3.0, 6.0, 10.0, 15.0))
    parts = [(net, "heads", "heads"), (net, "trunk", "trunk")]
    found = stages.stages(lambda: net.trunk(), parts, 1, torch.device("cpu"))
    assert found == {"trunk": 2.0 + 4.0, "heads": 3.0, "rest": 1.0 + 5.0}
    assert vars(net) == {}  # nothing is left on it


def test_a_gpu_is_busy_where_anything_is_at_work() -> None:
    def event(kind: str, start: float, length: float) -> dict[str, Any]:
        return {"cat": kind, "ts": start, "dur": length}

    trace = [event("kernel", 40, 10), event("kernel", 0, 20), event("gpu_memcpy", 10, 15), event("kernel", 12, 3)]
    assert stages.busy([*trace, event("cpu_op", 0, 1000), {"ph": "M"}]) == pytest.approx(35e-6)  # 0..25 and 40..50


def test_a_step_and_a_detection_by_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(step, "SIZES", {"cpu": (64, 96)})
    monkeypatch.setattr(step, "GATE_SIZE", (64, 96))
    monkeypatch.setattr(step, "WARM_STEPS", 1)
    monkeypatch.setattr(step, "DRAWN", {"cpu": 14})
    (found,) = step.run(["tiny"], [1], None, torch.device("cpu"), False, 1)
    training, detection, predict = found["rows"]
    inside = {"input", "trunk", "RPN head", "proposals", "RoI", "heads", "rest"}
    assert training["stages"].keys() == inside | {"matching", "losses", "backward", "optimiser"}
    assert detection["stages"].keys() == inside | {"detections"}
    assert training["peak_memory"] > detection["peak_memory"] > 3 * 64 * 96 * 4
    assert [row["task"] for row in found["rows"]] == ["training step", "detection", "predict"]
    assert predict["images_per_second"] == 14 / predict["median"]
    assert found["loader"][0]["images"] == 16 and 0 <= found["loader"][0]["data"] < 1  # 10 that train, in two batches
    result = {"machine": {"cpu": "X", "bandwidth": 2e10, "device": "cpu"}, "rows": [], "step": found}
    (tmp_path / "cpu.json").write_text(json.dumps(result))
    report.main([str(tmp_path / "cpu.json")])
    page = (tmp_path / "cpu.md").read_text()
    head = next(line for line in page.splitlines() if line.startswith("| batch | precision | with"))
    assert head.startswith("| batch | precision | with | img/s | total | p20 to p80 | input | trunk | RPN head |")
    assert head.endswith("| optimiser | rest | peak, MB |")
    assert "### tiny, detection, 64 x 96 pixels, ms" in page and "- tiny, fp32: the loader alone gives" in page
