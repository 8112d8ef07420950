"""``box.cuh`` and ``scalar.cuh``, run by the emulator, against ``boxes.py`` and torch's conversions."""

from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
import torch
from cuda_on_cpu import Emulator
from torch import Tensor

from rcnn import boxes as geometry
from rcnn.kernels._launch import CudaSource

FOLDER = Path(cuda_on_cpu.__file__).parent
PROBE = CudaSource("probe", folder=FOLDER)
SCALARS = CudaSource("scalars", folder=FOLDER, dtypes=(torch.float32, torch.bfloat16, torch.float16))
HALVES = (torch.bfloat16, torch.float16)

pytestmark = pytest.mark.emulated


def run(emulator: Emulator, source: CudaSource, kernel: str, *args: object, count: int, **options: object) -> None:
    emulator.launch(source, kernel, -(-count // 128), 128, (*args, np.int32(count)), **options)


def random_boxes(count: int, seed: int) -> Tensor:
    """Boxes around the origin, a fourth as they come, hence often reversed; the coordinates have all 24 bits."""
    boxes = torch.randn(count, 4, generator=torch.Generator().manual_seed(seed)).mul_(100)
    ordered = boxes.view(count, 2, 2).sort(dim=1).values.view(count, 4)
    return torch.cat((boxes[: count // 4], ordered[count // 4 :]))


def test_area_iou_and_clip_have_the_bits_of_the_cpu(emulator: Emulator) -> None:
    a, b = random_boxes(20000, 0), random_boxes(20000, 1)
    b[:2000] = a[:2000]
    out = torch.empty(len(a))
    run(emulator, PROBE, "probe_area", a, out, count=len(a))
    assert torch.equal(out, geometry.area(a))
    run(emulator, PROBE, "probe_iou", a, b, out, count=len(a))
    assert torch.equal(out, geometry.iou(a, b))
    assert (out > 0).sum() > len(a) / 4
    clipped = torch.empty_like(a)
    run(emulator, PROBE, "probe_clip", a, clipped, np.float32(60.5), np.float32(80.25), count=len(a))
    assert torch.equal(clipped, geometry.clip(a[None], torch.tensor([[60.5, 80.25]]))[0])


def test_clip_lets_nan_and_infinity_through_as_the_cpu_does(emulator: Emulator) -> None:
    nan, inf = float("nan"), float("inf")
    boxes = torch.tensor([[nan, inf, -inf, 5.0], [-1.0, nan, 70.0, nan], [0.0, 60.0, 80.0, 61.0]])
    out = torch.empty_like(boxes)
    run(emulator, PROBE, "probe_clip", boxes, out, np.float32(60.0), np.float32(80.0), count=3)
    expected = geometry.clip(boxes[None], torch.tensor([[60.0, 80.0]]))[0]
    assert torch.equal(out.nan_to_num(nan=-7.0), expected.nan_to_num(nan=-7.0))


def test_decode_and_encode_agree_to_a_few_eps(emulator: Emulator) -> None:
    """exp and log differ by an ulp between libraries."""
    boxes = random_boxes(5000, 2).abs()
    boxes[:, 2:] += boxes[:, :2] + 1
    deltas = random_boxes(5000, 3) / 50
    deltas[:50, 2:] = 1000.0  # bounded
    out = torch.empty_like(boxes)
    weights = (10.0, 8.0, 5.0, 4.0)
    run(emulator, SCALARS, "decode", deltas, boxes, out, count=5000, dtype=torch.float32)
    expected = geometry.decode(deltas, boxes, weights)
    eps = torch.finfo(torch.float32).eps
    largest = expected.abs().amax(dim=1, keepdim=True)
    assert ((out - expected).abs() <= 4 * eps * largest).all()  # exp, two products and a sum
    targets = random_boxes(5000, 4).abs()
    targets[:, 2:] += targets[:, :2] + 1
    run(emulator, SCALARS, "encode", boxes, targets, out, count=5000, dtype=torch.float32)
    expected = geometry.encode(boxes, targets, weights)
    assert torch.equal(out[:, :2], expected[:, :2])
    assert torch.allclose(
        out[:, 2:], expected[:, 2:], rtol=2 * eps, atol=5 * 2 * eps
    )  # weight times an ulp of log near 0


def test_decode_passes_nan_on(emulator: Emulator) -> None:
    deltas = torch.zeros(4, 4).fill_diagonal_(float("nan"))
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0]]).repeat(4, 1)
    out = torch.empty_like(boxes)
    run(emulator, SCALARS, "decode", deltas, boxes, out, count=4, dtype=torch.float32)
    assert out.isnan().tolist() == [[True, False] * 2, [False, True] * 2] * 2


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_value_widens_exactly(emulator: Emulator, dtype: torch.dtype) -> None:
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype)
    out = torch.empty(1 << 16)
    run(emulator, SCALARS, "widen", values, out, count=1 << 16, dtype=dtype)
    expected = values.float()
    assert torch.equal(out.isnan(), expected.isnan())
    assert torch.equal(out.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0))


@pytest.mark.parametrize("dtype", HALVES)
def test_narrowing_rounds_to_nearest_even(emulator: Emulator, dtype: torch.dtype) -> None:
    """Every 16-bit value, the middle between it and the next, a bit to either side of the middle, and random bits."""
    exact = torch.arange(0, 1 << 16, dtype=torch.int32).to(torch.int16).view(dtype).float()
    exact = exact[exact.isfinite()].sort().values.unique()
    middle = (exact[:-1].double() + exact[1:].double()).div(2).float()
    random = torch.randint(-(1 << 31), (1 << 31) - 1, (50000,), generator=torch.Generator().manual_seed(5))
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 65519.99, 65520.0, 3.4e38, -3.4e38, 1e-45, -0.0])
    bits = middle.view(torch.int32)
    near = torch.cat((middle, (bits + 1).view(torch.float32), (bits - 1).view(torch.float32)))
    values = torch.cat((exact, near, random.to(torch.int32).view(torch.float32), special))
    out = torch.empty(len(values), dtype=dtype)
    run(emulator, SCALARS, "narrow", values, out, count=len(values), dtype=dtype)
    expected = values.to(dtype)
    assert torch.equal(out.isnan(), expected.isnan())
    finite = ~expected.isnan()
    assert torch.equal(out[finite].view(torch.int16), expected[finite].view(torch.int16))


@pytest.mark.parametrize("dtype", HALVES)
def test_nan_of_any_bits_stays_nan(emulator: Emulator, dtype: torch.dtype) -> None:
    """A GPU makes 0x7fffffff, which rounded like a number would be -0; 0x7f800001 would be infinity."""
    bits = [0x7FFFFFFF, 0x7FFF8000, 0x7FC00000, 0x7F800001, 0x7F807FFF]
    values = torch.tensor(bits + [x - 2**31 for x in bits], dtype=torch.int32).view(torch.float32)
    out = torch.empty(len(values), dtype=dtype)
    run(emulator, SCALARS, "narrow", values, out, count=len(values), dtype=dtype)
    assert out.isnan().all()


@pytest.mark.parametrize("dtype", (torch.float32, *HALVES))
def test_sixteen_bytes_at_a_time(emulator: Emulator, dtype: torch.dtype) -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(6)).to(dtype)
    out = torch.empty_like(values)
    run(emulator, SCALARS, "twice", values, out, count=values.nbytes // 16, dtype=dtype)
    assert torch.equal(out, values * 2)
