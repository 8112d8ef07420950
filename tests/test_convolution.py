"""Convolution, bias, residual and ReLU in one pass: the same values and gradients as one after the other."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rcnn.models import convolution
from rcnn.models.convolution import conv_relu, stem_relu

CASES = [
    ((2, 8, 9, 7), (16, 8, 3, 3), (1, 1), (1, 1), False),
    ((2, 8, 9, 7), (16, 8, 1, 1), (2, 2), (0, 0), False),
    ((1, 16, 6, 5), (16, 16, 3, 3), (1, 1), (1, 1), True),
    ((1, 3, 16, 16), (8, 3, 7, 7), (2, 2), (3, 3), False),
]


def inputs(case: tuple, dtype: torch.dtype, device: str) -> tuple[list[Tensor], tuple, tuple]:
    shape, weight_shape, stride, padding, added = case
    random = torch.Generator().manual_seed(0)
    shapes = [shape, weight_shape, (weight_shape[0],)]
    if added:
        shapes.append((shape[0], weight_shape[0], *shape[2:]))
    tensors = [torch.randn(each, generator=random, dtype=torch.float64).to(device, dtype) for each in shapes]
    tensors = [x.to(memory_format=torch.channels_last) if x.dim() == 4 else x for x in tensors]
    return [x.requires_grad_() for x in tensors], stride, padding


def plain(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, stride: tuple, padding: tuple) -> Tensor:
    out = F.conv2d(x, weight, bias, stride, padding)
    return F.relu(out if residual is None else out + residual)


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of_the_parts(case: tuple) -> None:
    tensors, stride, padding = inputs(case, torch.float64, "cpu")
    x, weight, bias, *rest = tensors
    residual = rest[0] if rest else None
    found = conv_relu(x, weight, bias, stride, padding, None if residual is None else residual * 1)
    expected = plain(x, weight, bias, residual, stride, padding)
    assert torch.equal(found, expected)
    grad = torch.randn(found.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for one, other in zip(
        torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2), (0, 1, 2)])
def test_the_backward_of_the_fused_form(case: tuple, frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward needs cuDNN; the parts stand in for it."""
    monkeypatch.setattr(convolution, "_forward", plain)
    tensors, stride, padding = inputs(case, torch.float64, "cpu")
    for number in frozen:
        tensors[number].requires_grad_(False)
    x, weight, bias, *rest = tensors
    residual = rest[0] if rest else None
    out = convolution._ConvReLU.apply(x, weight, bias, residual, stride, padding)
    assert torch.equal(out, plain(x, weight, bias, residual, stride, padding))
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    assert out.requires_grad == bool(wanted)
    if wanted:
        grad = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = torch.autograd.grad(plain(x, weight, bias, residual, stride, padding), wanted, grad)
        for one, other in zip(torch.autograd.grad(out, wanted, grad), expected, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("size", [(16, 20), (2, 2), (30, 6)])
def test_the_stem_over_pairs_of_rows_and_columns(size: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=random, dtype=torch.float64).to(memory_format=torch.channels_last)
    weight, bias = (torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((8, 3, 7, 7), (8,)))
    weight.requires_grad_()
    expected = plain(x, weight, bias, None, (2, 2), (3, 3))
    assert torch.equal(stem_relu(x, weight, bias), expected)
    pixels, rearranged = convolution._rearranged(x, weight)
    assert pixels.is_contiguous(memory_format=torch.channels_last)
    found = plain(pixels, rearranged, bias, None, (1, 1), (0, 0))
    torch.testing.assert_close(found, expected)
    grad = torch.randn(found.shape, generator=random, dtype=torch.float64)
    (ours,), (theirs,) = (torch.autograd.grad(out, weight, grad) for out in (found, expected))
    torch.testing.assert_close(ours, theirs)


def test_what_cudnn_refuses_is_computed_in_parts_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def refuse(*_: object) -> Tensor:
        calls.append(1)
        raise RuntimeError("no engine")

    class OnGpu(Tensor):
        is_cuda = True

    monkeypatch.setattr(convolution, "_forward", refuse)
    monkeypatch.setattr(convolution, "refused", refused := set())
    (x, weight, bias), stride, padding = inputs(CASES[0], torch.bfloat16, "cpu")
    for _ in range(2):
        found = conv_relu(x.as_subclass(OnGpu), weight, bias, stride, padding)
        assert torch.equal(found.as_subclass(Tensor), plain(x, weight, bias, None, stride, padding))
    assert len(calls) == len(refused) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_cudnn_gives_the_values_of_the_parts(case: tuple, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, stride, padding = inputs(case, dtype, "cuda")
    monkeypatch.setattr(convolution, "refused", refused := set())
    x, weight, bias, *rest = tensors
    residual = rest[0] if rest else None
    found = conv_relu(x, weight, bias, stride, padding, residual)
    assert found.dtype == dtype
    assert type(found.grad_fn).__name__ == "_ConvReLUBackward" and not refused
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    expected = plain(*exact[:3], exact[3] if rest else None, stride, padding)
    eps = torch.finfo(dtype).eps
    assert (found - expected).norm() <= eps * expected.norm()  # float32 sums, rounded once
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to("cuda", dtype)
    # ReLU's corner: a sum near 0, whose sign depends on the order of its terms, has a gradient in one only.
    sizes = [tensor.abs() for tensor in exact]
    terms = weight[0].numel() + 2
    near = terms * torch.finfo(torch.float32).eps * plain(*sizes[:3], sizes[3] if rest else None, stride, padding)
    before = F.conv2d(*exact[:3], stride, padding) + (exact[3] if rest else 0)
    grad = torch.where(before.abs() <= near, 0, grad)
    for one, other in zip(
        torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, exact, grad.double()), strict=True
    ):
        assert (one - other).norm() <= 2 * eps * other.norm()  # rounded once, and once more where a sum is split


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN needs a GPU")
@pytest.mark.parametrize("size", [(64, 96), (63, 96)])
def test_the_stem_on_a_gpu(size: tuple[int, int]) -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, *size, generator=random).cuda()
    weight, bias = (torch.randn(shape, generator=random).cuda() for shape in ((64, 3, 7, 7), (64,)))
    weight = weight.to(memory_format=torch.channels_last)
    with torch.autocast("cuda", torch.bfloat16):
        found = stem_relu(x, weight, bias)
    half = [tensor.bfloat16().double() for tensor in (x, weight, bias)]
    expected = plain(*half, None, (2, 2), (3, 3))
    assert found.dtype == torch.bfloat16
    assert (found - expected).norm() <= torch.finfo(torch.bfloat16).eps * expected.norm()
