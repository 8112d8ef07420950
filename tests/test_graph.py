"""The recorded step: which steps are recorded, what is copied before a replay, and that nothing is taken twice.

There is no GPU here: a graph is played by an object that calls the recorded step again, on the tensors it was recorded
with. That recording itself works on a GPU is for ``test_a_recorded_step_...`` to say where there is one.
"""

from dataclasses import replace

import pytest
import torch
from test_batch import Streams
from test_no_sync import batch, model_of

from rcnn import graph, kernels
from rcnn.config import ModelConfig, TrainConfig, resolve
from rcnn.data.batch import Batch
from rcnn.data.buckets import pad_targets
from rcnn.engine import Step
from rcnn.graph import MOST, WARMUP, GraphedStep
from rcnn.optim import make_optimizer, set_lr

CPU = torch.device("cpu")


class Recording:
    """Stands in for ``torch.cuda.CUDAGraph`` and ``torch.cuda.graph``: a replay takes the step on the same tensors."""

    def __init__(self, monkeypatch, streams):
        self.log = streams.log
        self.fails = None
        recording = self

        class Graph:
            def replay(self):
                recording.log.append("replay")
                self.output.copy_(self.step(self.inputs))

        class Capture:
            def __init__(self, cuda_graph, pool=None, stream=None, capture_error_mode="global"):
                assert pool == "pool" and stream.name == "side" and capture_error_mode == "thread_local"
                self.graph = cuda_graph

            def __enter__(self):
                recording.now = self.graph
                recording.log.append("record")

            def __exit__(self, *_):
                recording.now = None

        self.now = None
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", Capture)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")

    def step(self, take, values):
        """The step as a recording sees it: nothing happens while it is recorded."""

        def step(batches):
            if self.now is None:
                return take(batches)
            if self.fails:
                raise RuntimeError(self.fails)
            self.now.step, self.now.inputs, self.now.output = take, batches, torch.zeros(values)
            return self.now.output

        return step


@pytest.fixture
def recording(monkeypatch):
    return Recording(monkeypatch, Streams(monkeypatch))


def small_batch(number, rows=0, height=64):
    images, targets = batch()
    images = (images.int() + 7 * number).clamp(max=255).to(torch.uint8)[:, :, :height]
    targets = pad_targets(targets) if rows else targets
    return Batch(images.contiguous(), targets, [0, 1], torch.ones(2, 2), [])


def trained(name, steps, wrap=None, accumulate=1):
    """Losses of every step, and the weights, from a fixed start."""
    config = resolve(TrainConfig(model=ModelConfig(name="tiny"))).optim
    model = model_of("tiny").train()
    optimizer = make_optimizer(model, replace(config, name=name), 1e-3)
    step = Step(model, optimizer, clip_norm=5.0)
    take = step.on_device if wrap is None else wrap(step.on_device, optimizer)
    found = []
    for number in range(steps):
        set_lr(optimizer, 2**-10 * (1 + number))  # exact in float32, which a tensor holds
        found.append(take([small_batch(accumulate * number + i) for i in range(accumulate)]).clone())
    return torch.stack(found), model


@pytest.mark.parametrize(("name", "accumulate"), [("sgd", 1), ("adamw", 1), ("adamw", 2)])
def test_replays_take_the_steps_that_would_be_taken(name, accumulate, recording):
    steps = WARMUP + 3
    expected, model = trained(name, steps, accumulate=accumulate)
    told = []

    def wrap(step, optimizer):
        return GraphedStep(recording.step(step, expected.shape[1]), optimizer, CPU, told.append)

    found, graphed = trained(name, steps, wrap, accumulate)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for (key, value), other in zip(model.state_dict().items(), graphed.state_dict().values(), strict=True):
        torch.testing.assert_close(other, value, rtol=0, atol=0, msg=key)
    assert [word for word in recording.log if word in ("record", "replay")] == ["record", *["replay"] * 3]
    assert told == []


def counting(recording, monkeypatch=None):
    """A graphed step that counts what it takes."""
    weight = torch.zeros(1, requires_grad=True)
    taken = []

    def take(batches):
        taken.append(batches[0].images.shape)
        return batches[0].images.float().mean().reshape(1)

    told = []
    optimizer = torch.optim.SGD([weight], 0.5)
    return GraphedStep(recording.step(take, 1), optimizer, CPU, told.append), taken, told, optimizer


def test_every_shape_of_images_or_ground_truth_has_its_own_recording(recording):
    step, taken, _, _ = counting(recording)
    kinds = [small_batch(0), small_batch(0, height=32), small_batch(0, rows=64)]
    for _ in range(WARMUP + 2):
        for each in kinds:
            step([each])
    assert len(step.recorded) == 3
    assert recording.log.count("record") == 3 and recording.log.count("replay") == 6
    assert len(taken) == 3 * (WARMUP + 2)  # each call is one step


def test_the_batch_is_copied_to_where_the_recording_reads(recording):
    step, _, _, _ = counting(recording)
    for number in range(WARMUP + 3):
        each = small_batch(number)
        assert step([each]).item() == each.images.float().mean()
        each.images.zero_()  # the caller's batch is not what was recorded


def test_warm_up_runs_on_the_stream_that_records(recording):
    step, _, _, _ = counting(recording)
    step([small_batch(0)])
    assert recording.log == ["side waits for consumer", "consumer waits for side", "kept for consumer"]


def test_learning_rates_become_tensors(recording):
    _, _, _, optimizer = counting(recording)
    (group,) = optimizer.param_groups
    assert isinstance(group["lr"], torch.Tensor) and group["lr"] == 0.5
    rate = group["lr"]
    group["factor"] = 2.0
    set_lr(optimizer, 0.25)
    assert group["lr"] is rate and rate == 0.5


def test_a_step_that_cannot_be_recorded_is_told_once_and_runs_as_usual(recording):
    step, taken, told, _ = counting(recording)
    recording.fails = "operation not permitted when stream is capturing\nand a traceback"
    for _ in range(WARMUP + 3):
        step([small_batch(0)])
    assert len(taken) == WARMUP + 3 and recording.log.count("record") == 1 and "replay" not in recording.log
    assert told == [
        "cuda_graph: the step cannot be recorded, so all steps run as usual (operation not permitted when stream is "
        "capturing)"
    ]


def test_no_more_than_so_many_shapes_are_recorded(recording, monkeypatch):
    monkeypatch.setattr(graph, "MOST", 1)
    step, taken, _, _ = counting(recording)
    for _ in range(WARMUP + 2):
        step([small_batch(0)])
        step([small_batch(0, height=32)])
    assert len(step.recorded) == 1 and len(taken) == 2 * (WARMUP + 2) and MOST > 8  # the buckets of a model


def test_a_recording_holds_the_anchors_that_it_reads(recording):
    step, _, _, _ = counting(recording)
    cells = kernels.cell_anchors([32], [1.0])[None]
    grid = kernels.anchors(cells, [(2, 3)], [16])
    for _ in range(WARMUP + 1):
        step([small_batch(0)])
    for width in range(1, 40):  # more than are kept
        kernels.anchors(cells, [(1, width)], [16])
    assert kernels.anchors(cells, [(2, 3)], [16]) is not grid
    (recorded,) = step.recorded.values()
    assert any(held is grid for held in recorded.held)


def test_gradients_go_back_to_the_pool(recording):
    step, _, _, optimizer = counting(recording)
    weight = optimizer.param_groups[0]["params"][0]
    for _ in range(WARMUP + 1):
        weight.grad = torch.ones(1)
        step([small_batch(0)])
    assert weight.grad is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph is recorded on a GPU")
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_recorded_step_gives_the_losses_of_the_usual_one(name):
    kernels.warmup()
    device = torch.device("cuda")
    config = resolve(TrainConfig(model=ModelConfig(name="tiny"))).optim
    results = []
    for graphed in (False, True):
        model = model_of("tiny").to(device).train()
        optimizer = make_optimizer(model, replace(config, name=name), 1e-3)
        take, told = Step(model, optimizer, clip_norm=5.0).on_device, []
        if graphed:
            take = GraphedStep(take, optimizer, device, told.append)
        found = []
        for number in range(WARMUP + 4):
            set_lr(optimizer, 2**-10)
            found.append(take([small_batch(number).to(device)]).clone())
        results.append(torch.stack(found).cpu())
        assert told == []
    # Gathers' gradients are added in any order on a GPU: the steps before amplify rounding.
    terms = 2 * 32 * 48 * (WARMUP + 4)
    torch.testing.assert_close(results[1], results[0], rtol=terms * torch.finfo(torch.float32).eps, atol=0)
