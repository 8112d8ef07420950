"""The optimiser's groups, the schedule, the moving average, and what a step that is not finite leaves alone."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from rcnn.config import OptimConfig, TrainConfig, resolve
from rcnn.engine import TARGET, Step, find_batch_size, largest_batch
from rcnn.models.faster_rcnn import FasterRCNN
from rcnn.optim import Ema, load_named_state, lr_factor, make_optimizer, named_state, scaled_lr, set_lr


def optim(**changes):
    """The tiny model's recipe with changes."""
    return resolve(TrainConfig(optim=OptimConfig(**changes))).optim


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.head = nn.Linear(4, 2)


def groups(model, config, lr=0.1):
    """Name -> learning rate and weight decay."""
    optimizer = make_optimizer(model, config, lr)
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[p]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}


def test_norms_and_biases_decay_unless_told_otherwise():
    assert set(groups(Small(), optim(weight_decay=0.25)).values()) == {(0.1, 0.25)}
    found = groups(Small(), optim(weight_decay=0.25, decay_norms=False))
    assert {name: decay for name, (_, decay) in found.items()} == {
        "trunk.0.weight": 0.25,
        "trunk.0.bias": 0.0,
        "trunk.1.weight": 0.0,
        "trunk.1.bias": 0.0,
        "head.weight": 0.25,
        "head.bias": 0.0,
    }


def test_the_longest_start_of_a_name_gives_the_learning_rate():
    model, config = Small(), optim(lr_factors={"trunk": 0.5, "trunk.1": 0.25})
    found = {name: lr for name, (lr, _) in groups(model, config, 1.0).items()}
    assert found["trunk.0.weight"] == 0.5 and found["trunk.1.bias"] == 0.25 and found["head.weight"] == 1.0
    optimizer = make_optimizer(model, config, 1.0)
    set_lr(optimizer, 8.0)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [2.0, 4.0, 8.0]
    with pytest.raises(ValueError, match=r"'trnk' begins none; did you mean trunk\?"):
        make_optimizer(model, optim(lr_factors={"trnk": 0.5}), 1.0)


def test_the_arithmetic_of_the_learning_rate_is_a_sentence():
    config = optim(lr=0.02, base_batch_size=16)
    assert scaled_lr(config, 2) == (0.0025, "learning rate 0.0025 = 0.02 x 2 images per step / 16")
    config = optim(lr=0.02, base_batch_size=16, accumulate=3)
    lr, sentence = scaled_lr(config, 2, 8)
    assert lr == 0.02 * 48 / 16
    assert sentence == ("learning rate 0.06 = 0.02 x 48 images per step / 16 (2 a batch x 8 processes x 3 accumulated)")
    assert scaled_lr(optim(lr=0.5, base_batch_size=0), 4, 2)[0] == 0.5


def test_the_cosine_starts_again_in_each_cycle():
    config = optim(schedule="cosine", warmup=0.0, cycles=2)
    shares = [lr_factor(config, step, 8, 4) for step in range(8)]
    half = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert shares == pytest.approx(half + half, abs=4 * torch.finfo(torch.float64).eps)
    assert shares[0] == shares[4] == 1.0
    one = optim(schedule="cosine", warmup=0.0)
    assert lr_factor(one, 8, 8, 4) == 0.0, "past the end it stays at zero"
    warm = optim(schedule="cosine", warmup=0.5, cycles=2)
    assert [lr_factor(warm, step, 8, 4) for step in (0, 3, 4, 6)] == pytest.approx([0.25, 1, 1, 1])


def test_the_average_follows_its_law():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema = Ema(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(3.0)
    ema.update(model, 1)  # decay min(0.5, 2 / 11)
    expected = 1 * 2 / 11 + 3 * 9 / 11
    assert ema.average["weight"].item() == pytest.approx(expected, rel=4 * torch.finfo(torch.float32).eps)
    ema.update(model, 100)
    expected = (expected + 3) / 2
    assert ema.average["weight"].item() == pytest.approx(expected, rel=8 * torch.finfo(torch.float32).eps)
    with ema.applied(model):
        assert model.weight.item() == ema.average["weight"].item()
    assert model.weight.item() == 3.0


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_the_state_goes_by_name_into_other_groups(name):
    def step(model, optimizer):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    one, other = Small(), Small()
    first = make_optimizer(one, optim(name=name), 0.1)
    step(one, first)
    second = make_optimizer(other, optim(name=name, lr_factors={"head": 0.5}), 0.1)
    assert len(second.param_groups) == 2
    other.load_state_dict(one.state_dict())
    load_named_state(other, second, copy.deepcopy(named_state(one, first)))
    for group in second.param_groups:
        group["lr"] = 0.1
    step(one, first)
    step(other, second)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


class Losses(nn.Module):
    """A loss that is NaN when the batch says so."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images, targets):
        self.mean += images.mean()
        return {"loss_a": (self.weight * images).sum(), "loss_b": self.weight.sum()}


class Fake:
    def __init__(self, *values):
        self.images, self.targets = torch.tensor(values), SimpleNamespace(boxes=torch.zeros(0, 4))

    def to(self, *_, **__):
        return self


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_changes_nothing(name, bad):
    """Neither weights nor state nor guarded buffers, on the very first step as on a later one."""
    results = []
    for batches in ([(bad, 1.0), (1.0, 2.0), (bad, 1.0), (3.0, 1.0)], [(1.0, 2.0), (3.0, 1.0)]):
        model = Losses()
        optimizer = make_optimizer(model, optim(name=name), 0.1)
        for batch in batches:
            found = Step(model, optimizer, guarded=[model.mean])([Fake(*batch)])
            losses, means, norm = found.read()
            assert losses == means or math.isnan(losses["loss_a"])
            assert losses[TARGET] == 0
            assert math.isfinite(norm) is math.isfinite(losses["loss_a"]) is math.isfinite(sum(batch))
            assert math.isfinite(losses["loss_b"])
        state = named_state(model, optimizer)["weight"]
        results.append([model.weight.detach(), model.mean, *(v for v in state.values() if isinstance(v, torch.Tensor))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_accumulated_batches_make_the_mean_gradient():
    config = optim(name="sgd", momentum=0.0, weight_decay=0.0)
    model = Losses()
    found = Step(model, make_optimizer(model, config, 1.0))([Fake(1.0, 2.0), Fake(3.0, 8.0)])
    assert model.weight.tolist() == [1 - (2 + 1), 2 - (5 + 1)]
    losses, _, norm = found.read()
    assert losses == {"loss_a": ((1 + 4) + (3 + 16)) / 2, "loss_b": 3.0, TARGET: 0.0}
    assert norm == pytest.approx(math.hypot(3, 6))


def test_the_gradient_is_cut_to_its_norm():
    model = Losses()
    optimizer = make_optimizer(model, optim(name="sgd", momentum=0.0, weight_decay=0.0), 1.0)
    Step(model, optimizer, clip_norm=0.5)([Fake(2.0, 3.0)])  # the gradient is (3, 4)
    assert model.weight.tolist() == pytest.approx([1 - 0.3, 2 - 0.4], rel=1e-6)  # torch adds 1e-6 to the norm


@pytest.mark.parametrize("most", [1, 2, 7, 8, 100])
def test_the_largest_batch_that_fits(most):
    for limit in range(most + 3):
        asked = []
        assert largest_batch(lambda n, limit=limit, asked=asked: asked.append(n) or n <= limit, most) == min(
            limit, most
        )
        assert all(1 <= n <= most for n in asked) and len(asked) == len(set(asked)) <= 2 * most.bit_length() + 1


def test_the_batch_size_cannot_be_found_on_a_cpu():
    config = resolve(TrainConfig())
    with pytest.raises(ValueError, match="loader.batch_size auto fills a GPU's memory, and this run is on cpu; give"):
        find_batch_size(FasterRCNN(config.model, ["a"]), config.optim, 8)
