"""What of CUDA this machine and this Python have. Asking never fails: what cannot be had is a fact, too."""

import ctypes
import errno
import importlib.metadata
import os
import platform
import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from rcnn.kernels import _launch

T = TypeVar("T")
Version = tuple[int, int]

#: Distributions that put files into the package ``cupy``; ``cuda`` is the CUDA in a wheel's name.
CUPY = re.compile(r"cupy(-cuda(?P<cuda>\d+)x?|-rocm-.+)?|amd-cupy")
#: Distributions of NVRTC, for CUDA 12 and from 13 on.
NVRTC = re.compile(r"nvidia-cuda-nvrtc(-cu\d+)?")
#: The kernel driver's own account of itself and of its GPUs.
_PROC = Path("/proc/driver/nvidia")
#: Bytes that must fit into the cache folder: more than all kernels of one GPU.
_ROOM = 4 << 20
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


def dotted(version: Version) -> str:
    """A version as it is written: 12.9."""
    return f"{version[0]}.{version[1]}"


@dataclass(frozen=True)
class GPU:
    """A GPU: name, compute capability, memory in bytes."""

    name: str
    capability: Version
    memory: int

    def __str__(self) -> str:
        return f"{self.name} (compute capability {dotted(self.capability)})"


@dataclass(frozen=True)
class Facts:
    """What :func:`gather` found. A version that is None is not there; a problem that is empty is none.

    Attributes:
        torch: version of torch.
        torch_cuda: CUDA that torch is built for.
        torch_archs: what this build has code for, as ``sm_90``; empty where torch cannot use a GPU.
        torch_gpu: whether torch can use a GPU.
        torch_problem: what torch says where it cannot.
        driver: version of the NVIDIA driver.
        driver_cuda: newest CUDA that the driver runs.
        driver_problem: why the driver gives no GPU.
        gpus: the GPUs that this process can reach.
        gpus_listed: how many the driver lists, in reach or not.
        gpus_hidden: whether ``CUDA_VISIBLE_DEVICES`` chooses among them.
        cupy: version of CuPy by the name of its distribution; more than one where several are installed.
        cupy_loads: whether CuPy can be imported.
        cupy_problem: why not.
        nvrtc: version of the NVRTC that CuPy loads.
        nvrtc_archs: compute capabilities, times 10, that it compiles for, rising.
        nvrtc_problem: why it does not load.
        nvrtc_wheels: version of each wheel of NVRTC that pip holds to be installed, by name, whether or not its files
            are there.
        cache: folder of compiled kernels.
        cache_bytes: their size.
        cache_problem: why nothing can be written there.
        cupy_cache: folder of what CuPy compiles for itself, which no kernel of ours is.
        cupy_cache_problem: why it is not there and cannot be made.
        python: version of Python, and the platform.
    """

    torch: str
    torch_cuda: str | None = None
    torch_archs: tuple[str, ...] = ()
    torch_gpu: bool = False
    torch_problem: str = ""
    driver: str | None = None
    driver_cuda: Version | None = None
    driver_problem: str = ""
    gpus: tuple[GPU, ...] = ()
    gpus_listed: int = 0
    gpus_hidden: bool = False
    cupy: dict[str, str] = field(default_factory=dict)
    cupy_loads: bool = False
    cupy_problem: str = ""
    nvrtc: Version | None = None
    nvrtc_archs: tuple[int, ...] = ()
    nvrtc_problem: str = ""
    nvrtc_wheels: dict[str, str] = field(default_factory=dict)
    cache: str = ""
    cache_bytes: int = 0
    cache_problem: str = ""
    cupy_cache: str = ""
    cupy_cache_problem: str = ""
    python: str = ""

    @property
    def torch_major(self) -> int:
        """Major version of torch's CUDA, or 0."""
        return int((self.torch_cuda or "0").split(".")[0])

    @property
    def driver_major(self) -> int:
        """Major version of the newest CUDA that the driver runs, or 0."""
        return self.driver_cuda[0] if self.driver_cuda else 0


def gather() -> Facts:
    """Ask this machine. Whatever fails becomes a fact; no CUDA context is made."""
    torch_gpu, torch_problem = _ask(_torch_gpu)
    driver_cuda, _ = _ask(_driver_cuda)
    gpus, driver_problem = _ask(_gpus)
    # Asked before CuPy is imported: where this folder cannot be made, another one takes its place then.
    cupy_cache = os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache"))
    _, cupy_cache_problem = _ask(lambda: os.makedirs(cupy_cache, exist_ok=True))
    nvrtc, nvrtc_problem = _ask(_launch.nvrtc_version)
    cupy_loads = sys.modules.get("cupy") is not None  # a failed import leaves nothing there
    archs, _ = _ask(_launch.nvrtc_archs)
    cache = _launch.cache_folder()
    _, cache_problem = _ask(lambda: _write_into(cache))
    return Facts(
        torch=str(torch.__version__),
        torch_cuda=torch.version.cuda,
        torch_archs=tuple(_ask(torch.cuda.get_arch_list)[0] or ()),
        torch_gpu=bool(torch_gpu),
        torch_problem=torch_problem,
        driver=_ask(_driver_version)[0],
        driver_cuda=driver_cuda,
        driver_problem=driver_problem,
        gpus=gpus or (),
        gpus_listed=_ask(lambda: len(list((_PROC / "gpus").iterdir())))[0] or 0,
        gpus_hidden="CUDA_VISIBLE_DEVICES" in os.environ,
        cupy=_ask(_cupy_wheels)[0] or {},
        cupy_loads=cupy_loads,
        cupy_problem="" if cupy_loads else nvrtc_problem,
        nvrtc=nvrtc,
        nvrtc_archs=tuple(archs or ()),
        nvrtc_problem=nvrtc_problem if cupy_loads else "",
        nvrtc_wheels=_ask(lambda: _wheels(NVRTC))[0] or {},
        cache=str(cache),
        cache_bytes=_ask(lambda: sum(file.stat().st_size for file in cache.iterdir()))[0] or 0,
        cache_problem=cache_problem,
        cupy_cache=cupy_cache,
        cupy_cache_problem=cupy_cache_problem,
        python=f"{platform.python_version()} on {platform.platform()}",
    )


def _ask(question: Callable[[], T]) -> tuple[T | None, str]:
    """The answer, or None and the reason why there is none, on one line."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # CuPy warns of what is said here anyway
            return question(), ""
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and cause.strerror:
            return None, f"{cause.strerror}: {cause.filename}" if cause.filename else cause.strerror
        # CuPy frames the error that matters with advice.
        text = str(cause).split("Original error:")[-1]
        lines = [line for raw in text.splitlines() if (line := raw.strip(" =\t"))]
        return None, lines[0] if lines else type(cause).__name__


def _torch_gpu() -> bool:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.cuda.is_available()
    if said and not usable:
        raise RuntimeError(str(said[-1].message))
    return usable


def _cupy_wheels() -> dict[str, str]:
    return _wheels(CUPY)


def _wheels(pattern: re.Pattern[str]) -> dict[str, str]:
    """Version of each distribution whose name fits."""
    names = {re.sub(r"[-_.]+", "-", each.metadata["Name"] or "").lower() for each in importlib.metadata.distributions()}
    found = {}
    for name in sorted(filter(pattern.fullmatch, names)):
        with suppress(importlib.metadata.PackageNotFoundError):  # what pip leaves when it cannot delete: ~upy_cuda12x
            found[name] = importlib.metadata.version(name)
    return found


def _driver_version() -> str:
    first = (_PROC / "version").read_text(encoding="utf-8").splitlines()[0]
    return re.findall(r"\b\d{3,}(?:\.\d+)+", first)[0]


def _libcuda() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _call(cuda: ctypes.CDLL, name: str, *arguments: Any) -> None:
    if code := getattr(cuda, name)(*arguments):
        text = ctypes.c_char_p()
        cuda.cuGetErrorName(code, ctypes.byref(text))
        raise RuntimeError(f"its driver fails in {name} with {(text.value or b'error').decode()} ({code})")


def _driver_cuda() -> Version:
    version = ctypes.c_int()
    _call(_libcuda(), "cuDriverGetVersion", ctypes.byref(version))  # needs no GPU and starts nothing
    return version.value // 1000, version.value % 1000 // 10


def _gpus() -> tuple[GPU, ...]:
    """The GPUs that the driver gives this process, asked of the driver itself: this torch may know no CUDA."""
    cuda = _libcuda()
    if cuda.cuInit(0) == _NO_DEVICE:
        return ()
    _call(cuda, "cuInit", 0)
    count, device, value = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    memory, text = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    _call(cuda, "cuDeviceGetCount", ctypes.byref(count))
    gpus = []
    for ordinal in range(count.value):
        _call(cuda, "cuDeviceGet", ctypes.byref(device), ordinal)
        _call(cuda, "cuDeviceGetName", text, len(text), device)
        _call(cuda, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
        capability = []
        for attribute in (75, 76):  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
            _call(cuda, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            capability.append(value.value)
        gpus.append(GPU(text.value.decode(errors="replace"), (capability[0], capability[1]), memory.value))
    return tuple(gpus)


def _write_into(folder: Path) -> None:
    """Fill a nameless file in a folder, or in what it would be made in; nothing stays behind."""
    place = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not place.exists():
        raise FileNotFoundError(errno.ENOENT, "Link to a folder that does not exist", str(place))
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(bytes(_ROOM))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(place)) from None
