"""Warmup: every kernel compiled and loaded before it is needed."""

import torch

from rcnn.kernels import _launch
from rcnn.kernels.anchors import SOURCE as ANCHORS
from rcnn.kernels.detections import SOURCE as DETECTIONS
from rcnn.kernels.matching import SOURCE as MATCHING
from rcnn.kernels.nms import SOURCE as NMS
from rcnn.kernels.proposals import SOURCE as PROPOSALS
from rcnn.kernels.roi_align import SOURCE as ROI_ALIGN
from rcnn.kernels.roi_pool import SOURCE as ROI_POOL
from rcnn.kernels.sorting import SOURCE as SORTING

#: The CUDA body of every op. A test compares this with the ``.cu`` files of the folder.
SOURCES: tuple[_launch.CudaSource, ...] = (
    ANCHORS,
    DETECTIONS,
    MATCHING,
    NMS,
    PROPOSALS,
    ROI_ALIGN,
    ROI_POOL,
    SORTING,
)


def warmup(device: torch.device | str | int | None = None) -> None:
    """Compile, or read from the cache, and load all kernels for all storage types.

    Without it each op does so at its first call, which takes a while and must not happen while a CUDA graph is
    captured, because a module cannot be loaded then.

    Args:
        device: a CUDA device; the current one by default.

    Raises:
        ValueError: the device is not a CUDA device.
        rcnn.kernels._launch.KernelError: CuPy, NVRTC, the GPU or the cache fails; the message says what mends it.
    """
    try:
        where = torch.device("cuda" if device is None else device)
    except RuntimeError:
        raise ValueError(f"device must be a CUDA device, as cuda or cuda:1, got {device!r}") from None
    if where.type != "cuda":
        raise ValueError(f"warmup is for CUDA devices, got {where}: the CPU has nothing to compile")
    found = torch.cuda.device_count()
    if (where.index or 0) >= found:
        raise ValueError(f"device must be one of the {found} CUDA devices that torch finds, got {where}")
    index = torch.cuda.current_device() if where.index is None else where.index
    for source in SOURCES:
        for dtype in source.dtypes:
            _launch.load(source, dtype, index)
