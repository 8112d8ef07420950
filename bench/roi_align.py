"""RoI Align, forward and backward, on one map and over a pyramid, in both memory formats.

Counted: each output value once, each value of the maps once or, where the regions touch less, 4 cells for each of the
4 samples of an output value; 20 per region. Backward: the output's gradient and the map's. Operations: a product and
a sum for each of those 16 cells.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bench import textbook
from bench.cases import Case, chosen
from bench.inputs import feature_map, generator, regions
from rcnn.kernels import multiscale_roi_align, roi_align
from tests import reference

#: Batch, channels, height and width in pixels, strides, regions per image. A ResNet-50 FPN in training, the same on
#: one level, and the detector ``tiny``.
SHAPES = {
    "cpu": (
        (1, 256, 800, 1344, (4, 8, 16, 32), 512),
        (1, 256, 800, 1344, (16,), 512),
        (8, 64, 256, 320, (8, 16, 32), 96),
    ),
    "cuda": (
        (8, 256, 800, 1344, (4, 8, 16, 32), 512),
        (8, 256, 800, 1344, (16,), 512),
        (8, 64, 256, 320, (8, 16, 32), 96),
    ),
}
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
BINS, RATIO = 7, 2


def cases(device: torch.device, peers: set[str]) -> Iterator[Case]:
    """See the module."""
    for shape in SHAPES[device.type]:
        for dtype in DTYPES[device.type]:
            for last in (True, False):
                yield from _both(*shape, dtype, last, device, peers)


def _both(
    batch: int, channels: int, height: int, width: int, strides: Sequence[int], count: int,
    dtype: torch.dtype, last: bool, device: torch.device, peers: set[str],
) -> Iterator[Case]:  # fmt: skip
    maps = [feature_map((batch, channels, height // s, width // s), dtype, last, device) for s in strides]
    rois = regions(batch, count, height, width, generator()).to(device)
    scales = [1 / stride for stride in strides]
    if dtype == torch.bfloat16:
        peers = peers - {"torchvision"}  # it has no kernel for it
    if len(strides) > 1:
        peers = peers - {"torch"}

    def ours(x: Sequence[Tensor] = maps, r: Tensor = rois) -> Tensor:
        if len(scales) > 1:
            return multiscale_roi_align(x, r, BINS, scales, RATIO)
        return roi_align(x[0], r, BINS, scales[0], RATIO)

    def torchvision(x: Sequence[Tensor] = maps) -> Tensor:
        from torchvision import ops

        if len(scales) == 1:
            return ops.roi_align(x[0], rois.to(dtype), BINS, scales[0], RATIO)
        pooler = ops.MultiScaleRoIAlign([str(k) for k in range(len(scales))], BINS, RATIO)
        named = {str(k): each for k, each in enumerate(x)}
        return pooler(named, list(rois[:, 1:].to(dtype).split(count)), [(height, width)] * batch)

    def plain(x: Sequence[Tensor] = maps) -> Tensor:
        return textbook.roi_align(x[0], rois, BINS, scales[0], RATIO)

    # Sums of 16 products, and positions of up to this many cells that are rounded four times on each side.
    eps = torch.finfo(dtype).eps
    far = max(height, width) / strides[0]
    bound = max(x.abs().max().item() for x in maps) * (2 * eps + 2 * (16 + 8 * far) * torch.finfo(torch.float32).eps)

    def gate() -> None:
        output = ours()
        for r in range(0, len(rois), max(1, len(rois) // 3)):
            region = rois[r, 1:].tolist()
            level = 0
            if len(scales) > 1:
                finest = int(-math.log2(scales[0]))
                level = int(reference.pyramid_level(region, finest, finest + len(scales) - 1)) - finest
            planes = maps[level][int(rois[r, 0]), :2].double().tolist()
            expected = reference.roi_align(planes, region, (BINS, BINS), scales[level], RATIO, False)
            torch.testing.assert_close(
                output[r, :2].cpu().double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=bound
            )
        if "torch" in peers and dtype == torch.float32:
            torch.testing.assert_close(output, plain(), rtol=0, atol=bound)
        if "torchvision" in peers and dtype == torch.float32:
            torch.testing.assert_close(output, torchvision(), rtol=0, atol=bound)

    rivals = chosen(peers, rcnn=ours, torchvision=torchvision, torch=plain)
    output = batch * count * channels * BINS**2
    touched = min(sum(x.numel() for x in maps), 16 * output)
    size, layout = maps[0].element_size(), "channels-last" if last else "NCHW"
    where = f"{batch} x {channels} x {height} x {width} at stride {', '.join(map(str, strides))}"
    name = f"{where}; {batch * count:,} regions, {layout}"
    yield Case(f"forward, {name}", rivals, gate, size * (output + touched) + 20 * len(rois), 32 * output, dtype)

    needing = [x.detach().requires_grad_() for x in maps]
    grad = torch.randn(len(rois), channels, BINS, BINS, generator=generator(2)).to(device, dtype)
    grad = grad.contiguous(memory_format=torch.channels_last) if last else grad
    with torch.enable_grad():
        graphs = {"rcnn": ours(needing)}
        if "torchvision" in peers:
            graphs["torchvision"] = torchvision(needing)
        if "torch" in peers:
            graphs["torch"] = plain(needing)

    def backward(graph: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(graph, needing, grad, retain_graph=True, allow_unused=True)

    def backward_gate() -> None:
        # The gradient is linear in the weights. Theirs and ours come from positions that differ by `8 * far` roundings
        # and are summed in another order; a weight is 1 / 16 on average.
        most = 16 * (16 + 8 * far) * torch.finfo(torch.float32).eps + eps
        found = backward(graphs["rcnn"])
        others = [backward(graph) for name, graph in graphs.items() if name != "rcnn" and dtype == torch.float32]
        if device.type == "cuda":
            others.append(_on_cpu(needing, rois, scales, grad))
        for other in others:
            for a, b in zip(found, other, strict=True):
                assert (a.cpu().double() - b.cpu().double()).norm() <= most * b.double().norm().cpu()

    work = size * (output + sum(x.numel() for x in maps)) + 20 * len(rois)
    yield Case(
        f"backward, {name}",
        {name: (lambda graph=graph: backward(graph)) for name, graph in graphs.items()},
        backward_gate,
        work,
        32 * output,
        dtype,
        grad=True,
    )


def _on_cpu(maps: Sequence[Tensor], rois: Tensor, scales: Sequence[float], grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients by the CPU body."""
    needing = [x.detach().cpu().requires_grad_() for x in maps]
    if len(scales) > 1:
        output = multiscale_roi_align(needing, rois.cpu(), BINS, scales, RATIO)
    else:
        output = roi_align(needing[0], rois.cpu(), BINS, scales[0], RATIO)
    return torch.autograd.grad(output, needing, grad.cpu())
