"""The CUDA bodies of RoI Align and RoI pooling against the CPU bodies, which are tested against the oracle.

Where the numbers are small multiples of powers of two, every product and sum is exact, in any order, and the results
must be equal. Positions have the same bits in both bodies, so no sample changes its side anywhere.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import DEVICES
from cuda_on_cpu import Emulator
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rcnn.kernels import _launch, multiscale_roi_align, roi_align, roi_pool
from rcnn.kernels.roi_align import SOURCE as ALIGN
from rcnn.kernels.roi_pool import SOURCE as POOL

pytestmark = pytest.mark.parametrize("device", DEVICES[1:], indirect=True)

LAST = torch.channels_last
LAYOUTS = [torch.contiguous_format, LAST]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EPS = torch.finfo(torch.float32).eps
TILE = ALIGN.constants["TILE"]


def whole_numbers(shape: Sequence[int], seed: int) -> Tensor:
    return torch.randint(-4, 5, tuple(shape), generator=torch.Generator().manual_seed(seed)).float()


def exact_regions(count: int, images: int, side: int, seed: int) -> Tensor:
    """Corners in halves of a pixel, of which some regions are reversed, some off the map of ``side`` pixels."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(-side // 2, 5 * side // 2, (count, 2), generator=generator) / 2
    extent = torch.randint(-4, side, (count, 2), generator=generator)
    index = torch.randint(0, images, (count, 1), generator=generator)
    return torch.cat((index, corner, corner + extent), dim=1)


def layout_of(x: Tensor) -> list[int]:
    """Strides of the dimensions that have more than one element, without which they say nothing."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def both(op: Callable[..., Tensor], maps: Sequence[Tensor], grad_seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Output of an op and gradients of its maps, for a gradient of whole numbers, and that gradient."""
    leaves = [x.detach().requires_grad_() for x in maps]
    output = op(*leaves)
    grad = torch.empty_like(output).copy_(whole_numbers(output.shape, grad_seed))  # laid out like the output
    return [output, *torch.autograd.grad(output, leaves, grad)], grad


def on_cpu_body(op: Callable[..., Tensor], maps: Sequence[Tensor]) -> list[Tensor]:
    """The same by the CPU body."""
    with mock.patch.object(_launch, "uses_kernels", lambda x: False):
        return both(op, [x.cpu() for x in maps])[0]


def assert_equal(op: Callable[[torch.device], Callable[..., Tensor]], maps: Sequence[Tensor], device: Any) -> None:
    """Output and gradients of the kernels have the values and the layout of the CPU body's."""
    found, _ = both(op(device), [x.to(device) for x in maps])
    for one, other in zip(found, on_cpu_body(op(torch.device("cpu")), maps), strict=True):
        assert one.dtype == other.dtype and layout_of(one) == layout_of(other)
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 4, 8, 65, 72])
def test_all_levels(channels: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> None:
    """Maps on either side of a tile's border; channels that fill packs and blocks, and that do not."""
    sides = ((2 * TILE + 1, 3 * TILE), (TILE, TILE + 1), (TILE - 1, 5), (1, 1))
    maps = [whole_numbers((2, channels, *side), i).to(dtype).to(memory_format=layout) for i, side in enumerate(sides)]
    rois = exact_regions(24, 2, 40, seed=channels)
    rois[5, 2], rois[7, 4] = math.nan, math.inf
    scales = (0.5, 0.25, 0.125, 0.0625)
    for aligned in (False, True):
        # One sample for each of 4 x 2 bins: positions are multiples of 1/256, and weights in y times those in x of
        # 2 ** -16. A cell sums at most 24 * 8 times 4: with the sign, 27 bits, but those cells lie in a map of one
        # cell, where weights are 1.
        assert_equal(
            lambda where, aligned=aligned: (
                lambda *x: multiscale_roi_align(
                    x, rois.to(where), (4, 2), scales, 1, aligned, canonical_scale=8, canonical_level=2
                )
            ),
            maps,
            device,
        )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 8, 16, 17, 64, 131])
def test_pool(channels: int, dtype: torch.dtype, layout: torch.memory_format, device: torch.device) -> None:
    for side in ((1, 1), (TILE - 1, TILE), (TILE + 1, 2 * TILE + 1)):
        maps = whole_numbers((2, channels, *side), seed=1).to(dtype).to(memory_format=layout)
        rois = exact_regions(24, 2, 2 * side[1], seed=channels)
        rois[5, 2], rois[7, 4] = math.nan, math.inf
        assert_equal(lambda where, rois=rois: lambda x: roi_pool(x, rois.to(where), (7, 3), 0.5), [maps], device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("size", "channels"), [((14, 14), 40), ((32, 31), 4), ((32, 32), 4), ((32, 33), 4), ((64, 64), 3), ((65, 64), 3)]
)
def test_pools_of_any_size(
    size: tuple[int, int], channels: int, layout: torch.memory_format, device: torch.device
) -> None:
    """Outputs that fill what a block collects, by packs and by channels, and that do not fit; more bins on a tile than
    are listed at once, all of them sending to one cell."""
    maps = whole_numbers((2, channels, TILE, TILE + 1), seed=1).to(memory_format=layout)
    rois = torch.cat((exact_regions(3, 2, 2 * TILE, seed=2), torch.tensor([[1.0, 3, 3, 3, 3]])))
    assert_equal(lambda where: lambda x: roi_pool(x, rois.to(where), size, 0.5), [maps], device)


@pytest.mark.parametrize("channels", [31, 32, 33])
@pytest.mark.parametrize("side", [(1, 31), (4, 8), (3, 11), (5, 13)])
def test_pool_turns_maps(side: tuple[int, int], channels: int, device: torch.device) -> None:
    """Planes on either side of a square of 32 channels and 32 cells."""
    maps = whole_numbers((3, channels, *side), seed=1)
    rois = exact_regions(10, 3, 2 * max(side), seed=2)
    assert_equal(lambda where: lambda x: roi_pool(x, rois.to(where), (3, 2), 0.5), [maps], device)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ratio", [-1, 2, 40])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (32, 33), (65, 64), (2, 140)])
def test_grids_of_any_size(
    size: tuple[int, int], ratio: int, layout: torch.memory_format, device: torch.device
) -> None:
    """More bins than a mask has bits, than the list has room for, more cells in a bin than the list has room for."""
    side = 310 if max(size) == 1 else 30
    maps = torch.randn(1, 4, side, side + 1, generator=torch.Generator().manual_seed(1)).to(memory_format=layout)
    corner = torch.rand(3, 2, generator=torch.Generator().manual_seed(2)) * 5 - 2
    rois = torch.cat((torch.zeros(3, 1), corner, side - corner), dim=1)
    rois[2, 3:] = 4
    assert_sums_agree(
        lambda where: lambda x: roi_align(x, rois.to(where), size, 1.0, ratio, aligned=True),
        maps,
        (2 * max(ratio, math.ceil(max(4, side + 4) / min(size)))) ** 2,
        3 * size[0] * size[1],
        device,
    )


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("ratio", [-1, 2, 3])
def test_positions_between_cells(ratio: int, aligned: bool, device: torch.device) -> None:
    generator = torch.Generator().manual_seed(3)
    maps = torch.randn(2, 8, 21, 30, generator=generator).to(memory_format=LAST)
    corner = torch.rand(50, 2, generator=generator) * 60 - 15
    extent = torch.rand(50, 2, generator=generator) ** 2 * 60 - 4
    rois = torch.cat((torch.randint(0, 2, (50, 1), generator=generator), corner, corner + extent), dim=1)
    assert_sums_agree(
        lambda where: lambda x: roi_align(x, rois.to(where), (7, 5), 0.5, ratio, aligned),
        maps,
        (2 * max(ratio, 6)) ** 2,
        50 * 7 * 5,
        device,
    )


def assert_sums_agree(
    op: Callable[[torch.device], Callable[..., Tensor]], maps: Tensor, terms: int, grad_terms: int, device: Any
) -> None:
    """Sums of ``terms`` products, and of ``grad_terms`` in the gradient, in two orders.

    Each side is off by half an eps for each addition and each product, of the sum of the absolute terms, which the CPU
    body gives for absolute numbers, weights being positive.
    """
    found, grad = both(op(device), [maps.to(device)])
    cpu = op(torch.device("cpu"))
    with mock.patch.object(_launch, "uses_kernels", lambda x: False):
        sizes, (output,) = [], both(cpu, [maps])[0][:1]
        leaf = maps.abs().requires_grad_()
        absolute = cpu(leaf)
        sizes = [absolute.detach(), *torch.autograd.grad(absolute, leaf, grad.cpu().abs())]
        expected = [output, both(cpu, [maps])[0][1]]
    for one, other, size, count in zip(found, expected, sizes, (terms, grad_terms), strict=True):
        assert layout_of(one) == layout_of(other)
        assert bool(((one.cpu() - other).abs() <= (count + 3) * EPS * size).all())


def test_regions_of_no_image_give_zeros(device: torch.device) -> None:
    """The CPU body raises; here nobody waits for the answer."""
    index = torch.tensor([0.0, -1, 2, math.nan, 1e30, -math.inf, math.inf, -0.5, 1.5])
    rois = torch.cat((index[:, None], torch.tensor([0.0, 0, 3, 3]).expand(9, 4)), dim=1).to(device)
    valid = torch.tensor([1.0, 0, 0, 0, 0, 0, 0, 0, 1])
    for layout in LAYOUTS:
        maps = torch.ones(2, 8, 9, 9, device=device).to(memory_format=layout).requires_grad_()
        for op in (lambda x: roi_align(x, rois, 2, 1.0, 2), lambda x: roi_pool(x, rois, 2)):
            output = op(maps)
            assert torch.equal(output.cpu(), valid.view(9, 1, 1, 1).expand(9, 8, 2, 2))
            (grad,) = torch.autograd.grad(output.sum(), maps)
            # Four bins of each of eight channels of one region in each image: quarters and powers of two.
            assert grad.sum(dim=(1, 2, 3)).tolist() == [32.0, 32.0]


def test_pools_of_regions_that_scaling_makes_infinite_are_zeros(device: torch.device) -> None:
    corners = [(0, 0, 4, 3e38), (0, 0, 3e38, 4), (0, -3e38, 4, 4), (-3e38, 0, 4, 4), (2e38, 0, 3e38, 4)]
    rois = torch.tensor([(0.0, *corner) for corner in corners], device=device)
    for layout in LAYOUTS:
        maps = torch.ones(1, 8, 9, 9, device=device).to(memory_format=layout).requires_grad_()
        output = roi_pool(maps, rois, 2, 2.0)
        assert torch.equal(output.cpu(), torch.zeros(5, 8, 2, 2))
        (grad,) = torch.autograd.grad(output.sum(), maps)
        assert not grad.any()


@pytest.mark.parametrize("count", [0, 1, 31, 33, 127, 129, 257, 1030])
def test_numbers_of_regions(count: int, device: torch.device) -> None:
    """On either side of what a warp, a block and a sorting block hold; the images in no order."""
    maps = whole_numbers((3, 1, TILE, TILE + 1), seed=1)
    rois = exact_regions(count, 3, 2 * TILE, seed=count)
    # A cell sums at most 1,030 * 2 products of up to 4, in steps of 1/64 ** 2: exact.
    assert_equal(lambda where: lambda x: roi_align(x, rois.to(where), (2, 1), 0.5, 1), [maps], device)
    assert_equal(lambda where: lambda x: roi_pool(x, rois.to(where), (2, 1), 0.5), [maps], device)


def test_the_order_of_threads_does_not_matter(device: torch.device, emulator: Emulator) -> None:
    generator = torch.Generator().manual_seed(5)
    maps = [torch.randn(2, 5, 20 // 2**k, 17 // 2**k, generator=generator).to(memory_format=LAST) for k in range(2)]
    corner = torch.rand(40, 2, generator=generator) * 50
    extent = torch.rand(40, 2, generator=generator) ** 2 * 60
    rois = torch.cat((torch.randint(0, 2, (40, 1), generator=generator), corner, corner + extent), dim=1)

    def align(*x: Tensor) -> Tensor:
        return multiscale_roi_align(x, rois, (3, 4), (0.5, 0.25), 2, canonical_scale=24, canonical_level=2)

    def pool(x: Tensor) -> Tensor:
        return roi_pool(x, rois, (3, 4), 0.5)

    first = both(align, maps)[0] + both(pool, maps[:1])[0]
    for seed in range(1, 21):
        with emulator.order(seed):
            again = both(align, maps)[0] + both(pool, maps[:1])[0]
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_of_any_layout(dtype: torch.dtype, device: torch.device) -> None:
    """Views of other tensors: turned, cut, off a 16-byte boundary, expanded; nothing of them is changed."""
    base = whole_numbers((2, 8, 10, 12), seed=1).to(dtype)
    shifted = torch.empty(base.numel() + 1, dtype=dtype)[1:].view(2, 10, 12, 8).permute(0, 3, 1, 2).copy_(base)
    rois = exact_regions(12, 2, 20, seed=2)
    wide = torch.cat((rois, rois), dim=1)
    for maps in (
        base.transpose(2, 3).contiguous().transpose(2, 3),
        torch.cat((base, base), dim=1)[:, 8:],
        shifted,
        base[:1].expand(2, 8, 10, 12),
        base.to(memory_format=LAST)[:, :, 1:, 1:],
    ):
        maps = maps.to(device) if maps is not shifted or device.type == "cpu" else maps
        for strided in (rois, wide[:, 5:], rois.double(), rois.T.contiguous().T):
            before = maps.clone(), strided.clone()
            assert_equal(lambda where, b=strided: lambda x: roi_align(x, b.to(where), 4, 0.5, 1), [maps], device)
            assert_equal(lambda where, b=strided: lambda x: roi_pool(x, b.to(where), 4, 0.5), [maps], device)
            assert torch.equal(maps, before[0]) and torch.equal(strided, before[1])
    # The gradient of a sum is expanded.
    leaf = base.to(device).requires_grad_()
    (found,) = torch.autograd.grad(roi_align(leaf, rois.to(device), 4, 0.5, 1).sum(), leaf)
    with mock.patch.object(_launch, "uses_kernels", lambda x: False):
        leaf = base.clone().requires_grad_()
        (expected,) = torch.autograd.grad(roi_align(leaf, rois, 4, 0.5, 1).sum(), leaf)
    assert torch.equal(found.cpu(), expected)


def test_levels_of_different_layouts(device: torch.device) -> None:
    maps = [whole_numbers((1, 4, 16 // 2**k, 16 // 2**k), k) for k in range(3)]
    rois = exact_regions(20, 1, 40, seed=3)
    for turned in range(3):
        mixed = [x.to(memory_format=LAST) if i == turned else x for i, x in enumerate(maps)]
        found, _ = both(
            lambda *x: multiscale_roi_align(x, rois.to(device), 2, (0.5, 0.25, 0.125), 1, True, 16, 2),
            [x.to(device) for x in mixed],
        )
        plain = on_cpu_body(lambda *x: multiscale_roi_align(x, rois, 2, (0.5, 0.25, 0.125), 1, True, 16, 2), maps)
        assert all(torch.equal(one.cpu(), other) for one, other in zip(found, plain, strict=True))
        assert all(layout_of(grad) == layout_of(x) for grad, x in zip(found[1:], mixed, strict=True))


class NoWaiting(TorchDispatchMode):
    """Refuses what makes the host wait for the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero", "item")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.split(".")[0]
        assert not name.startswith(self.WAITS), name
        assert name != "index" or all(x is None or x.dtype != torch.bool for x in args[1]), name
        return func(*args, **(kwargs or {}))


def test_launches_and_no_waiting(device: torch.device, emulator: Emulator) -> None:
    maps = [torch.randn(2, 8, 16 // 2**k, 16 // 2**k) for k in range(3)]
    rois = exact_regions(20, 2, 40, seed=3)
    emulator.launches.clear()
    with NoWaiting():
        both(lambda *x: multiscale_roi_align(x, rois, 2, (0.5, 0.25, 0.125), 2), maps)
        both(lambda x: roi_pool(x, rois, 2), [maps[0].to(memory_format=LAST)])
        both(lambda x: roi_pool(x, rois, 2), maps[:1])
    assert emulator.launches == [f"roi_{op}" for op in ("align_forward", "align_sort", "align_backward")] + [
        *(f"roi_pool_{op}" for op in ("forward", "sort", "backward")),
        *(f"roi_pool_{op}" for op in ("turn", "forward", "turn", "sort", "backward")),
    ]


def test_refuses(device: torch.device) -> None:
    maps, rois = torch.zeros(1, 4, 8, 8, device=device), torch.zeros(1, 5, device=device)
    for op, source in ((roi_align, ALIGN), (roi_pool, POOL)):
        message = f"{source.name}: dtype must be one of float32, bfloat16, float16 on a GPU, got torch.float64"
        with pytest.raises(ValueError, match=message):
            op(maps.double(), rois, 2)
    scales = [2.0**-k for k in range(9)]
    with pytest.raises(ValueError, match="features must have at most 8 levels on a GPU, got 9"):
        multiscale_roi_align([maps] * 9, rois, 2, scales)
    assert multiscale_roi_align([maps] * 8, rois, 2, scales[:8]).shape == (1, 4, 2, 2)
