"""The report, from a result as ``python -m bench`` writes it; and one case from end to end."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import __main__ as command
from bench import cases, report, resources, soak, stages, step, timing
from bench.options import takes_parts

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


def test_the_page_of_a_gpu_has_microseconds_and_what_the_host_spends(tmp_path: Path) -> None:
    rows = [row(median=0.04608, p20=0.0123456, p80=0.05, processor=1e-4, peak_memory=5_415_000_000)]
    machine = {"cpu": "X", "gpu": "Y", "bandwidth": 2e12, "device": "cuda"}
    file = tmp_path / "gpu.json"
    file.write_text(json.dumps({"machine": machine, "rows": rows}))
    report.main([str(file)])
    page = (tmp_path / "gpu.md").read_text()
    assert (
        page.startswith("# Benchmarks: Y\n")
        and "Times are the GPU's" in page
        and "*Host* is the time until a call returns" in page
    )
    assert "| case | with | us | p20 to p80 | host, us | of copy | extra, MB | speed-up |" in page
    assert "| 2,000 boxes | rcnn | 46080 | 12346 to 50000 | 100 | 25.0% | 5415 | 2.50 |" in page
    # A training step with stages, and one that is replayed whole.
    taken = {"model": "tiny", "task": "training step", "batch": 2, "precision": "bf16", "size": [800, 1333]}
    taken |= {"median": 0.004, "p20": 0.003, "p80": 0.005, "images_per_second": 500.0, "speedup": 3.0, "idle": 0.25}
    stepped = [
        {**taken, "with": "rcnn", "stages": {"trunk": 0.002, "rest": 0.001}, "peak_memory": 1.5e9},
        {**taken, "with": "rcnn, CUDA graph"},
    ]
    found = {"rows": stepped, "loader": [], "gate": {}}
    file.write_text(json.dumps({"machine": machine, "rows": [], "step": found}))
    report.main([str(file)])
    page = (tmp_path / "gpu.md").read_text()
    assert page.startswith("# Training steps: Y\n") and "Of copy" not in page
    assert "for the sake of a CPU" not in page and "*idle* is the part of a step" in page
    assert "| total | p20 to p80 | trunk | rest | idle | peak, MB | speed-up |" in page
    assert "| 2 | bf16 | rcnn | 500 | 4 | 3 to 5 | 2 | 1 | 25% | 1500 | 3.00 |" in page
    assert "| 2 | bf16 | rcnn, CUDA graph | 500 | 4 | 3 to 5 |  |  | 25% |  | 3.00 |" in page


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"rows": []', '{"machine": {}}', '{"machine": {}, "rows": []}', '{"machine": 1, "rows": []}'),
        '{"machine": {"cpu": "X", "device": "cpu", "bandwidth": 1}, "rows": [{"op": "nms"}]}',
    ],
)
def test_another_file_is_refused(tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "other.json"
    file.write_text(content)
    with pytest.raises(SystemExit) as stopped:
        report.main([str(file)])
    assert stopped.value.code == 1
    assert "other.json is no output of python -m bench" in capsys.readouterr().err


def test_a_speed_up_is_against_torchvision_or_else_plain_torch() -> None:
    def speedups(*names: str) -> dict[str, float | None]:
        case = cases.Case("x", dict.fromkeys(names, lambda: time.sleep(0.001)), lambda: None, 1, 1)
        return {row["with"]: row["speedup"] for row in cases.run("nms", case, torch.device("cpu"), 1.0, 1, 1.0)}

    assert speedups("rcnn") == {"rcnn": None}
    assert speedups("rcnn", "torch")["torch"] == 1.0 and speedups("rcnn", "torch")["rcnn"]
    assert speedups("rcnn", "torchvision", "torch")["torchvision"] == 1.0
    assert speedups("rcnn", "torchvision", "torch")["torch"] != 1.0


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


def test_a_gpu_is_busy_until_the_host_has_queued_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fill takes 0.25 ms here, the host 1 ms for a call: 6 fills hide one and a half of it."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def synchronize(self) -> None:
            pass

        def elapsed_time(self, other: "Event") -> float:
            return 0.25

    class Buffer:
        def zero_(self) -> None:
            log.append("fill")

    moments = iter(range(10**6))
    monkeypatch.setattr(timing.torch.cuda, "Event", Event)
    monkeypatch.setattr(timing.torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timing.torch, "empty", lambda *_, **__: Buffer())
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(moments) * 1e-3)
    for ahead, fills in ((True, 7), (False, 1)):
        once = timing._on_gpu(torch.device("cuda"), ahead)
        log.clear()
        assert once(lambda: log.append("call")) == (0.25e-3, pytest.approx(1e-3))
        assert log == ["call", *["fill"] * fills, "event", "call", "event"]


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


def refused(run: Callable[[list[str]], None], words: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[Any, str]:
    """Exit code and the one line that a command ends with."""
    with pytest.raises(SystemExit) as stopped:
        run(words)
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1, told
    return stopped.value.code, told.err


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be measured, trained or compiled."""
    for module, name in ((command, "bandwidth"), (command, "run"), (soak, "run"), (resources, "table")):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("began before its options were checked"))


@pytest.mark.usefixtures("idle")
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="has no /proc")
def test_a_place_that_takes_no_file_is_told_before_anything_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sound = tmp_path / "sound.json"
    sound.write_text(json.dumps({"machine": {"cpu": "X", "bandwidth": 2e10, "device": "cpu"}, "rows": [row()]}))
    for run, words, name in (
        (command.main, ["--op", "anchors", "--against", "--device", "cpu"], "bench"),
        (soak.main, [], "bench.soak"),
        (report.main, [str(sound)], "bench.report"),
    ):
        for out, told in (
            (str(tmp_path), f"writes {tmp_path}, but that is a folder"),
            ("/proc/x.json", "writes /proc/x.json, but no file can be made in its folder"),
            (f"{tmp_path}/no/x.json", f"writes {tmp_path}/no/x.json, but its folder does not exist"),
        ):
            assert refused(run, [*words, "--out", out], capsys) == (1, f"python -m {name} {told}\n")
        code, told = refused(run, [*words, "--out", str(tmp_path / ("x" * 300))], capsys)
        assert code == 1 and told.startswith(f"python -m {name} cannot write ") and "too long" in told
    assert sorted(tmp_path.iterdir()) == [sound]


def test_a_gpu_that_is_not_there_is_told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for words in (["--op", "anchors"], ["--step", "tiny"], ["--full"]):
        code, told = refused(command.main, [*words, "--device", "cuda"], capsys)
        assert (code, told) == (
            1,
            "python -m bench: torch finds no GPU for --device cuda; python -m rcnn.env says why\n",
        )


@pytest.mark.usefixtures("idle")
def test_data_of_a_step_is_looked_at_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--against", "--step", "tiny", "--data", str(tmp_path / "none")]
    code, told = refused(command.main, words, capsys)
    assert code == 1 and told.endswith(
        f"--data cannot be read: {tmp_path / 'none'}: expected a data folder, but there is none\n"
    )
    with pytest.raises(SystemExit) as stopped:
        command.main(["--op", "anchors", "--data", str(tmp_path)])
    assert stopped.value.code == 2 and "--data is for the loader of --step" in capsys.readouterr().err


@pytest.mark.usefixtures("idle")
def test_resources_go_into_a_page_with_marks_and_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    for content, told in (
        (None, f"cannot read {page}: No such file or directory"),
        (b"\xff\xfe", f"cannot read {page}: it is no text"),
        (b"text", f"writes between {resources.BEGIN} and {resources.END}, which {page} does not have"),
        (f"{resources.END} {resources.BEGIN}".encode(), f"and {resources.END}, which {page} does not have"),
    ):
        if content is not None:
            page.write_bytes(content)
        code, found = refused(resources.main, ["--out", str(page)], capsys)
        assert code == 1 and found.endswith(f"{told}\n") and found.startswith("python -m bench.resources ")
        assert content is None or page.read_bytes() == content
    code, found = refused(resources.main, ["--out", str(tmp_path)], capsys)
    assert (code, found) == (1, f"python -m bench.resources cannot read {tmp_path}: Is a directory\n")


def test_a_report_goes_into_a_file_of_its_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sound = json.dumps({"machine": {"cpu": "X", "bandwidth": 2e10, "device": "cpu"}, "rows": [row()]})
    file = tmp_path / "sound.md"
    file.write_text(sound)
    for words in ([str(file)], [str(file), "--out", str(file)]):
        assert refused(report.main, words, capsys) == (
            1,
            f"python -m bench.report writes {file}, which must be a file other than {file}\n",
        )
    assert file.read_text() == sound and list(tmp_path.iterdir()) == [file]
    (tmp_path / "page-nms.png").mkdir()
    code, told = refused(report.main, [str(file), "--out", str(tmp_path / "page.md")], capsys)
    assert code == 1 and told.endswith("page-nms.png, but that is a folder\n")


@pytest.mark.skipif(os.name != "posix", reason="has no named pipes")
def test_a_result_goes_to_a_pipe_once(tmp_path: Path) -> None:
    """Not after each op as well: its reader would get one JSON after another, and the next write wait for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert takes_parts(tmp_path / "new.json") and not takes_parts(pipe)
    found: list[str] = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
    reader.start()
    words = ["--op", "anchors", "--device", "cpu", "--against", "--repeats", "1", "--out", str(pipe)]
    subprocess.run([sys.executable, "-m", "bench", *words], cwd=ROOT, capture_output=True, check=True, timeout=300)
    reader.join(timeout=60)
    assert {row["op"] for row in json.loads(found[0])["rows"]} == {"anchors"} and pipe.is_fifo()
