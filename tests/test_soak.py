"""``python -m bench.soak``: its line by hand, what it sees of a process and its children, and a short run of it."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from bench import soak
from bench.soak import Sample, amiss, slope

ROOT = Path(__file__).resolve().parents[1]


def samples(memory, files=lambda step: 64, threads=lambda step: 9):
    return [Sample(step, memory(step), files(step), threads(step), 3) for step in range(510, 2001, 10)]


def test_the_line_goes_through_the_lows():
    assert slope(samples(lambda step: 500 + step * 0.002), 100) == pytest.approx(2.0)
    assert slope(samples(lambda step: 500 - step * 0.001), 100) == pytest.approx(-1.0)
    chance = random.Random(0)
    # Between the lows anything may come and go.
    noisy = samples(lambda step: 500 + step * 0.002 + (0 if step % 100 == 40 else chance.uniform(1, 60)))
    assert slope(noisy, 100) == pytest.approx(2.0)


@pytest.mark.parametrize(("rise", "told"), [(0.99, False), (1.01, True)])
def test_memory_may_rise_by_less_than_the_limit(rise, told):
    found = amiss(samples(lambda step: 500 + step * rise / 1000), 100)
    assert found == ([f"memory rises by {rise:.2f} MB in 1,000 steps; the limit is 1"] if told else [])


def test_handles_and_threads_may_come_and_go_but_not_grow():
    def flat(step):
        return 500.0

    assert amiss(samples(flat, files=lambda step: 64 + step % 20, threads=lambda step: 9 + step % 20), 100) == []
    assert amiss(samples(flat, files=lambda step: 64 + step // 500), 100) == ["files grow from 66 to 68"]
    assert amiss(samples(flat, threads=lambda step: 9 + (step == 2000)), 100) == ["threads grow from 9 to 10"]


#: Run by a new process: in one that ran other tests, the collector may close their handles at any moment.
LOOK = """
import mmap, os, threading
from bench.soak import sample

size = 64 << 20
asked, told = os.pipe(), os.pipe()
alone = sample(0)
child = os.fork()
if not child:
    os.read(asked[0], 1)
    os.open(os.devnull, os.O_RDONLY)
    os.write(told[1], b"x")
    os.read(asked[0], 1)
    os._exit(0)
before = sample(1)
with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block, open(os.devnull) as _:
    for start in range(0, size, mmap.PAGESIZE):
        block[start] = 1
    end = threading.Event()
    thread = threading.Thread(target=end.wait, daemon=True)
    thread.start()
    os.write(asked[1], b"x")
    os.read(told[0], 1)
    during = sample(2)
    os.write(asked[1], b"x")
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    ended = sample(3)
    os.waitpid(child, 0)
    end.set()
    thread.join()
while os.path.exists(f"/proc/self/task/{thread.native_id}"):  # it ends for Python before it does for the system
    os.sched_yield()
after = sample(4)
assert ended.processes == alone.processes, "an exit code that nobody has asked for is no process"
assert (before.processes, after.processes) == (alone.processes + 1, alone.processes), (alone, before, after)
assert before.memory > alone.memory, "the child counts"
assert size / 1e6 <= during.memory - before.memory < 1.5 * size / 1e6, (before, during)
assert after.memory - alone.memory < 0.5 * size / 1e6, (alone, after)
assert (during.files, during.threads) == (before.files + 2, before.threads + 1), (before, during)
assert after.files == alone.files and after.threads == during.threads - 2, (alone, during, after)
"""


def test_a_look_sees_memory_handles_threads_and_children():
    done = subprocess.run([sys.executable, "-c", LOOK], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_short_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "IMAGES", 7)  # 5 of them train: 3 steps an epoch
    out = tmp_path / "soak.json"
    words = ["--steps", "5", "--every", "1", "--warmup", "2", "--window", "1", "--workers", "1", "--out", str(out)]
    code = 0
    try:
        soak.main(words)
    except SystemExit as end:
        code = end.code
    result = json.loads(out.read_text())
    assert [one["step"] for one in result["samples"]] == [1, 2, 3, 4, 5, 6]
    assert {one["processes"] for one in result["samples"]} == {2}, "the process and the one that loads"
    assert all(one["memory"] > 50 and one["files"] > 3 and one["threads"] > 1 for one in result["samples"])
    judged = [Sample(**one) for one in result["samples"][2:]]
    assert result["slope"] == slope(judged, 1) and result["amiss"] == amiss(judged, 1)
    assert code == bool(result["amiss"])
    shown = capsys.readouterr().out
    assert "6 steps in " in shown and f"written: {out}" in shown


def test_bad_options(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(soak, "run", lambda *_: pytest.fail("began before its options were checked"))
    for words, code, told in (
        (["--steps", "600"], 2, "must leave two windows after the warm-up, got 600"),
        (["--every", "101"], 2, "--every must be between 1 and --window (100), got 101"),
        (["--warmup", "-1"], 2, "--warmup must not be negative, got -1"),
        (["--workers", "-1"], 2, "--workers must not be negative, got -1"),
        (["--out", str(tmp_path / "no" / "x.json")], 1, "but its folder does not exist"),
    ):
        with pytest.raises(SystemExit) as end:
            soak.main(words)
        assert end.value.code == code and told in capsys.readouterr().err
