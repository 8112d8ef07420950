"""Compile time of every kernel source: anew, and found in the cache of an earlier process.

On a machine without a GPU the compiler alone is timed, for the architecture named in the row; on a GPU loading
is in it.
"""

import os
import tempfile
import time
from typing import Any
from unittest.mock import patch

import torch

from rcnn.kernels import _launch
from rcnn.kernels.warmup import SOURCES

#: What is compiled for where there is no GPU.
ARCH = "sm_90"


def rows(device: torch.device) -> list[dict[str, Any]]:
    """One row for each source, storage type and state of the cache; none without CuPy and NVRTC."""
    try:
        _launch.nvrtc_version()
    except _launch.KernelError:
        return []
    result = []
    # Both name the user's cache folder, on POSIX and on Windows.
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, XDG_CACHE_HOME=folder, LOCALAPPDATA=folder):
        for source in SOURCES:
            for dtype in source.dtypes:
                _launch.compile_source(source, dtype, "compute_90")  # NVRTC's own start is not this source's
                for state in ("cold", "from the cache"):
                    start = time.perf_counter()
                    if device.type == "cuda":
                        index = torch.cuda.current_device() if device.index is None else device.index
                        _launch._load.__wrapped__(source, dtype, index)
                    else:
                        _launch._compiled(source, dtype, ARCH, anew=False)
                    seconds = time.perf_counter() - start
                    kind = "" if dtype is None else str(dtype).removeprefix("torch.")
                    target = torch.cuda.get_device_name(device) if device.type == "cuda" else ARCH
                    result.append(
                        {"source": source.name, "dtype": kind, "for": target, "state": state, "seconds": seconds}
                    )
    return result
