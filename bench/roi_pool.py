"""RoI pooling, forward (with what a backward pass needs) and backward, in both memory formats.

Counted: each output value and its cell (int32) once, each value of the map once, 20 bytes per region; a comparison for
each cell of each bin. Backward: the output's gradient, the cells and the map's gradient; a sum per output value.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from bench import textbook
from bench.cases import Case, chosen
from bench.inputs import feature_map, generator, regions
from rcnn.kernels import roi_pool
from tests import reference

#: Batch, channels, height and width in pixels, stride, regions per image: VGG-16 in training and in detection, a
#: ResNet-50 on one level, and small models in training and in detection.
SHAPES = {
    "cpu": (
        (2, 512, 600, 1000, 16, 128), (1, 512, 600, 1000, 16, 300), (1, 256, 800, 1344, 16, 512),
        (8, 64, 256, 320, 8, 96), (8, 64, 256, 320, 16, 96), (1, 64, 256, 320, 8, 300),
    ),
    "cuda": (
        (2, 512, 600, 1000, 16, 128), (1, 512, 600, 1000, 16, 300), (8, 256, 800, 1344, 16, 512),
        (8, 64, 256, 320, 8, 96),
    ),
}  # fmt: skip
DTYPES = {"cpu": (torch.float32,), "cuda": (torch.float32, torch.bfloat16, torch.float16)}
BINS = 7


def cases(device: torch.device, peers: set[str]) -> Iterator[Case]:
    """See the module."""
    for shape in SHAPES[device.type]:
        for dtype in DTYPES[device.type]:
            for last in (True, False):
                yield from _both(*shape, dtype, last, device, peers)


def _both(
    batch: int, channels: int, height: int, width: int, stride: int, count: int,
    dtype: torch.dtype, last: bool, device: torch.device, peers: set[str],
) -> Iterator[Case]:  # fmt: skip
    x = feature_map((batch, channels, height // stride, width // stride), dtype, last, device).requires_grad_()
    rois = regions(batch, count, height, width, generator()).to(device)
    if dtype == torch.bfloat16:
        peers = peers - {"torchvision"}  # it has no kernel for it

    def ours() -> Tensor:
        return roi_pool(x, rois, BINS, 1 / stride)

    def torchvision() -> Tensor:
        from torchvision.ops import roi_pool as peer

        return peer(x, rois.to(dtype), BINS, 1 / stride)

    def plain() -> Tensor:
        return textbook.roi_pool(x, rois, BINS, 1 / stride)

    rivals = chosen(peers, rcnn=ours, torchvision=torchvision, torch=plain)
    graphs = {name: function() for name, function in rivals.items()}

    def gate() -> None:
        output = graphs["rcnn"]
        for r in range(0, len(rois), max(1, len(rois) // 3)):
            planes = x[int(rois[r, 0]), :2].double().tolist()
            expected, _ = reference.roi_pool(planes, rois[r, 1:].tolist(), (BINS, BINS), 1 / stride)
            assert output[r, :2].tolist() == expected
        assert torch.equal(output.cpu(), textbook.roi_pool(x.detach().cpu(), rois.cpu(), BINS, 1 / stride))
        if "torchvision" in peers and dtype == torch.float32:
            assert torch.equal(output, graphs["torchvision"])

    output, size = graphs["rcnn"].numel(), x.element_size()
    name = (
        f"{batch} x {channels} x {height} x {width} at stride {stride}; {batch * count:,} regions, "
        f"{'channels-last' if last else 'NCHW'}"
    )
    extent = ((rois[:, 3:] - rois[:, 1:3]) / stride / BINS + 1).prod(dim=1).sum().item()
    visits = int(extent * BINS**2 * channels)
    forward = output * (size + 4) + x.numel() * size + 20 * len(rois)
    yield Case(f"forward, {name}", rivals, gate, forward, visits, dtype, grad=True)

    # Whole numbers, of which every sum is exact.
    grad = torch.randint(-8, 9, graphs["rcnn"].shape, generator=generator(2)).to(device, dtype)
    grad = grad.contiguous(memory_format=torch.channels_last) if last else grad

    def backward(graph: Tensor) -> Tensor:
        return torch.autograd.grad(graph, x, grad, retain_graph=True)[0]

    def backward_gate() -> None:
        found = backward(graphs["rcnn"])
        for name, graph in graphs.items():
            if name != "rcnn" and dtype == torch.float32:
                assert torch.equal(found, backward(graph))
        if device.type == "cuda":
            needing = x.detach().cpu().requires_grad_()
            expected = torch.autograd.grad(roi_pool(needing, rois.cpu(), BINS, 1 / stride), needing, grad.cpu())[0]
            assert torch.equal(found.cpu(), expected)

    yield Case(
        f"backward, {name}",
        {name: (lambda graph=graph: backward(graph)) for name, graph in graphs.items()},
        backward_gate,
        output * (size + 4) + x.numel() * size,
        output,
        dtype,
        grad=True,
    )
