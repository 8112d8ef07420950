"""Nothing between the images and the updated weights, or the padded detections, waits for the device.

On the CPU the emulated kernels stand in for the CPU bodies, so that the step is the one that a GPU runs, and every call
that would make the host wait there is refused. On a GPU torch itself watches.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from test_convolution import plain
from test_models import make_targets
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rcnn.config import RECIPES, ModelConfig, Precision, RoIConfig, RPNConfig, TrainConfig, resolve
from rcnn.data.batch import Batch
from rcnn.detector import build
from rcnn.engine import TARGET, Step, StepResult
from rcnn.models import convolution
from rcnn.models.faster_rcnn import FasterRCNN
from rcnn.models.resnet import Norm
from rcnn.optim import make_optimizer
from rcnn.precision import LossScaler
from rcnn.structures import Targets

HEIGHT, WIDTH = 64, 96

#: Operators whose result's shape or value must reach the host before the next line runs.
WAITING = {
    "_local_scalar_dense", "is_nonzero", "equal", "nonzero", "nonzero_numpy", "argwhere", "masked_select",
    "masked_scatter", "bincount", "_unique", "_unique2", "unique_dim", "unique_consecutive", "unique_dim_consecutive",
    "allclose", "histc",
}  # fmt: skip
#: Each model, and a ResNet whose norms are folded into its convolutions, as they are with published weights.
MODELS = [*((name, None) for name in RECIPES), ("resnet50_fpn", "frozen")]
#: What takes a value from the device to the host, and what takes one there through memory that is not pinned.
READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")
WRITES = ((torch, "tensor"), (torch, "as_tensor"), (torch, "asarray"), (torch, "from_numpy"), (Tensor, "new_tensor"))


class Waits(AssertionError):
    """A call that waits for the device."""


class _Watch(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in WAITING or (name == "repeat_interleave" and isinstance(args[-1], Tensor)):
            raise Waits(f"{func} waits for the device")
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        ):
            raise Waits(f"{func} with a mask waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_waiting() -> Iterator[None]:
    """Within it a call that waits for the device raises."""
    if torch.cuda.is_available():
        refused_before = set(convolution.refused)
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert convolution.refused == refused_before, "torch's error came where a convolution falls back"
        return

    def refused(name: str) -> Callable[..., Any]:
        def call(*_: Any, **__: Any) -> Any:
            raise Waits(f"{name} waits for the device")

        return call

    move = Tensor.to

    def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        places = any(isinstance(x, str | torch.device) for x in (*args, kwargs.get("device")))
        own = sys._getframe(1).f_globals["__name__"].startswith("torch.")  # clip_grad_norm_: norms to where they are
        if places and not own and not kwargs.get("non_blocking"):
            raise Waits(f"to{args} waits for the device")
        return move(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, _Watch():
        for name in READS:
            patch.setattr(Tensor, name, refused(name))
        for owner, name in WRITES:
            patch.setattr(owner, name, refused(name))
        patch.setattr(Tensor, "to", to)
        yield


def model_of(name: str, norm: Norm | None = None) -> FasterRCNN:
    """A model with every part, and few regions: an emulated thread takes its time."""
    torch.manual_seed(0)
    rpn = RPNConfig(
        pre_nms_top_n_train=100, post_nms_top_n_train=40, pre_nms_top_n_test=60, post_nms_top_n_test=20,
        batch_size_per_image=64,
    )  # fmt: skip
    roi = RoIConfig(batch_size_per_image=16, dropout=0.0)
    config = ModelConfig(name=name, norm=norm, frozen_stages=0, min_size=HEIGHT, max_size=WIDTH, rpn=rpn, roi=roi)
    return build(config, ["a", "b"])


def batch() -> tuple[Tensor, Targets]:
    """Two images, the second smaller; two objects and an ignored region in the first, none in the second."""
    images = torch.randint(0, 256, (2, 3, HEIGHT, WIDTH), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    boxes = [[[8, 8, 40, 40], [30, 20, 90, 60], [0, 50, 20, 64]], []]
    return images, make_targets(boxes, [[1, 2, -1], []], [(64, 96), (50, 80)], capacity=3)


def place() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """Where the kernels run: on a GPU, or else in the emulator, with the parts of a fused convolution in its place."""
    if not torch.cuda.is_available():
        request.getfixturevalue("emulator")
        monkeypatch.setattr(convolution, "_fits", lambda x, ordered: True)
        monkeypatch.setattr(convolution, "_forward", plain)
    return place()


@pytest.mark.emulated
@pytest.mark.parametrize(("name", "norm"), MODELS)
def test_detection_waits_for_nothing_before_it_is_unpadded(name: str, norm: Norm | None, kernels: torch.device) -> None:
    model = model_of(name, norm).to(kernels).eval()
    images, targets = batch()
    images, sizes = images.to(kernels), targets.image_sizes.to(kernels)
    for number in range(2):
        with no_waiting() if number or not images.is_cuda else _nothing():
            found = model.detect(images, sizes)
            whole = model.detect(images)
    assert found.boxes.shape == whole.boxes.shape == (2, 100, 4)
    assert all((one["boxes"][:, 2] <= width).all() for one, width in zip(found.unpad(), (96, 80), strict=True))


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def gradient(model: FasterRCNN) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of the batch."""
    images, targets = batch()
    losses = model(images, targets)
    torch.stack(list(losses.values())).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {name: loss.item() for name, loss in losses.items()}, gradients


def one_step(model: FasterRCNN, device: torch.device, precision: Precision = "fp32", batches: int = 1) -> StepResult:
    """The result of a step under watch, which leaves the weights where they are."""
    config = resolve(TrainConfig(model=ModelConfig(name="tiny"))).optim
    model.to(device).train()
    guarded = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    scaler = LossScaler(device) if precision == "fp16" else None
    clip = 0.0 if batches == 1 else 5.0
    step = Step(model, make_optimizer(model, config, 0.0), clip, guarded, precision, scaler)
    given = [Batch(images, targets, [0, 1], torch.ones(2, 2), []).to(device) for images, targets in [batch()] * batches]
    if device.type == "cuda":
        step.on_device(given)  # kernels are compiled, anchors are made
        model.step.zero_()
    with no_waiting():
        return step(given)


@pytest.mark.emulated
@pytest.mark.parametrize(("name", "norm"), MODELS)
def test_a_step_waits_for_nothing_and_has_the_losses_and_gradients_of_the_cpu(
    name: str, norm: Norm | None, request: pytest.FixtureRequest
) -> None:
    model = model_of(name, norm)
    expected, slopes = gradient(model)
    model.step.zero_()
    device = request.getfixturevalue("kernels")
    found, _, _ = one_step(model, device).read()
    assert found.pop(TARGET) == 0 and all(value > 0 for value in found.values())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert gradients.keys() == slopes.keys()
    if device.type == "cuda":
        return  # other convolutions; that the ops agree is for their own tests to say
    # The longest sum goes over the cells of the batch on the trunk's first map, half the images' size.
    tolerance = 2 * (HEIGHT // 2) * (WIDTH // 2) * torch.finfo(torch.float32).eps
    assert found == pytest.approx(expected, rel=tolerance)
    if norm == "frozen":
        return  # random weights that nothing normalises: the last bit of a sum can move gradients by a thousandth
    whole, other = (torch.cat([one[key].flatten() for key in slopes]) for one in (gradients, slopes))
    assert (whole - other).norm() <= tolerance * other.norm()


@pytest.mark.emulated
@pytest.mark.parametrize("precision", ["tf32", "bf16", "fp16"])
def test_a_step_of_two_batches_in_any_precision_waits_for_nothing(precision: Precision, kernels: torch.device) -> None:
    losses, means, norm = one_step(model_of("tiny"), kernels, precision, batches=2).read()
    assert losses == means and all(np.isfinite([*losses.values(), norm])) and norm > 0


class _Slope(torch.autograd.Function):
    """Waits on the way back."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, slope: Tensor) -> Tensor:  # type: ignore[override]
        return slope * len(slope.nonzero())


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch watches")
def test_the_watch_sees_the_way_back() -> None:
    x = torch.ones(3, requires_grad=True)
    with no_waiting(), pytest.raises(Waits):
        _Slope.apply(x).sum().backward()  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    "call",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x.to(device="cpu", dtype=torch.float64),
        lambda x: x.numpy(),
        lambda x: float(x.sum()),
        lambda x: int(x.sum()),
        lambda x: bool(x.any()),
        lambda x: 1 if x.any() else 0,
        lambda x: x.nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.index_put_((x > 0,), torch.ones(())),
        lambda x: x.unique(),
        lambda x: x.unique_consecutive(),
        lambda x: torch.equal(x, x),
        lambda x: torch.ones(3).repeat_interleave(x.long()),
        lambda x: x.new_tensor(1.0),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.asarray([1.0], device=x.device),
        lambda x: torch.bincount(x.long()),
        lambda x: torch.allclose(x, x),
        lambda x: torch.histc(x),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="torch watches")
def test_the_watch_sees(call: Callable[[Tensor], Any]) -> None:
    with no_waiting(), pytest.raises(Waits):
        call(torch.arange(3.0))


def test_the_watch_lets_the_rest_through() -> None:
    x = torch.arange(3.0, device=place())
    index = torch.tensor([2, 0], device=place())
    with no_waiting():
        y = torch.where(x > 0, x, 0.0)[index].to(torch.float16).to(x.device, non_blocking=True)
    assert y.tolist() == [2, 0]
