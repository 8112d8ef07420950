"""Several processes on one model: what they must agree on, and what happens when one of them dies.

They meet through a store in the test's own process, as torchrun's do through its agent's; one test is torchrun itself.
"""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
import torch
import torch.distributed as dist

import rcnn
from rcnn import run_folder
from rcnn.checkpoint import read_state
from rcnn.data import flowers

#: On a CPU, wherever the tests run: a GPU takes one process.
SIZE = ["--model.min_size", "64", "--model.max_size", "64", "--loader.workers", "0", "--log_interval", "1"]
SIZE += ["--device", "cpu"]

#: Seconds within which whatever several processes do together is done, on a machine with much else to do.
DEADLINE = 120


@pytest.fixture(scope="module")
def data(folder):
    return flowers.write(folder / "flowers", count=14, seed=1)  # 10 to train, 4 to validate


def command(*words, before=""):
    return f"{jobs.BRIEF}{before}\ncli.main({['train', *map(str, words)]!r})"


def ended(server, world, code):
    """Exit code and output of each of ``world`` processes, none of which may outlast the deadline."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    meeting = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",  # torch 2.4 asks for it
    }
    started = [
        server.start(code, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), **meeting)
        for rank in range(world)
    ]
    end = time.monotonic() + DEADLINE
    while any(job.poll() is None for job in started) and time.monotonic() < end:
        time.sleep(0.02)
    late = [rank for rank, job in enumerate(started) if job.poll() is None]
    for job in started:
        job.signal(signal.SIGKILL)
    shown = "\n".join(f"--- rank {rank}, exit code {job.code}\n{job.text()}" for rank, job in enumerate(started))
    assert not late, f"ranks {late} still running after {DEADLINE} s:\n{shown}"
    return [job.code for job in started], [job.text() for job in started]


def together(server, world, code):
    """What each of ``world`` processes prints, all of which end well."""
    codes, shown = ended(server, world, code)
    assert codes == [0] * world, "\n".join(shown)
    return shown


def losses(out):
    """Step -> each loss, from the run's metrics."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    return {
        row["step"]: {name: value for name, value in row.items() if name.startswith("loss")}
        for row in rows
        if row["kind"] == "step"
    }


#: Layers and losses in float64: rounding then tips no comparison (an IoU at its threshold, two scores), after which two
#: runs would go on with other samples, and further apart with each step.
DOUBLE = """
from rcnn import detector
real_build, real_float = detector.build, torch.Tensor.float
def build(*words):
    model = real_build(*words)
    for part in (model.backbone, model.rpn.head, model.roi_heads):
        part.double()
    model.mean, model.std = model.mean.double(), model.std.double()
    return model
torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else real_float(x)
detector.build = build
"""


@pytest.mark.parametrize(("norm", "world", "epochs"), [("frozen", 2, 4), ("sync", 2, 4), ("frozen", 3, 1)])
def test_processes_have_the_losses_of_one(server, data, folder, norm, world, epochs):
    """The same images of one size per step, no dropout, normalisers over the whole batch: equal over 20 steps.

    Three processes take four steps: a third of a count is rounded in float32.
    """
    words = ["--data", data, *SIZE, "--epochs", epochs, "--val_interval", epochs, "--loader.scale", "[1.0,1.0]"]
    words += ["--optim.name", "sgd", "--optim.lr", "0.04", "--optim.schedule", "step", "--optim.gamma", "1.0"]
    words += ["--model.norm", "frozen"] if norm == "frozen" else ["--sync_bn"]
    whole, shared = folder / f"{norm}-{world}-whole", folder / f"{norm}-{world}-shared"
    one = server.train(*words, "--out", whole, "--loader.batch_size", world, before=jobs.BRIEF + DOUBLE)
    shown = together(server, world, command(*words, "--out", shared, "--loader.batch_size", 1, before=DOUBLE))
    assert one.wait(DEADLINE) == 0, one.text()
    rate = f"learning rate {0.005 * world:g} = 0.04 x {world} images per step / 8"
    assert "1 process(es)" in one.text() and f"{rate}\n" in one.text()
    assert f"{world} process(es)" in shown[0]
    assert f"{rate} (1 a batch x {world} processes x 1 accumulated)\n" in shown[0]
    assert shown[1:] == [""] * (world - 1), "one rank reports"
    expected, found = losses(whole), losses(shared)
    assert list(found) == list(expected) == list(range(1, -(-10 // world) * epochs + 1))
    for step, row in found.items():
        assert row == pytest.approx(expected[step], rel=1e-5, abs=1e-5), step
    assert expected[max(expected)]["loss"] < expected[1]["loss"] - 0.1, "the weights moved"


BATCH_NORM = """
import torch.distributed as dist
from torch import nn
distributed.init(torch.device("cpu"))
torch.manual_seed(0)
images = torch.randn(5, 3, 4, 6, dtype=torch.float64) * 3 + 7
weights = torch.randn(5, 3, 4, 6, dtype=torch.float64)
def run(norm, part):
    x = images[part].clone().requires_grad_()
    (norm(x) * weights[part]).sum().backward()
    return x.grad
whole = nn.Sequential(nn.BatchNorm2d(3).double())
expected = run(whole, slice(None))
synced = nn.Sequential(nn.BatchNorm2d(3).double())
distributed.synchronize_norms(synced)
assert type(synced[0]) is distributed.SyncBatchNorm and synced.state_dict().keys() == whole.state_dict().keys()
part = [slice(0, 1), slice(1, 3), slice(3, 5)][distributed.rank()]  # shares of different size
got = run(synced, part)
for parameter in synced.parameters():
    dist.all_reduce(parameter.grad)
eps = torch.finfo(torch.float64).eps
def close(a, b):
    torch.testing.assert_close(a, b, rtol=120 * eps, atol=120 * eps * b.abs().max().item())  # sums of 120 terms
close(got, expected[part])
for a, b in zip(synced.parameters(), whole.parameters(), strict=True):
    close(a.grad, b.grad)
for a, b in zip(synced.buffers(), whole.buffers(), strict=True):
    close(a.double(), b.double())
synced.eval(), whole.eval()
close(synced(images), whole(images))
print("the same")
"""


def test_batchnorm_over_processes_is_that_of_the_whole_batch(server):
    assert together(server, 3, BATCH_NORM) == ["the same\n"] * 3


SHARES = """
import json
from rcnn.config import LoaderConfig, ModelConfig
from rcnn.data import open_dataset
from rcnn.models.faster_rcnn import FasterRCNN
distributed.init(torch.device("cpu"))
dataset = open_dataset({data!r}, "train")
torch.manual_seed(distributed.rank())
model = FasterRCNN(ModelConfig(name="tiny", min_size=64, max_size=64), dataset.classes)
distributed.copy_from_first(model.parameters())
real_validate = model.validate
def validate(images, targets):  # finds the image's objects, shifted in some images, so that AP is between 0 and 1
    losses, found = real_validate(images, targets)
    objects = len(targets.labels)
    found.boxes[0, :objects] = targets.boxes + targets.image_ids % 4
    found.labels[0, :objects], found.count[0] = targets.labels, objects
    return losses, found
model.validate = validate
told = []
for images in (7, 2):
    del dataset.records[images:]
    def loader(train, size):
        config = LoaderConfig(size, workers=0, color=0.0, scale=(1.0, 1.0))
        return engine.loader_for(model, dataset, config, train=train)
    found = engine.evaluate(model, loader(False, 1), dataset)
    assert (found is None) == (distributed.rank() > 0)
    plans = {{
        f"{{train}} {{size}} {{epoch}}": [[image for _, image in batch] for batch in plan]
        for train in (True, False) for size in (1, 2) for epoch in (0, 1)
        for plan in [loader(train, size).plan] if plan.set_epoch(epoch) is None
    }}
    shares = distributed.gather_objects(plans)
    if found is not None:
        results = [{{name: values.tolist() for name, values in one.items()}} for one in found.results]
        told.append([images, found.losses, found.coco["AP"], found.voc["map_area"], results, shares])
if told:
    print(json.dumps(told))
"""


def test_evaluation_counts_each_image_once_and_training_shares_them_out(server, data):
    """Seven images, and two so that the third process has none, in batches of one to two."""
    told = {world: json.loads(together(server, world, SHARES.format(data=str(data)))[0]) for world in (1, 2, 3)}
    for world, sets in told.items():
        for (images, losses, *results, shares), expected in zip(sets, told[1], strict=True):
            assert losses == pytest.approx(expected[1], rel=images * 2**-52)  # a mean of so many
            assert results == expected[2:5], "AP and detections are the same bits"
            for plan in shares[0]:
                train, size, _ = plan.split()
                batches = [share[plan] for share in shares]
                seen = [image for share in batches for batch in share for image in batch]
                assert set(seen) == set(range(images))
                if train == "False":
                    assert len(seen) == images
                    continue
                size = world * min(int(size), -(-images // world))
                assert len(seen) == -(-images // size) * size, "no more than fills the last step"
                for step in zip(*batches, strict=True):
                    together_in_step = [image for batch in step for image in batch]
                    assert len(set(together_in_step)) == min(size, images)
    assert all(0 < AP < 1 for _, _, AP, *_ in told[1])


#: Only the first image keeps its objects, so that most processes, and most steps, have none.
EMPTY = """
from dataclasses import replace
real_loader = engine.make_loader
def make_loader(dataset, *words, train, **named):
    if train:
        dataset.records[1:] = [
            replace(r, boxes=r.boxes[:0], labels=r.labels[:0], ignore=r.ignore[:0], areas=r.areas[:0])
            for r in dataset.records[1:]
        ]
    return real_loader(dataset, *words, train=train, **named)
engine.make_loader = make_loader
"""


def test_processes_without_any_object_neither_hang_nor_fail(server, data, folder):
    out = folder / "empty"
    words = ["--data", data, "--out", out, *SIZE, "--epochs", "1", "--loader.batch_size", "1"]
    together(server, 3, command(*words, before=EMPTY))
    found = losses(out)
    assert list(found) == [1, 2, 3, 4] and all(row["loss_objectness"] > 0 for row in found.values())
    assert {row["loss_box_reg"] > 0 for row in found.values()} == {True, False}, "steps with objects and without"
    state = read_state(run_folder.states(out)[-1])
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


BAD_STEP = """
from rcnn.data.loader import Loader
real_read, real_step, real_train, taken, stayed = Loader.__iter__, engine.Step.on_device, training.train, [], []

def read(self):
    for batch in real_read(self):
        taken.append(1)
        if distributed.rank() == 1 and len(taken) == 2:
            batch.targets.boxes[0, 0] = float("nan")
        yield batch

def on_device(self, batches):
    before = [parameter.clone() for parameter in self.parameters]
    values = real_step(self, batches)
    stayed.append(all(map(torch.equal, before, self.parameters)))
    return values

def run(config, model, *words):
    real_train(config, model, *words)
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    print("\\nstayed", stayed, "as the first's", torch.equal(weights, distributed.broadcast(weights)))

Loader.__iter__, engine.Step.on_device, training.train = read, on_device, run
"""


def test_a_bad_step_of_one_process_is_skipped_by_all(server, data, folder):
    out = folder / "bad"
    words = ["--data", data, "--out", out, *SIZE, "--epochs", "1", "--loader.batch_size", "2", "--max_bad_steps", "1"]
    shown = together(server, 2, command(*words, before=BAD_STEP))
    (line,) = [line for line in shown[0].splitlines() if "is not finite" in line]
    file = out / run_folder.BAD_STEP.format(2, 1)
    assert line.startswith("a target box is not finite at step 2 ") and line.count(".jpg") == 2
    assert f"rcnn train --replay {file}; step skipped, 1 of at most 1" in line
    assert list(out.glob("bad_step*")) == [file], "the batch of the one to blame"
    assert all("stayed [False, True, False] as the first's True" in text for text in shown)
    assert read_state(run_folder.states(out)[-1])["position"]["skipped"] == 1


KILLED = """
import signal
real_step, taken = engine.Step.on_device, []
def on_device(*words):
    taken.append(1)
    if distributed.rank() == 1 and len(taken) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real_step(*words)
engine.Step.on_device = on_device
"""


def test_a_killed_process_ends_the_others_with_a_traceback(server, data, folder):
    """Although the loading process that it leaves behind holds its sockets for a while."""
    words = ["--data", data, "--out", folder / "killed", *SIZE, "--epochs", "9", "--loader.workers", "1"]
    codes, shown = ended(server, 3, command(*words, "--loader.batch_size", 1, before=KILLED))
    assert codes == [1, -signal.SIGKILL, 1]
    for text in (shown[0], shown[2]):
        assert "Traceback" in text and "in on_device" in text
        assert re.search("Connection (closed|reset) by peer|Broken pipe", text.splitlines()[-1]), text


def children(process):
    """Process ids of the children of a process."""
    return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def test_torchrun_restarts_a_job_from_its_last_checkpoint(server, data, folder):
    """A rank is killed in mid-training; the job goes on by itself and is the one that nothing happened to."""
    words = ["--data", data, *SIZE, "--epochs", 2, "--val_interval", 2, "--loader.batch_size", 1]
    words += ["--save_interval", 2, "--optim.ema", "0.9"]
    out, whole, output = folder / "restarted", folder / "not-restarted", folder / "torchrun.txt"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launch += ["--max-restarts", "1", "-m", "rcnn.train", "--out", out, "--resume", "auto"]
    environment = os.environ | {"PYTHONPATH": str(Path(rcnn.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    with output.open("w") as file:
        agent = subprocess.Popen([*map(str, launch + words)], env=environment, stdout=file, stderr=file)
    try:
        end = time.monotonic() + DEADLINE
        while not run_folder.states(out):
            assert agent.poll() is None and time.monotonic() < end, output.read_text(encoding="utf-8")
            time.sleep(0.01)
        (victim,) = [pid for pid in children(agent.pid) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(victim, signal.SIGKILL)
        together(server, 2, command(*words, "--out", whole))
        assert agent.wait(DEADLINE) == 0, output.read_text(encoding="utf-8")
    except subprocess.TimeoutExpired:
        pytest.fail(output.read_text(encoding="utf-8"))
    finally:
        if agent.poll() is None:
            for pid in [*children(agent.pid), agent.pid]:
                os.kill(pid, signal.SIGKILL)
            agent.wait()
    shown = output.read_text(encoding="utf-8")
    assert f"failed (exitcode: -9) local_rank: 1 (pid: {victim})" in shown
    (step,) = re.findall(r"going on after step (\d+), from ", shown)
    assert 2 <= int(step) < 10 and shown.count("  step 1/10  ") == 1, "begun once"
    first, second = (read_state(run_folder.states(run)[-1]) for run in (whole, out))
    for key in ("model", "ema"):
        assert all(torch.equal(first[key][name], second[key][name]) for name in first[key]), key
    assert first["position"] == second["position"] and losses(whole) == losses(out)
    rows = [[row["epoch"] for row in csv.DictReader((run / "results.csv").open())] for run in (whole, out)]
    assert rows == [["1", "2"], ["1", "2"]]
