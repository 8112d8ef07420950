"""RoI Align against the oracle, by hand at the border of the map, its gradient and its layouts."""

import math
import re

import pytest
import reference
import torch
from torch import Tensor

from rcnn.kernels import roi_align as module_function
from rcnn.kernels import roi_align_cpu
from rcnn.kernels.roi_align import multiscale_roi_align, roi_align
from rcnn.kernels.roi_align_cpu import FAR
from rcnn.kernels.roi_pool import roi_pool

LAST = torch.channels_last
EPS = torch.finfo(torch.float32).eps


def random_regions(count: int, images: int, side: float, seed: int) -> Tensor:
    """Regions in float64 around a map of ``side`` cells: inside, across the border, outside, tiny and huge."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.rand(count, 2, generator=generator, dtype=torch.float64) * side * 1.5 - side / 4
    extent = torch.rand(count, 2, generator=generator, dtype=torch.float64) ** 3 * side * 1.5
    index = torch.randint(0, images, (count, 1), generator=generator)
    return torch.cat((index, first, first + extent), dim=1)


def tolerance(dtype: torch.dtype, samples: int, side: int) -> float:
    """Relative to the largest value of the map, since a bin is an average: ``4 * samples ** 2`` terms are summed, and
    four roundings of a position up to ``side`` move a value by at most twice the largest; on both sides."""
    return 2 * (4 * samples**2 + 8 * side) * torch.finfo(dtype).eps


def expected(maps: Tensor, rois: Tensor, size: tuple[int, int], scale: float, ratio: int, aligned: bool) -> Tensor:
    planes = maps.tolist()
    rows = [reference.roi_align(planes[int(r[0])], r[1:], size, scale, ratio, aligned) for r in rois.tolist()]
    return torch.tensor(rows, dtype=torch.float64).view(len(rois), maps.shape[1], *size)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 0, 1, 2, 3])
@pytest.mark.parametrize("shape", [(2, 3, 9, 13), (1, 2, 1, 1), (1, 1, 1, 7), (3, 1, 12, 2)])
def test_agrees_with_the_oracle(shape: tuple[int, ...], ratio: int, aligned: bool) -> None:
    maps = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    side = max(shape[2:])
    for size, scale in (((1, 1), 1.0), ((3, 2), 0.5), ((7, 7), 0.25)):
        rois = random_regions(12, shape[0], side / scale, seed=size[0])
        samples = max(ratio, math.ceil(1.5 * side))
        found = roi_align(maps, rois, size, scale, ratio, aligned)
        assert found.shape == (12, shape[1], *size)
        bound = tolerance(torch.float64, samples, 2 * side) * maps.abs().max().item()
        torch.testing.assert_close(found, expected(maps, rois, size, scale, ratio, aligned), rtol=0, atol=bound)


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 20, 30), (2, 8, 1, 1), (1, 4, 1, 17), (3, 2, 9, 8)])
def test_float32_agrees_with_the_oracle(
    shape: tuple[int, ...], ratio: int, aligned: bool, device: torch.device
) -> None:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    # Quarters of a pixel, scale 1/4, bins 1/8 of the region: all positions are exact, so no sample changes its side.
    rois = (random_regions(20, shape[0], 80, seed=3) * 4).round() / 4
    rois[:, 0].floor_().clamp_(max=shape[0] - 1)
    exact = expected(maps.double(), rois, (8, 4), 0.25, ratio, aligned)
    bound = tolerance(torch.float32, ratio, 40) * maps.abs().max().item()
    for layout in (torch.contiguous_format, LAST):
        found = roi_align(maps.to(device, memory_format=layout), rois.to(device).float(), (8, 4), 0.25, ratio, aligned)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.cpu().double(), exact, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [3, 8])
def test_half_precision_sums_in_float32(channels: int, dtype: torch.dtype, device: torch.device) -> None:
    maps = torch.randn(2, channels, 20, 30, generator=torch.Generator().manual_seed(4)).to(device, dtype)
    maps = maps.to(memory_format=LAST)
    rois = random_regions(20, 2, 30, seed=5).to(device).float()
    half, full = maps.clone().requires_grad_(), maps.float().requires_grad_()
    found, wide = roi_align(half, rois, 5, 1.0, 2), roi_align(full, rois, 5, 1.0, 2)
    assert found.dtype == dtype
    # Equal: the sums are the same, rounded once.
    assert torch.equal(found, wide.to(dtype))
    grad = torch.randn(found.shape, generator=torch.Generator().manual_seed(6)).to(device, dtype)
    found.backward(grad)
    wide.backward(grad.float())
    assert half.grad is not None and full.grad is not None
    assert torch.equal(half.grad, full.grad.to(dtype))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_gradient(ratio: int, aligned: bool) -> None:
    maps = torch.randn(2, 2, 5, 6, dtype=torch.float64, requires_grad=True)
    rois = random_regions(6, 2, 6, seed=7)
    assert torch.autograd.gradcheck(lambda x: roi_align(x, rois, (2, 3), 1.0, ratio, aligned), maps)


def test_gradient_over_levels() -> None:
    maps = [torch.randn(2, 2, n, n, dtype=torch.float64, requires_grad=True) for n in (8, 4, 2)]
    rois = random_regions(8, 2, 16, seed=8)
    assert torch.autograd.gradcheck(
        lambda *x: multiscale_roi_align(x, rois, 2, (0.5, 0.25, 0.125), 2, canonical_scale=8, canonical_level=2), maps
    )


def test_backward_is_the_same_in_every_run(device: torch.device) -> None:
    maps = torch.randn(1, 8, 20, 20, generator=torch.Generator().manual_seed(9)).to(device).requires_grad_()
    rois = random_regions(60, 1, 20, seed=9).to(device).float()
    output = roi_align(maps, rois, 7, 1.0, 2)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(9)).to(device)
    first, second = (torch.autograd.grad(output, maps, grad, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_samples_on_the_border_count(device: torch.device) -> None:
    # One bin with one sample at the region's centre, of a map of ones of 4 x 4: it counts from -1 to 4, both included.
    ones, step = torch.ones(1, 1, 4, 4, device=device), 2**-18
    for centre, value in ((-1.0, 1.0), (-1.0 - step, 0.0), (4.0, 1.0), (4.0 + step, 0.0)):
        roi = torch.tensor([[0, centre - 1, 0, centre + 1, 2]], device=device)
        assert roi_align(ones, roi, 1, 1.0, 1).item() == value
        assert roi_align(ones, roi[:, [0, 2, 1, 4, 3]], 1, 1.0, 1).item() == value


def test_adaptive_number_of_samples(device: torch.device) -> None:
    # A bin of exactly 2 cells has 2 samples, at 0.5 and 1.5: the mean of x is 1; a wider one has 3.
    ramp = torch.arange(8.0, device=device).expand(1, 1, 8, 8) ** 2
    roi = torch.tensor([[0.0, 0, 0, 2, 2]], device=device)
    # Squares between cells: 0.5 lies between 0 and 1, 1.5 between 1 and 4.
    assert roi_align(ramp, roi, 1).item() == (0.5 + 2.5) / 2
    roi[0, 3] = 2.5
    points = [2.5 * (k + 0.5) / 3 for k in range(3)]
    mean = sum((int(p) ** 2) * (1 - p % 1) + (int(p) + 1) ** 2 * (p % 1) for p in points) / 3
    assert roi_align(ramp, roi, 1).item() == pytest.approx(mean, rel=24 * torch.finfo(torch.float32).eps)


def test_regions_without_extent(device: torch.device) -> None:
    ramp = torch.arange(8.0, device=device).expand(1, 1, 8, 8)
    roi = torch.tensor([[0.0, 3, 3, 3, 3]], device=device)
    # Not aligned: one cell wide, so its centre is at 3.5. Aligned: no width, its centre at 2.5, and no adaptive sample.
    assert roi_align(ramp, roi, 1, 1.0, 1).item() == 3.5
    assert roi_align(ramp, roi, 1, 1.0, 1, aligned=True).item() == 2.5
    assert roi_align(ramp, roi, 1, 1.0, -1, aligned=True).item() == 0
    # Reversed: from 5 back to 1, the same two samples in the other order.
    turned = torch.tensor([[0.0, 5, 5, 1, 1]], device=device)
    assert roi_align(ramp, turned, 1, 1.0, 2, aligned=True).item() == 2.5
    assert roi_align(ramp, turned, 1, 1.0, -1, aligned=True).item() == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_regions_that_are_not_finite_give_zeros(value: float, device: torch.device) -> None:
    maps = torch.ones(1, 2, 4, 4, device=device)
    for ratio in (-1, 2):
        for column in range(1, 5):
            rois = torch.tensor([[0.0, 0, 0, 3, 3], [0, 0, 0, 3, 3]], device=device)
            rois[1, column] = value
            leaf = maps.clone().requires_grad_()
            output = roi_align(leaf, rois, 2, 1.0, ratio)
            assert torch.equal(output.cpu(), torch.tensor([1.0, 0]).view(2, 1, 1, 1).expand(2, 2, 2, 2))
            output.sum().backward()
            # The weights of the cells of a bin sum to 1; there are 8 bins.
            assert leaf.grad is not None and leaf.grad.sum().item() == pytest.approx(8, rel=64 * EPS)
            level = multiscale_roi_align([maps, maps[:, :, :2, :2]], rois, 2, (1.0, 0.5), ratio)
            assert not level[1].any()


def test_list_of_boxes(device: torch.device) -> None:
    maps = torch.randn(3, 2, 9, 9, device=device)
    boxes = [random_regions(n, 1, 9, seed=n)[:, 1:].to(device).float() for n in (2, 0, 3)]
    rois = torch.cat([torch.cat((b.new_full((len(b), 1), float(i)), b), dim=1) for i, b in enumerate(boxes)])
    assert torch.equal(roi_align(maps, boxes, 3), roi_align(maps, rois, 3))


@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST])
def test_layout_follows_the_input(layout: torch.memory_format, device: torch.device) -> None:
    maps = torch.randn(2, 4, 9, 9, device=device).to(memory_format=layout).requires_grad_()
    rois = random_regions(5, 2, 9, seed=1).to(device).float()
    output = roi_align(maps, rois, 3)
    assert output.is_contiguous(memory_format=layout)
    plain = maps.detach().contiguous().requires_grad_()
    reference_output = roi_align(plain, rois, 3)
    assert torch.equal(output, reference_output)
    grad = torch.randn(output.shape, device=device)
    output.backward(grad)
    reference_output.backward(grad)
    assert maps.grad is not None and plain.grad is not None
    assert maps.grad.is_contiguous(memory_format=layout)
    assert torch.equal(maps.grad, plain.grad)


def test_no_region(device: torch.device) -> None:
    maps = torch.randn(2, 4, 9, 9, device=device, requires_grad=True)
    none = torch.zeros(0, 5, device=device)
    output = roi_align(maps, none, (3, 2))
    assert output.shape == (0, 4, 3, 2)
    output.sum().backward()
    assert maps.grad is not None and not maps.grad.any()
    assert multiscale_roi_align([maps, maps], none, 2, (0.5, 0.25)).shape == (0, 4, 2, 2)
    # No image and no channel.
    empty = torch.zeros(0, 4, 9, 9, device=device, requires_grad=True)
    roi_align(empty, none, 2).sum().backward()
    assert empty.grad is not None and empty.grad.shape == (0, 4, 9, 9)
    assert roi_align(maps[:, :0], torch.zeros(3, 5, device=device), 2).shape == (3, 0, 2, 2)


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("ratio", [-1, 2])
def test_long_lists_are_cut(ratio: int, inside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = torch.randn(2, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    rois = random_regions(30, 2, 12, seed=2)
    if inside:
        rois[:, 1:].clamp_(0, 11)
    output = roi_align(maps, rois, 4, 1.0, ratio)
    grad = torch.randn(output.shape, dtype=torch.float64)
    (whole,) = torch.autograd.grad(output, maps, grad)
    for listed in (1, 500):
        monkeypatch.setattr(roi_align_cpu, "LISTED", listed)
        place = roi_align_cpu.Placement((1.0,), (4, 4), ratio, False)
        _, (_, counts, _, *axes) = roi_align_cpu.forward_cpu([maps.detach()], rois, place)
        y, x = roi_align_cpu._Axis(*axes[:4]), roi_align_cpu._Axis(*axes[4:])
        assert (y.cell.dim() == 3) == (ratio == 2 and inside)
        assert len(list(roi_align_cpu._parts(counts, y, x, 30))) >= (30 if listed == 1 else 2)
        cut = roi_align(maps, rois, 4, 1.0, ratio)
        assert torch.equal(cut, output)
        # Up to 30 parts are summed one after the other.
        torch.testing.assert_close(torch.autograd.grad(cut, maps, grad)[0], whole, rtol=0, atol=30 * 30 * 2.3e-16)


@pytest.mark.parametrize("channels_last", [False, True])
def test_levels(channels_last: bool, device: torch.device) -> None:
    maps = [torch.randn(2, 3, 64 // 2**k, 96 // 2**k, device=device) for k in range(3)]
    maps = [x.to(memory_format=LAST) if channels_last else x for x in maps]
    rois = random_regions(60, 2, 600, seed=11).to(device).float()
    rois[:, 3:] += 1
    scales = (1 / 8, 1 / 16, 1 / 32)
    found = multiscale_roi_align(maps, rois, (3, 2), scales, 2)
    used = set()
    for roi, row in zip(rois, found, strict=True):
        level = reference.pyramid_level(roi[1:].tolist(), 3, 5)
        used.add(level)
        assert torch.equal(row, roi_align(maps[level - 3], roi[None], (3, 2), scales[level - 3], 2)[0])
    assert used == {3, 4, 5}


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("ratio", "without"), [(-1, 16), (2, 32)])
def test_one_table_for_all_maps_changes_nothing(
    ratio: int, without: int, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The maps are smaller than the output, so that the CPU body reads them as one table."""
    sides = (32, 16, 8)
    maps = [torch.randn(2, 3, n, n + 3, generator=torch.Generator().manual_seed(n)) for n in sides]
    maps = [x.contiguous(memory_format=LAST if channels_last else torch.contiguous_format) for x in maps]
    maps = [x.requires_grad_(n != without) for x, n in zip(maps, sides, strict=True)]
    needed = [x for x in maps if x.requires_grad]
    rois = random_regions(90, 2, 300, seed=12).float()
    found = []
    for joined in (True, False):
        if not joined:
            monkeypatch.setattr(roi_align_cpu, "_joined", lambda shapes, _: len(shapes) == 1)
        assert roi_align_cpu._joined([x.shape for x in maps], 90 * 7 * 6) == joined
        output = multiscale_roi_align(maps, rois, (7, 6), (1 / 8, 1 / 16, 1 / 32), ratio)
        found.append((output, *torch.autograd.grad(output.square().sum(), needed)))
    for one, many in zip(*found, strict=True):
        assert torch.equal(one, many)
        assert one.is_contiguous(memory_format=LAST) == channels_last


def test_level_at_the_canonical_size(device: torch.device) -> None:
    maps = [torch.full((1, 1, 100, 100), float(k), device=device) for k in range(2, 6)]
    for side, level in ((223.9, 3), (224.0, 4), (448.0, 5), (1.0, 2), (5000.0, 5), (0.0, 2)):
        roi = torch.tensor([[0.0, 10, 10, 10 + side, 10 + side]], device=device)
        pooled = multiscale_roi_align(maps, roi, 1, (1 / 4, 1 / 8, 1 / 16, 1 / 32), 1)
        assert pooled.item() == pytest.approx(level, rel=8 * EPS)  # four products on weights of two factors


@pytest.mark.parametrize("ulp", [1, 2, 3, 4, 20, 100, 1000])
def test_level_just_below_a_canonical_size(ulp: int, device: torch.device) -> None:
    """A few ulp below a size that is a whole level's, a logarithm or a root off in its last bit changes nothing.

    Each ulp takes 2 ** -24 / 0.875 / log(2) = 1e-7 from the logarithm: 20 take twice what is added to it.
    """
    maps = [torch.full((1, 1, 100, 100), float(k), device=device) for k in range(2, 6)]
    for whole, level in ((112.0, 3), (224.0, 4), (448.0, 5)):
        side = whole - ulp * EPS / 2 * 2 ** math.ceil(math.log2(whole))
        box = [0.0, 0.0, side, side]
        assert reference.pyramid_level(box, 2, 5) == (level if ulp < 5 else level - 1)
        roi = torch.tensor([[0.0, *box]], device=device)
        pooled = multiscale_roi_align(maps, roi, 1, (1 / 4, 1 / 8, 1 / 16, 1 / 32), 1)
        assert round(pooled.item()) == reference.pyramid_level(box, 2, 5)


def test_only_levels_that_need_it_get_a_gradient(device: torch.device) -> None:
    first, second = torch.ones(1, 1, 8, 8, device=device), torch.ones(1, 1, 4, 4, device=device, requires_grad=True)
    rois = torch.tensor([[0.0, 0, 0, 4, 4], [0, 0, 0, 448, 448]], device=device)
    multiscale_roi_align([first, second], rois, 1, (1 / 16, 1 / 32)).sum().backward()
    assert first.grad is None
    assert second.grad is not None and second.grad.any()


def test_the_function_is_exported() -> None:
    assert module_function is roi_align


MAPS, ROIS = torch.zeros(2, 3, 4, 4), torch.zeros(1, 5)


@pytest.mark.parametrize(
    ("maps", "rois", "size", "scale", "message"),
    [
        (torch.zeros(2, 3, 4), ROIS, 7, 1.0, r"input must have shape \(B, C, H, W\) with H, W > 0, got \(2, 3, 4\)"),
        (torch.zeros(2, 3, 0, 4), ROIS, 7, 1.0, r"with H, W > 0, got \(2, 3, 0, 4\)"),
        (MAPS.long(), ROIS, 7, 1.0, "input must be float32, bfloat16 or float16, got torch.int64"),
        (MAPS, torch.zeros(1, 4), 7, 1.0, r"boxes must have shape \(R, 5\), got \(1, 4\)"),
        (MAPS, ROIS.long(), 7, 1.0, "boxes must be float32, bfloat16 or float16, got torch.int64"),
        (MAPS, ROIS + 2, 7, 1.0, r"boxes must name images 0\.\.1, got 2.0\.\.2.0"),
        (MAPS, ROIS - 1, 7, 1.0, r"boxes must name images 0\.\.1, got -1.0\.\.-1.0"),
        (MAPS, [torch.zeros(1, 5)], 7, 1.0, r"boxes\[0\] must have shape \(n, 4\), got \(1, 5\)"),
        (MAPS, [], 7, 1.0, "boxes must hold one tensor per image, got an empty list"),
        (MAPS, ROIS, 0, 1.0, "output_size must be one or two positive integers, got 0"),
        (MAPS, ROIS, (7, 7, 7), 1.0, r"output_size must be one or two positive integers, got \(7, 7, 7\)"),
        (MAPS, ROIS, 7, -1.0, "spatial_scale must be above 0, got -1.0"),
        (MAPS, ROIS, 7, math.nan, "spatial_scale must be a finite number, got nan"),
    ],
)
def test_refuses(maps: Tensor, rois: Tensor, size: int, scale: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        roi_align(maps, rois, size, scale)


def test_refuses_levels_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="spatial_scales must name one scale per level, got 1 for 2"):
        multiscale_roi_align([MAPS, MAPS], ROIS, 7, [0.5])
    with pytest.raises(ValueError, match="features must share batch, channels and dtype"):
        multiscale_roi_align([MAPS, MAPS.double()], ROIS, 7, [0.5, 0.25])
    with pytest.raises(ValueError, match=r"spatial_scales must halve from level to level, got \[0.5, 0.125\]"):
        multiscale_roi_align([MAPS, MAPS], ROIS, 7, [0.5, 0.125])


def test_refuses_boxes_that_require_a_gradient(device: torch.device) -> None:
    maps, rois = MAPS.to(device), torch.zeros(1, 5, device=device, requires_grad=True)
    message = "boxes must not require a gradient: roi_align has none for them, pass boxes.detach()"
    with pytest.raises(ValueError, match=re.escape(message)):
        roi_align(maps, rois, 7)
    with pytest.raises(ValueError, match=re.escape(message)):
        roi_align(maps, [rois[:, 1:], rois[:, 1:]], 7)
    with pytest.raises(ValueError, match="multiscale_roi_align has none"):
        multiscale_roi_align([maps, maps], rois, 7, [0.5, 0.25])
    with torch.no_grad():
        assert roi_align(maps, rois, 7).shape == (1, 3, 7, 7)


def test_regions_far_larger_than_the_map(device: torch.device) -> None:
    """A billion samples in a bin, of which a few lie on the map, are not visited one by one."""
    ones = torch.ones(1, 4, 6, 6, device=device, requires_grad=True)
    # A bin of 2 ** 20 cells has as many samples; those on the map of 6 cells and one cell around it are 7.
    large = torch.tensor([[0.0, -(2**19), -(2**19), 2**19, 2**19]], device=device)
    output = roi_align(ones, large, 1)
    assert torch.equal(output.cpu(), torch.full((1, 4, 1, 1), (7 / 2**20) ** 2))
    output.sum().backward()
    assert ones.grad is not None
    # Seven samples in y and x; the sums of weights are exact.
    assert torch.equal(ones.grad.sum(dim=(2, 3)).cpu(), output.detach().view(1, 4).cpu())
    # Bins of 2 ** 33 cells have 2 ** 30 samples. At those in the middle float32 knows numbers 32 and 64 apart, so that
    # the 16 before the middle, it and the 32 behind it all fall on cell 0.
    output = roi_align(ones, large.sign() * 2**32, 1)
    assert torch.equal(output.cpu(), torch.full((1, 4, 1, 1), (49 / 2**30) ** 2))
    for extent in (1e9, 1e30, 3e38):
        rois = torch.tensor([[0.0, -extent, -extent, extent, extent], [0, 0, 0, extent, extent]], device=device)
        for aligned in (False, True):
            output = roi_align(ones, rois, 2, 1.0, -1, aligned)
            assert bool(((output >= 0) & (output < 1e-6)).all())
            (grad,) = torch.autograd.grad(output.sum(), ones)
            assert bool(((grad >= 0) & (grad < 1e-6)).all())
        assert roi_pool(ones, rois, 2, 4.0).isfinite().all()


@pytest.mark.parametrize("aligned", [False, True])
def test_listing_only_what_lies_inside_changes_nothing(aligned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Regions on either side of the limit from which on samples outside the map are not even listed."""
    maps = torch.randn(2, 3, 9, 13, generator=torch.Generator().manual_seed(3))
    near = random_regions(40, 2, 60, seed=4).float()
    far = near * torch.tensor([1.0, 100, 100, 100, 100])
    turned = far[:, [0, 3, 4, 1, 2]]
    for rois in (near, far, turned):
        expected = roi_align(maps, rois, (3, 2), 1.0, -1, aligned)
        monkeypatch.setattr(roi_align_cpu, "FAR", 0)
        assert torch.equal(roi_align(maps, rois, (3, 2), 1.0, -1, aligned), expected)
        monkeypatch.setattr(roi_align_cpu, "FAR", FAR)
