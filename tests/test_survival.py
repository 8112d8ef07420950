"""What a run survives, and what it leaves behind when it cannot: each test plants one fault in a small run."""

import csv
import json
import os
import random
import shutil
import signal

import jobs
import pytest
import safetensors.torch
import torch

from rcnn import run_folder
from rcnn.checkpoint import read_state
from rcnn.data import flowers

SIZE = ["--model.min_size", "64", "--model.max_size", "96", "--loader.batch_size", "2", "--log_interval", "1"]
#: On a CPU, wherever the tests run: runs are compared bit by bit, which on a GPU takes --deterministic.
CPU = ["--device", "cpu"]
OPTIONS = [*SIZE, *CPU, "--epochs", "2", "--loader.workers", "0", "--optim.ema", "0.9"]
EACH_STEP = ["--save_interval", "1"]


@pytest.fixture(scope="module")
def data(folder):
    return flowers.write(folder / "flowers", count=16, seed=1)


@pytest.fixture(scope="module")
def whole(server, data, folder):
    """The folder of the run that nothing happened to."""
    job = server.train("--data", data, "--out", folder / "whole", *OPTIONS)
    assert job.wait() == 0, job.text()
    return folder / "whole"


def same(one, other):
    """Whether two values hold the same bits."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_same_run(one, other):
    """Weights, averaged weights, optimiser, generators, positions and the epochs' rows are the same bits."""
    for name in ("model_best.safetensors", "model_last.safetensors"):
        first, second = (safetensors.torch.load_file(run / name) for run in (one, other))
        assert same(first, second), name
    last, again = (read_state(run_folder.states(run)[-1]) for run in (one, other))
    assert [key for key in last if not same(last[key], again[key])] == []
    rows = [
        [{**row, "seconds": ""} for row in csv.DictReader((run / "results.csv").open(encoding="utf-8"))]
        for run in (one, other)
    ]
    assert rows[0] == rows[1]
    steps = [
        [(row["step"], row["loss"]) for row in map(json.loads, (run / "metrics.jsonl").open()) if row["kind"] == "step"]
        for run in (one, other)
    ]
    assert steps[0] == steps[1]


#: Kills itself at a moment of the first step, of the checkpoint after it or of what follows; no later than the second.
KILL_AT_SOME_TIME = """
import signal, threading, time
real, taken, moment = engine.Step.on_device, [], {moment}

def kill():
    time.sleep(moment)
    os.kill(os.getpid(), signal.SIGKILL)

def on_device(*words):
    taken.append(1)
    if len(taken) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    threading.Thread(target=kill, daemon=True).start()
    return real(*words)

engine.Step.on_device = on_device
"""

KILL_IN_WRITE = """
import signal
from rcnn import checkpoint
real, left = checkpoint.atomic_write, [{writes}]

def killing(path, write):
    def half(file):
        class Torn:
            def write(self, data):
                left[0] -= 1
                if left[0] < 0:
                    file.write(bytes(data)[: int(len(data) * {share})])
                    file.flush()
                    os.kill(os.getpid(), signal.SIGKILL)
                file.write(data)
        write(Torn())
    real(path, half)

checkpoint.atomic_write = killing
"""


def test_killed_at_ten_random_moments_and_resumed_it_is_the_same_run(server, data, folder, whole):
    """A life takes one step of the twelve at most, so that the run lasts for all ten kills."""
    out = folder / "killed"
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    words = ["--data", data, "--out", out, *OPTIONS, *EACH_STEP, "--resume", "auto"]
    for number in chance.sample(range(10), 10):
        if number < 4:  # in the middle of a checkpoint write
            before = KILL_IN_WRITE.format(writes=chance.randrange(3), share=chance.random())
        else:
            before = KILL_AT_SOME_TIME.format(moment=chance.uniform(0, 0.5))
        job = server.train(*words, before=jobs.BRIEF + before)
        assert job.wait() == -signal.SIGKILL, (seed, job.text())
    job = server.train(*words)
    assert job.wait() == 0, (seed, job.text())
    assert not list(out.glob(".*.tmp")), "what the kills left is removed"
    assert_same_run(whole, out)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_pre_emption_leaves_a_checkpoint_and_the_folder_may_move(server, data, folder, whole, name):
    out = folder / name
    job = server.train("--data", data, "--out", out, *OPTIONS)
    job.wait_for("loss_box_reg")
    job.signal(getattr(signal, name))
    assert job.wait() == 75, job.text()
    assert "stopped by a signal (SIGTERM or SIGUSR1) after step" in job.text()
    assert f"rcnn train --resume --out {out} goes on from there" in job.text()
    (state,) = run_folder.states(out)
    assert 1 <= read_state(state)["position"]["step"] <= 12
    moved = shutil.move(out, folder / f"moved-{name}")
    job = server.train("--out", moved, "--resume")
    assert job.wait() == 0, job.text()
    assert not out.exists()
    assert_same_run(whole, moved)


def test_the_end_of_its_time_is_like_pre_emption(server, data, folder, whole):
    out = folder / "timed"
    job = server.train("--data", data, "--out", out, *OPTIONS, "--max-time", "1e-6")
    assert job.wait() == 75, job.text()
    assert "stopped by max_time after step 1; " in job.text()
    job = server.train("--out", out, "--resume", "--max_time", "0")
    assert job.wait() == 0, job.text()
    assert_same_run(whole, out)


def test_a_corrupt_newest_checkpoint_gives_way_to_the_one_before(server, folder, whole):
    out = folder / "corrupt"
    shutil.copytree(whole, out)
    before, newest = run_folder.states(out)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    job = server.train("--out", out, "--resume")
    assert job.wait() == 0, job.text()
    assert f"warning: {newest} is torn or damaged" in job.text() and "the state before it is used" in job.text()
    assert (out / f"{newest.name}.damaged").read_bytes() == content
    assert [file.name for file in run_folder.states(out)] == [before.name, newest.name]
    assert_same_run(whole, out)


def test_a_second_run_in_the_same_folder_is_refused(server, data, folder):
    out = folder / "shared"
    slow = jobs.BRIEF + "import time\nengine.Step.on_device = lambda *_: time.sleep(600)\n"
    first = server.train("--data", data, "--out", out, *OPTIONS, before=slow)
    first.wait_for("learning rate")
    second = server.train("--data", data, "--out", out, *OPTIONS)
    assert second.wait() == 1
    assert f"{out} is in use by another run (process {first.pid} on " in second.text()
    first.signal(signal.SIGKILL)
    first.wait()
    third = server.train("--data", data, "--out", out, *OPTIONS, "--max_time", "1e-6")
    assert third.wait() == 75, third.text()


def test_the_signals_of_pre_emption_do_not_kill_the_workers(server, data, folder, whole):
    """A scheduler sends them to every process of the job."""
    out = folder / "workers"
    words = ["--data", data, "--out", out, *OPTIONS, "--loader.workers", "2"]
    job = server.train(*words, before=jobs.BRIEF + "os.setpgid(0, 0)\n")
    job.wait_for("loss_box_reg")
    os.killpg(job.pid, signal.SIGTERM)
    assert job.wait() == 75, job.text()
    job = server.train("--out", out, "--resume")
    assert job.wait() == 0, job.text()
    assert_same_run(whole, out)


def test_an_image_that_turns_unreadable_in_mid_training_is_named(server, data, folder):
    copy = shutil.copytree(data, folder / "turning")
    before = f"""
taken = []
real = engine.Step.on_device
def on_device(*words):
    taken.append(1)
    if len(taken) == 4:
        for file in {str(copy)!r}, :
            name = open(file + "/VOC2007/ImageSets/Main/train.txt").read().split()[0]
            os.truncate(file + "/VOC2007/JPEGImages/" + name + ".jpg", 300)
    return real(*words)
engine.Step.on_device = on_device
"""
    out = folder / "turned"
    job = server.train("--data", copy, "--out", out, *OPTIONS, before=jobs.BRIEF + before)
    assert job.wait() == 0, job.text()
    name = (copy / "VOC2007/ImageSets/Main/train.txt").read_text().split()[0]
    assert len([line for line in job.text().splitlines() if name in line and "image skipped" in line]) == 1
    assert "images that could not be read: 1" in job.text()


NAN_TARGET = """
import dataclasses
from rcnn.data.loader import Loader
real, taken = Loader.__iter__, []

def read(self):
    for batch in real(self):
        if self.plan._train:
            taken.append(1)
            if len(taken) in {steps}:
                batch.targets.boxes[0, 2] = float("nan")
        yield batch

Loader.__iter__ = read
"""


def test_a_nan_in_a_target_is_named_saved_and_skipped(server, data, folder):
    out = folder / "nan"
    before = jobs.BRIEF + NAN_TARGET.format(steps=[3, 5])
    job = server.train("--data", data, "--out", out, *OPTIONS, "--max_bad_steps", "2", before=before)
    assert job.wait() == 0, job.text()
    lines = [line for line in job.text().splitlines() if "is not finite" in line]
    files = [out / run_folder.BAD_STEP.format(step, 0) for step in (3, 5)]
    assert len(lines) == 2
    for number, line, file in zip((1, 2), lines, files, strict=True):
        assert line.startswith(f"a target box is not finite at step {file.name[9:].lstrip('-0')[0]} (learning rate ")
        assert "gradient norm" in line and line.count(".jpg") == 2 and f"rcnn train --replay {file}" in line
        assert line.endswith(f"step skipped, {number} of at most 2")
    state = read_state(run_folder.states(out)[-1])
    assert state["position"]["step"] == 12 and state["position"]["skipped"] == 2
    assert all(tensor.isfinite().all() for tensor in state["model"].values())
    job = server.train("--replay", files[0])
    assert job.wait() == 0
    assert "targets that are not finite: boxes (1 of " in job.text()
    assert all(image in job.text() for image in lines[0].split("images ")[1].split(")")[0].split(", "))


def test_a_bad_step_ends_the_run_by_default_and_a_replay_finds_the_same(server, data, folder):
    """A weight that turned into NaN: every loss that depends on it is named, and found again bit by bit."""
    out = folder / "diverged"
    before = """
real, taken = engine.Step.on_device, []
def on_device(self, batches):
    taken.append(1)
    if len(taken) == 3:
        with torch.no_grad():
            self.model.roi_heads.box_predictor.bbox_pred.bias.fill_(float("nan"))
    return real(self, batches)
engine.Step.on_device = on_device
"""
    job = server.train("--data", data, "--out", out, *OPTIONS, *EACH_STEP, before=jobs.BRIEF + before)
    assert job.wait() == 1
    line = job.text().splitlines()[-1]
    file = out / run_folder.BAD_STEP.format(3, 0)
    assert line.startswith("rcnn train: loss_box_reg is not finite at step 3 (learning rate ")
    assert "lower optim.lr or set optim.clip_norm, or skip some with max_bad_steps" in line
    assert read_state(run_folder.states(out)[-1])["position"]["step"] == 2, "the last checkpoint is as it was"
    job = server.train("--replay", file)
    assert job.wait() == 0
    shown = job.text()
    saved = read_state(file)["facts"]["losses"]
    for name in ("loss_objectness", "loss_rpn_box_reg", "loss_classifier"):
        assert f"{name}: {saved[name]:g} (in the run {saved[name]:g})" in shown
    assert "weights that are not finite: roi_heads.box_predictor.bbox_pred.bias (12 of 12)" in shown
    assert "losses that are not finite: loss_box_reg" in shown and "gradients that are not finite: " in shown
    job = server.train("--replay", run_folder.states(out)[0])
    assert job.wait() == 1 and "is no saved step of this version" in job.text()


def test_out_of_memory_says_what_to_lower_and_leaves_a_checkpoint(server, data, folder, whole):
    out = folder / "memory"
    before = """
real, taken = engine.Step.on_device, []
def on_device(*words):
    taken.append(1)
    if len(taken) == 4:
        {fault}
    return real(*words)
engine.Step.on_device = on_device
"""
    faults = "raise torch.cuda.OutOfMemoryError('CUDA out of memory')", "raise MemoryError", "torch.empty(1 << 50)"
    for number, fault in enumerate(faults):
        words = [*OPTIONS, *(["--resume"] if number else [])]
        job = server.train("--data", data, "--out", out, *words, before=jobs.BRIEF + before.format(fault=fault))
        assert job.wait() == 1
        line = job.text().splitlines()[-1]
        step = 3 * (number + 1)
        assert line.startswith(f"rcnn train: out of memory on cpu after step {step}: lower loader.batch_size (now 2;")
        assert f"the checkpoint of step {step} is in {out}, and --resume goes on" in line
    job = server.train("--out", out, "--resume")
    assert job.wait() == 0, job.text()
    assert_same_run(whole, out)


def test_a_batch_size_cannot_be_found_without_a_gpu(server, data, folder):
    job = server.train("--data", data, "--out", folder / "auto", *SIZE, "--loader.batch_size", "auto", *CPU)
    assert job.wait() == 1
    line = job.text().splitlines()[-1]
    assert line == "rcnn train: loader.batch_size auto fills a GPU's memory, and this run is on cpu; give a number"


def test_a_clock_that_jumps_changes_nothing(server, data, folder, whole):
    before = """
import time
jumps, real_time = [0], time.time
def jumping():
    jumps[0] += 1
    return real_time() + (-1) ** jumps[0] * 10.0**7
time.time = jumping
"""
    out = folder / "clock"
    job = server.train("--data", data, "--out", out, *OPTIONS, "--max_time", "600", before=jobs.BRIEF + before)
    assert job.wait() == 0, job.text()
    assert_same_run(whole, out)
    assert all(float(row["seconds"]) >= 0 for row in csv.DictReader((out / "results.csv").open()))


#: A file system of one's own, as root or in a user namespace; exit code 77 where the machine allows neither.
MOUNT = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
user, group = os.getuid(), os.getgid()
if libc.unshare(0x20000) and libc.unshare(0x10000000 | 0x20000):
    os._exit(77)
def mount(source, target, kind, flags, options):
    words = [None if word is None else str(word).encode() for word in (source, target, kind)]
    if libc.mount(*words, ctypes.c_ulong(flags), None if options is None else options.encode()):
        os._exit(77)
mount(None, "/", None, 0x4000 | 0x40000, None)
"""


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(server, data, folder):
    """A small tmpfs, which takes the first checkpoint but not many more; what it holds is looked at from within."""
    out = folder / "disk"
    out.mkdir()
    code = f"""
{MOUNT}
mount("tmpfs", {str(out)!r}, "tmpfs", 0, "size=130m")
{jobs.BRIEF}
try:
    cli.main({["train", "--data", str(data), "--out", f"{out}/run", *OPTIONS, *EACH_STEP]!r})
finally:
    folder = run_folder.Path({f"{out}/run"!r})
    print("states", [file.name for file in run_folder.states(folder)])
    newest = run_folder.newest_state(folder, print)
    print("whole", newest.name, training.checkpoint.read_state(newest)["position"]["step"])
    print("model", training.checkpoint.read(folder / "model_last.safetensors").extra["step"])
    print("left", [file.name for file in folder.glob(".*.tmp")])
    sys.stdout.flush()
"""
    job = server.start(code)
    if job.wait() == 77:
        pytest.skip("this machine allows no mount")
    assert job.code == 1
    shown = job.text()
    assert "could not be written, and is as it was before: No space left on device" in shown
    assert "whole state-00000000" in shown and "warning" not in shown and "left []" in shown
    assert int(shown.split("model ")[-1].split()[0]) >= 1


def test_a_data_folder_may_be_read_only(server, data, folder, whole):
    out = folder / "read-only"
    code = f"""
{MOUNT}
mount({str(data)!r}, {str(data)!r}, None, 0x1000, None)
mount(None, {str(data)!r}, None, 0x1000 | 0x20 | 1, None)
try:
    open({str(data / "x")!r}, "w")
    os._exit(77)
except OSError:
    pass
{jobs.BRIEF}
cli.main({["train", "--data", str(data), "--out", str(out), *OPTIONS, "--loader.workers", "1"]!r})
"""
    job = server.start(code)
    if job.wait() == 77:
        pytest.skip("this machine allows no mount")
    assert job.code == 0, job.text()
    assert same(*(safetensors.torch.load_file(r / "model_last.safetensors") for r in (whole, out)))


def test_deterministic_runs_are_the_same_bits(server, data, folder):
    """On a GPU where there is one."""
    words = [*OPTIONS, "--device", "auto", "--deterministic", "--optim.accumulate", "2", "--optim.name", "sgd"]
    words += ["--loader.workers", "1"]
    runs = [folder / "one", folder / "two"]
    for out in runs:
        job = server.train("--data", data, "--out", out, *words)
        assert job.wait() == 0, job.text()
        assert "images per step / 8 (2 a batch x 1 processes x 2 accumulated)" in job.text()
    assert_same_run(*runs)
    assert read_state(run_folder.states(runs[0])[-1])["position"]["step"] == 2 * 3, "11 images: 6 batches, 3 steps"


def test_a_run_that_gets_no_better_stops_early(server, data, folder):
    words = ["--data", data, "--out", folder / "early", *OPTIONS, "--epochs", "9", "--patience", "2"]
    job = server.train(*words, before=jobs.BRIEF + "engine.coco_ap = lambda *_: {'AP': 0.5, 'AP50': 0.5}")
    assert job.wait() == 0, job.text()
    assert "stopped early: 2 evaluations without a better AP" in job.text()
    assert [row["epoch"] for row in csv.DictReader((folder / "early" / "results.csv").open())] == ["1", "2", "3"]
