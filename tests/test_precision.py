"""Precision: what the layers compute in, what the ops are given, and the scale of the loss in float16."""

import pytest
import torch
from test_no_sync import batch, model_of
from torch.utils._python_dispatch import TorchDispatchMode

from rcnn.kernels import _launch
from rcnn.precision import DTYPES, FIRST_SCALE, INTERVAL, LossScaler, computing

CPU = torch.device("cpu")


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", False), ("tf32", True), ("bf16", True), ("fp16", True)])
def test_within_it_layers_compute_in_it_and_then_all_is_as_before(precision, tf32):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    x = torch.ones(2, 2)
    with computing(precision, CPU):
        assert (x @ x).dtype == DTYPES.get(precision, torch.float32)
        assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (tf32, tf32)
    assert (x @ x).dtype == torch.float32
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == before


def test_the_scale_halves_after_an_overflow_and_doubles_after_many_good_steps():
    scaler = LossScaler(CPU)
    no, yes = torch.tensor(False), torch.tensor(True)
    scaler.update(no)
    assert scaler.scale == FIRST_SCALE / 2 and scaler.good == 0
    for _ in range(INTERVAL - 1):
        scaler.update(yes)
    assert scaler.scale == FIRST_SCALE / 2 and scaler.good == INTERVAL - 1
    scaler.update(yes)
    assert scaler.scale == FIRST_SCALE and scaler.good == 0
    for _ in range(3):
        scaler.update(yes)
    scaler.update(no)
    assert scaler.scale == FIRST_SCALE / 2 and scaler.good == 0


def test_scaled_gradients_come_back():
    scaler = LossScaler(CPU)
    w = torch.tensor([3.0, -2.0], requires_grad=True)
    ((w * w).sum() * scaler.scale).backward()
    scaler.unscale([w.grad])
    assert w.grad.tolist() == [6.0, -4.0]  # powers of two: exactly


def test_the_state_goes_into_a_checkpoint_and_back():
    first, second = LossScaler(CPU), LossScaler(CPU)
    first.update(torch.tensor(False))
    first.update(torch.tensor(True))
    second.load(first.state())
    assert second.scale == first.scale == FIRST_SCALE / 2 and second.good == first.good == 1


class _Casts(TorchDispatchMode):
    """Numbers of elements that are cast from 16 bits to float32."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func.name() == "aten::_to_copy" and args[0].dtype in DTYPES.values() and result.dtype == torch.float32:
            self.sizes.append(args[0].shape)
        return result


@pytest.mark.emulated
@pytest.mark.parametrize("name", ["tiny", "vgg16"])
@pytest.mark.parametrize("precision", list(DTYPES))
def test_ops_take_16_bit_maps_and_head_outputs_as_they_are(name, precision, emulator, monkeypatch):
    given = {}

    def launch(source, kernel, grid, block, args, *, dtype=None, shared=0):
        given.setdefault(source.name, set()).add(dtype)
        return run(source, kernel, grid, block, args, dtype=dtype, shared=shared)

    run = _launch.launch
    monkeypatch.setattr(_launch, "launch", launch)
    model = model_of(name)
    images, targets = batch()
    with computing(precision, CPU):
        features = model._features(images)
        assert {feature.dtype for feature in features} == {DTYPES[precision]}
        with _Casts() as casts:
            losses, _ = model._losses(features, targets)
        found = model.eval().detect(images)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())
    assert found.boxes.dtype == torch.float32
    op = "roi_pool" if name == "vgg16" else "roi_align"
    assert {key: given[key] for key in ("proposals", op, "detections")} == dict.fromkeys(
        ("proposals", op, "detections"), {DTYPES[precision]}
    )
    # What becomes float32 is what the losses gather: samples, neither maps nor all anchors nor pooled regions.
    samples = model.config.rpn.batch_size_per_image, model.config.roi.batch_size_per_image
    most = max(2 * samples[0] * 4, 2 * samples[1] * 3 * 4)
    assert casts.sizes and all(shape.numel() <= most for shape in casts.sizes), casts.sizes


@pytest.mark.parametrize("name", ["tiny", "vgg16"])
def test_bf16_losses_are_near_those_of_float32(name):
    losses = {}
    for precision in ("fp32", "bf16"):
        model = model_of(name).eval()  # evaluation: the same sampling
        images, targets = batch()
        with torch.no_grad(), computing(precision, CPU):
            losses[precision] = model(images, targets)
    # The anchors in the loss are the same in both, and each layer before it rounds its output once. (The other two
    # losses are of proposals, which may differ.)
    layers = [*model.backbone.modules(), *model.rpn.modules()]
    count = sum(isinstance(layer, torch.nn.Conv2d | torch.nn.BatchNorm2d) for layer in layers)
    for key in ("loss_objectness", "loss_rpn_box_reg"):
        eps = count * torch.finfo(torch.bfloat16).eps
        assert losses["bf16"][key] == pytest.approx(losses["fp32"][key].item(), rel=eps)
