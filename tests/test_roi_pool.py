"""RoI pooling against the oracle, by hand on rounding, ties and empty bins, its gradient and its layouts."""

import importlib
import itertools
import math

import pytest
import reference
import torch
from torch import Tensor

from rcnn.kernels.roi_pool import roi_pool

LAST = torch.channels_last


def random_regions(count: int, images: int, side: int, seed: int) -> Tensor:
    """Corners in quarters of a pixel, so that halves are met and scaled exactly; some reversed, some off the map."""
    generator = torch.Generator().manual_seed(seed)
    corners = torch.randint(-2 * side, 6 * side, (count, 4), generator=generator) / 4
    corners[::3, 2:] = corners[::3, :2] + torch.randint(0, 2 * side, (len(corners[::3]), 2), generator=generator) / 4
    return torch.cat((torch.randint(0, images, (count, 1), generator=generator), corners), dim=1)


def random_map(shape: tuple[int, ...], seed: int) -> Tensor:
    """Small whole numbers, so that ties are many."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("shape", [(2, 3, 9, 13), (1, 2, 1, 1), (1, 1, 1, 7), (3, 1, 12, 2)])
@pytest.mark.parametrize("size", [(1, 1), (4, 2), (8, 8)])
def test_agrees_with_the_oracle(
    size: tuple[int, int], shape: tuple[int, ...], layout: torch.memory_format, device: torch.device
) -> None:
    # Bins are 1, 2, 4, 8: their borders are exact in float32 and the whole-number oracle draws them too.
    maps = random_map(shape, seed=1).to(device, memory_format=layout).requires_grad_()
    rois = random_regions(25, shape[0], 2 * max(shape[2:]), seed=2).to(device)
    output = roi_pool(maps, rois, size, 0.5)
    grad = torch.randint(-8, 9, output.shape, generator=torch.Generator().manual_seed(3)).float()
    output.backward(grad.to(device))
    values, expected_grad = [], torch.zeros(shape)
    for r, roi in enumerate(rois.tolist()):
        value, cells = reference.roi_pool(maps[int(roi[0])].tolist(), roi[1:], size, 0.5)
        values.append(value)
        for c, plane in enumerate(cells):
            for i, row in enumerate(plane):
                for j, cell in enumerate(row):
                    if cell is not None:
                        expected_grad[int(roi[0]), c, cell[0], cell[1]] += grad[r, c, i, j]
    assert torch.equal(output.cpu(), torch.tensor(values))
    assert maps.grad is not None
    # Equal: sums of small whole numbers.
    assert torch.equal(maps.grad.cpu(), expected_grad)
    with torch.no_grad():
        assert torch.equal(roi_pool(maps, rois, size, 0.5), output)
    assert torch.equal(roi_pool(maps.detach(), rois, size, 0.5), output)
    # The two layouts of a single cell are the same.
    assert output.is_contiguous(memory_format=layout if max(shape[2:]) > 1 else torch.contiguous_format)


def test_halves_are_rounded_away_from_zero(device: torch.device) -> None:
    ramp = torch.arange(8.0, device=device).expand(1, 1, 8, 8)
    for corner, value in ((2.5, 3.0), (3.5, 4.0), (0.5, 1.0), (0.4999999701976776, 0.0)):
        assert roi_pool(ramp, torch.tensor([[0, 0, 0, corner, 0]], device=device), 1).item() == value
    # From -0.5, which is -1, two cells up to 0: the bins are the cells -1, off the map, and 0.
    roi = torch.tensor([[0, -0.5, 0, 0, 0]], device=device)
    assert roi_pool(ramp + 5, roi, (1, 2)).flatten().tolist() == [0.0, 5.0]


def test_bins_share_a_border_cell(device: torch.device) -> None:
    ramp = torch.arange(3.0, device=device).expand(1, 1, 1, 3).clone().requires_grad_()
    # Three cells in two bins: floor(0) to ceil(1.5) and floor(1.5) to ceil(3).
    output = roi_pool(ramp, torch.tensor([[0.0, 0, 0, 2, 0]], device=device), (1, 2))
    assert output.flatten().tolist() == [1.0, 2.0]
    output.sum().backward()
    assert ramp.grad is not None and ramp.grad.flatten().tolist() == [0.0, 1.0, 1.0]


def test_borders_are_rounded_to_float32(device: torch.device) -> None:
    # In float32 7 * (57 / 7) is 57.000004: the last bin takes the cell that follows the region. 7 * (56 / 7) is 56.
    ramp = torch.arange(60.0, device=device).expand(1, 1, 1, 60).clone().requires_grad_()
    for last, value in ((55.0, 55.0), (56.0, 57.0)):
        output = roi_pool(ramp, torch.tensor([[0.0, 0, 0, last, 0]], device=device), (1, 7))
        assert output[..., -1].item() == value
        (grad,) = torch.autograd.grad(output[..., -1].sum(), ramp)
        assert grad.nonzero()[:, 3].tolist() == [value]


def test_the_first_of_equal_cells_takes_the_gradient(device: torch.device) -> None:
    maps = torch.ones(1, 1, 4, 4, device=device, requires_grad=True)
    roi_pool(maps, torch.tensor([[0.0, 1, 1, 3, 3]], device=device), 1).sum().backward()
    assert maps.grad is not None and maps.grad.nonzero().tolist() == [[0, 0, 1, 1]]


def test_bins_off_the_map_give_zero_and_pass_nothing_on(device: torch.device) -> None:
    maps = torch.full((2, 2, 4, 4), -3.0, device=device, requires_grad=True)
    rois = torch.tensor([[1.0, 10, 10, 20, 20], [1, -20, 0, -10, 3], [0, 0, 0, 3, 3]], device=device)
    output = roi_pool(maps, rois, 2)
    assert not output[:2].any()
    assert (output[2] == -3).all()
    output.sum().backward()
    assert maps.grad is not None
    assert not maps.grad[1].any()
    assert maps.grad[0].sum() == 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_that_are_not_finite(dtype: torch.dtype, device: torch.device) -> None:
    maps = torch.tensor([[math.nan, 1.0], [math.nan, math.inf], [math.nan, math.nan], [-math.inf, math.nan]])
    maps = maps.view(4, 1, 1, 2).to(device, dtype).requires_grad_()
    rois = torch.tensor([[b, 0.0, 0, 1, 0] for b in range(4)], device=device)
    output, lowest = roi_pool(maps, rois, 1), torch.finfo(dtype).min
    assert output.flatten().tolist() == [1.0, math.inf, lowest, lowest]
    assert torch.equal(roi_pool(maps.detach(), rois, 1), output)
    output.sum().backward()
    assert maps.grad is not None and maps.grad.nonzero()[:, [0, 3]].tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_regions_that_are_not_finite_give_zeros(value: float, device: torch.device) -> None:
    maps = torch.ones(1, 1, 4, 4, device=device, requires_grad=True)
    for column in range(1, 5):
        rois = torch.tensor([[0.0, 0, 0, 3, 3]], device=device)
        rois[0, column] = value
        output = roi_pool(maps, rois, 2)
        assert not output.any()
        (grad,) = torch.autograd.grad(output.sum(), maps)
        assert not grad.any()


def test_regions_that_scaling_makes_infinite_give_zeros(device: torch.device) -> None:
    maps = torch.ones(1, 1, 4, 4, device=device, requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, 3, 3e38], [0, -2e38, 0, 2e38, 3], [0, 1, 1, 2, 2]], device=device)
    output = roi_pool(maps, rois, 2, 1.5)
    assert output.flatten(1).sum(dim=1).tolist() == [0, 0, 4]
    output[:2].sum().backward()
    assert maps.grad is not None and not maps.grad.any()


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_no_channels(layout: torch.memory_format, device: torch.device) -> None:
    maps = torch.zeros(1, 0, 4, 4, device=device).to(memory_format=layout).requires_grad_()
    output = roi_pool(maps, torch.tensor([[0.0, 0, 0, 3, 3]], device=device), (2, 3))
    assert output.shape == (1, 0, 2, 3)
    output.sum().backward()
    assert maps.grad is not None and maps.grad.shape == maps.shape


def test_double_precision() -> None:
    maps, rois = random_map((2, 3, 9, 9), seed=4), random_regions(10, 2, 9, seed=5)
    output = roi_pool(maps.double(), rois, 3)
    assert output.dtype == torch.float64
    assert torch.equal(output, roi_pool(maps, rois, 3).double())
    # 7 * (57 / 7) is 57 in float64, and the last bin ends with the region.
    ramp = torch.arange(60.0, dtype=torch.float64).expand(1, 1, 1, 60)
    assert roi_pool(ramp, torch.tensor([[0.0, 0, 0, 56, 0]]), (1, 7))[..., -1].item() == 56


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    maps = random_map((2, 3, 9, 9), seed=4).to(device, dtype).requires_grad_()
    wide = maps.detach().float().requires_grad_()
    rois = random_regions(10, 2, 9, seed=5).to(device)
    output, expected = roi_pool(maps, rois, 3), roi_pool(wide, rois, 3)
    assert output.dtype == dtype
    assert torch.equal(output, expected.to(dtype))
    output.sum().backward()
    expected.sum().backward()
    assert maps.grad is not None and wide.grad is not None
    assert torch.equal(maps.grad, wide.grad.to(dtype))


def test_gradient() -> None:
    generator = torch.Generator().manual_seed(6)
    # A permutation: no two values are so near that a step of the check changes the maximum.
    maps = torch.randperm(2 * 2 * 5 * 6, generator=generator).double().view(2, 2, 5, 6).requires_grad_()
    rois = random_regions(8, 2, 6, seed=6)
    assert torch.autograd.gradcheck(lambda x: roi_pool(x, rois, (2, 3)), maps)


def test_many_regions_of_all_sizes() -> None:
    maps = random_map((2, 70, 40, 40), seed=7)
    rois = random_regions(90, 2, 40, seed=8)
    whole = roi_pool(maps, rois, 7)
    assert torch.equal(whole, torch.cat([roi_pool(maps, roi[None], 7) for roi in rois]))


@pytest.mark.parametrize("height, width", [(1, 400), (33, 31), (31, 33), (32, 32), (180, 14), (32_767, 1), (40_000, 1)])
def test_any_cell_of_a_large_bin_can_win(height: int, width: int) -> None:
    cells = height * width
    # Each channel has its largest value elsewhere: together in all cells, or in some where those would be too many.
    channels = cells if cells <= 2520 else 40
    winner = torch.linspace(0, cells - 1, channels).long()
    x = torch.zeros(channels, cells)
    x[torch.arange(channels), winner] = 1
    x = x.view(1, channels, height, width).requires_grad_()
    output = roi_pool(x, torch.tensor([[0.0, 0.0, 0.0, width - 1.0, height - 1.0]]), 1)
    assert output.flatten().tolist() == [1] * channels
    (grad,) = torch.autograd.grad(output.sum(), x)
    assert torch.equal(grad, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_the_order_of_values_on_a_cpu(layout: torch.memory_format, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    # By falling value; of 0 and -0, which are equal, the first takes the gradient.
    values = [
        math.inf,
        info.max,
        1 + info.eps,
        1.0,
        info.tiny,
        0.0,
        -0.0,
        -info.tiny,
        -1.0,
        -1 - info.eps,
        info.min / 2,
    ]
    for first, second in itertools.combinations(range(len(values)), 2):
        for pair, winner in (((first, second), 0), ((second, first), int({first, second} != {5, 6}))):
            line = torch.tensor([values[i] for i in pair], dtype=dtype)
            maps = torch.stack((line, -torch.ones_like(line))).view(1, 2, 1, 2).contiguous(memory_format=layout)
            output = roi_pool(maps.requires_grad_(), torch.tensor([[0.0, 0, 0, 1, 0]]), 1)
            assert output.flatten().tolist() == [values[first], -1]
            (grad,) = torch.autograd.grad(output[0, 0], maps)
            assert grad.flatten().nonzero().item() == winner


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
@pytest.mark.parametrize("limit", ["POOLED", "READ"])
def test_regions_a_few_at_a_time(limit: str, layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = random_map((2, 5, 12, 17), seed=9).contiguous(memory_format=layout).requires_grad_()
    rois = random_regions(30, 2, 17, seed=10)
    results = []
    for most in (1 << 20, 500, 1):
        monkeypatch.setattr(importlib.import_module("rcnn.kernels.roi_pool"), limit, most)
        output = roi_pool(maps, rois, (3, 4))
        results.append((output, *torch.autograd.grad(output.sum(), maps)))
    for few in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(few, results[0], strict=True))


def test_list_of_boxes_and_no_region(device: torch.device) -> None:
    maps = torch.randn(2, 2, 9, 9, device=device, requires_grad=True)
    rois = torch.tensor([[1.0, 1, 2, 5, 7]], device=device)
    box = rois[:, 1:]
    assert torch.equal(roi_pool(maps, [box[:0], box], 3), roi_pool(maps, rois, 3))
    output = roi_pool(maps, rois[:0], (3, 2))
    assert output.shape == (0, 2, 3, 2)
    output.sum().backward()
    assert maps.grad is not None and not maps.grad.any()


def test_refuses() -> None:
    maps, rois = torch.zeros(2, 3, 4, 4), torch.zeros(1, 5)
    with pytest.raises(ValueError, match=r"input must have shape \(B, C, H, W\) with H, W > 0, got \(3, 4, 4\)"):
        roi_pool(maps[0], rois, 7)
    with pytest.raises(ValueError, match=r"boxes must have shape \(R, 5\), got \(1, 4\)"):
        roi_pool(maps, rois[:, 1:], 7)
    with pytest.raises(ValueError, match=r"boxes must name images 0\.\.1, got 2.0\.\.2.0"):
        roi_pool(maps, rois + 2, 7)
    with pytest.raises(ValueError, match="output_size must be one or two positive integers, got 0"):
        roi_pool(maps, rois, 0)
    with pytest.raises(ValueError, match=r"boxes must not require a gradient: roi_pool has none for them, pass boxes"):
        roi_pool(maps, rois.requires_grad_(), 7)
