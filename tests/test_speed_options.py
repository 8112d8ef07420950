"""The options of ``rcnn train`` that are there for speed: what they do to a run, and what is said where they can't."""

import pytest
import torch
from test_no_sync import batch, model_of
from test_optim import Fake, Losses, optim

from rcnn import cli, run_folder
from rcnn.checkpoint import read_state
from rcnn.data import flowers
from rcnn.engine import Step
from rcnn.optim import make_optimizer
from rcnn.precision import OVERFLOWS, LossScaler

#: A CPU takes its time for 16 bits: three steps of two small pictures.
SMALL = ["--model.min_size", "48", "--model.max_size", "64", "--loader.workers", "0", "--loader.batch_size", "2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small flower data set."""
    return flowers.write(tmp_path_factory.mktemp("data") / "flowers", count=8, seed=1)


def train(data, out, *words):
    """The newest state of a run of one epoch, or of what ``words`` say."""
    cli.main(["train", "--data", str(data), "--out", str(out), "--epochs", "1", *SMALL, *words])
    return read_state(run_folder.states(out)[-1])


@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_a_run_in_any_precision(data, tmp_path, precision):
    state = train(data, tmp_path / "run", "--precision", precision)
    assert all(value.dtype == torch.float32 for value in state["model"].values() if value.is_floating_point())
    assert all(torch.isfinite(value).all() for value in state["model"].values())
    assert (state["scaler"] is None) is (precision != "fp16")
    assert state["position"]["skipped"] == 0  # overflows are the scaler's business


def test_the_scale_is_resumed(data, tmp_path, monkeypatch):
    monkeypatch.setattr("rcnn.precision.FIRST_SCALE", 2.0**10)  # nothing overflows
    monkeypatch.setattr("rcnn.precision.INTERVAL", 2)
    first = train(data, tmp_path / "run", "--precision", "fp16")["scaler"]
    assert first["scale"] == 2.0**11 and first["good"] == 1  # three good steps
    monkeypatch.setattr("rcnn.precision.FIRST_SCALE", 1.0)
    monkeypatch.setattr("rcnn.precision.INTERVAL", 1000)
    second = train(data, tmp_path / "run", "--precision", "fp16", "--resume", "true", "--epochs", "2")["scaler"]
    assert second["scale"] == first["scale"] and second["good"] == first["good"] + 3


def test_a_recorded_step_needs_a_gpu_and_the_run_goes_on_without(data, tmp_path, capsys):
    train(data, tmp_path / "run", "--cuda_graph", "true", "--device", "cpu")
    lines = [line for line in capsys.readouterr().out.splitlines() if "cuda_graph" in line]
    assert lines == ["cuda_graph: the steps run on cpu, so all steps run as usual"]


def test_buckets_on_a_cpu(data, tmp_path):
    state = train(data, tmp_path / "run", "--loader.buckets", "true", "--device", "cpu")
    assert state["position"]["step"] == 3


def test_an_overflow_skips_the_step_and_halves_the_scale():
    scaler = LossScaler(torch.device("cpu"))
    model = Losses()
    step = Step(model, make_optimizer(model, optim(name="sgd", momentum=0.0, weight_decay=0.0), 0.5), scaler=scaler)
    scaler.scale.fill_(torch.finfo(torch.float32).max)
    losses, _, norm = step([Fake(2.0, 3.0)]).read()
    assert losses == {"loss_a": 8.0, "loss_b": 3.0, "a target box": 0.0} and norm == torch.inf
    assert model.weight.tolist() == [1.0, 2.0] and scaler.scale == torch.finfo(torch.float32).max / 2
    scaler.scale.fill_(2.0**16)
    _, _, norm = step([Fake(2.0, 3.0)]).read()
    assert norm == pytest.approx(5.0)  # the gradient, (3, 4), is that of the loss and not of the scaled one
    assert model.weight.tolist() == [-0.5, 0.0]


@pytest.mark.parametrize(("scale", "ends"), [(2.0**120, False), (2.0**127, True)])
def test_overflows_in_a_row_are_forgiven_up_to_a_number(data, tmp_path, monkeypatch, capsys, scale, ends):
    monkeypatch.setattr("rcnn.precision.FIRST_SCALE", scale)
    monkeypatch.setattr("rcnn.training.OVERFLOWS", 2)
    words = ["--precision", "fp16"]
    if not ends:
        monkeypatch.setattr("rcnn.precision.LossScaler.update", lambda self, finite: self.scale.fill_(2.0**10))
        state = train(data, tmp_path / "run", *words)
        assert state["position"]["skipped"] == 0
        return
    with pytest.raises(SystemExit) as end:
        train(data, tmp_path / "run", *words)
    assert end.value.code == 1
    assert "the gradient is not finite at step 3" in capsys.readouterr().err
    assert OVERFLOWS > 16  # from the first scale down to 1


@pytest.mark.parametrize("name", ["tiny", "vgg16"])
def test_maps_in_either_order_give_the_same_losses(name):
    model = model_of(name).eval()
    images, targets = batch()
    losses = []
    for on in (True, False):
        model.use_channels_last(on)
        weight = next(p for p in model.backbone.parameters() if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1)
        assert weight.is_contiguous(memory_format=torch.channels_last) is on
        features = model._features(images)
        assert all(one.is_contiguous(memory_format=model.backbone.memory_format) for one in features)
        with torch.no_grad():
            losses.append(model(images, targets))
    # The longest sums are those of the hidden layer over 49 cells of all channels.
    terms = model.roi_heads.box_head.fc6.in_features
    for key, loss in losses[0].items():
        assert losses[1][key].item() == pytest.approx(loss.item(), rel=terms * torch.finfo(torch.float32).eps)


def test_compiled_layers_keep_names_and_give_the_same_losses(monkeypatch):
    compiled = []
    compiler = torch.compile

    def told(target, **settings):
        compiled.append(target)
        return compiler(target, backend="aot_eager", **settings)  # the graphs, without minutes of code generation

    monkeypatch.setattr(torch, "compile", told)
    model = model_of("tiny").eval()
    names = list(model.state_dict())
    images, targets = batch()
    expected = model(images, targets)
    model.compile_layers()
    found = model(images, targets)
    assert len(compiled) == 4 and list(model.state_dict()) == names
    terms = model.roi_heads.box_head.fc6.in_features
    for key, loss in expected.items():
        assert found[key].item() == pytest.approx(loss.item(), rel=terms * torch.finfo(torch.float32).eps)
    sum(found.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
