"""From a ``.cu`` file to a running kernel: read, compile by NVRTC, keep, and launch on torch's stream through CuPy.

The only file that imports CuPy, and only once a kernel is asked for. What it knows, so that no op has to:

* A launch copies its arguments and knows no types. Numbers must come as NumPy scalars of the kernel's types.
* Tensors cross as their addresses, all arguments packed at once. An exchange by DLPack costs the host 3 microseconds
  for each tensor (docs/kernels.md); here is neither a CuPy array to hold nor a stream to wait for.
* Autograd runs the backward pass in a thread of its own: every launch names torch's current stream, and the first of
  a thread makes the device's context current in it.
* NVRTC's output is kept in a file named by a hash of the spliced source, the options and the compiler. CuPy's own
  cache does not see a change of an included file, and CuPy adds ``-ftz=true``, which would flush small areas to zero.
* A module must be loaded before a CUDA graph is captured: :func:`load`, which ``rcnn.kernels.warmup`` calls.
"""

import contextlib
import ctypes
import hashlib
import os
import re
import struct
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rcnn.files import atomic_write

HERE = Path(__file__).parent
#: Names in ``scalar.cuh`` of the types that maps and head outputs are stored in.
SCALARS = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float16: "float16"}
#: Options of every compilation. No fused multiply-add: areas, IoU and clipping have the bits of the CPU.
OPTIONS = ("-std=c++17", "--fmad=false")
#: Shared memory in bytes that a block gets without asking, static and dynamic together.
SHARED_LIMIT = 48 << 10
#: GPUs of Jetson boards: their machine code runs on no other GPU, nor that of another on them (CUDA C++ Programming
#: Guide, "Binary Compatibility").
_TEGRA = {53, 62, 72, 87, 101, 110}
#: The command that knows the driver, the wheels and the line that mends them.
_ADVICE = "python -m rcnn.env gives the pip line that mends it"

_INCLUDE = re.compile(r'^#include "(\w+\.cuh)"$', re.MULTILINE)
_KERNEL = re.compile(r'extern "C" __global__ void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(')
#: Layout of each kind of argument; all take 8 bytes.
_LAYOUT: dict[type, str] = {np.int32: "i4x", np.float32: "f4x", np.int64: "q", np.uint64: "Q"}
#: Arguments of a kernel at most.
_ARGUMENTS = 128
_lock = threading.Lock()


class KernelError(ValueError):
    """A kernel cannot be compiled, loaded or launched here; the message says why and what mends it."""


class CudaSource:
    """A ``.cu`` file of this folder with the constants that its launcher shares with it.

    Launcher, compile gate and emulator all take the source from here.

    Args:
        name: of the file, without its ending.
        dtypes: storage types; the file is compiled once for each, with ``SCALAR`` defined. Without them, once.
        folder: where the file is; what it includes is always in this one.
        constants: integers that reach the file as macros.
    """

    def __init__(self, name: str, *, dtypes: Sequence[torch.dtype] = (), folder: Path = HERE, **constants: int) -> None:
        self.name, self.folder, self.constants = name, folder, constants
        self.dtypes: tuple[torch.dtype | None, ...] = tuple(dtypes) or (None,)

    def text(self) -> str:
        """The file with its includes put in their place, under ``#line`` so that errors name the right one."""
        path = f"{self.name}.cu"
        text = (self.folder / path).read_text(encoding="utf-8")
        for match in reversed(list(_INCLUDE.finditer(text))):
            line = text.count("\n", 0, match.start()) + 2
            header = (HERE / match[1]).read_text(encoding="utf-8")
            spliced = f'#line 1 "{match[1]}"\n{header}\n#line {line} "{path}"'
            text = text[: match.start()] + spliced + text[match.end() :]
        return f'#line 1 "{path}"\n{text}'

    def kernels(self) -> list[str]:
        """Names of the kernels in the file."""
        return _KERNEL.findall(self.text())

    def defines(self, dtype: torch.dtype | None) -> tuple[str, ...]:
        """Compiler options for the constants and the storage type."""
        if dtype not in self.dtypes:
            known = ", ".join(str(each).removeprefix("torch.") for each in self.dtypes)
            raise ValueError(f"{self.name}: dtype must be one of {known} on a GPU, got {dtype}")
        scalar = () if dtype is None else (f"-DSCALAR={SCALARS[dtype]}",)
        return tuple(f"-D{name}={value}" for name, value in self.constants.items()) + scalar


def uses_kernels(x: Tensor) -> bool:
    """Whether an op on this tensor runs its CUDA body."""
    return x.is_cuda


def dense(x: Tensor) -> Tensor:
    """The same values, contiguous and from a 16-byte boundary on, as kernels that read a box at a time need them."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def launch(
    source: CudaSource,
    kernel: str,
    grid: int | tuple[int, ...],
    block: int | tuple[int, ...],
    args: Sequence[Tensor | np.generic | None],
    *,
    dtype: torch.dtype | None = None,
    shared: int = 0,
) -> None:
    """Start a kernel on torch's current stream of the tensors' device, and return at once.

    Args:
        source: the file.
        kernel: name in the file.
        grid: blocks in x, y, z; those left out are 1; nothing happens if one is 0.
        block: threads in x, y, z, likewise.
        args: dense tensors on one device, None for a null pointer, NumPy scalars of the kernel's types.
        dtype: storage type, for a source that has several.
        shared: dynamic shared memory, bytes.

    Raises:
        ValueError: the arguments cannot be those of a kernel; :func:`check` says which.
        KernelError: CuPy, NVRTC or the cache fails, or the GPU is none that NVRTC knows. What the driver says of a
            launch is CuPy's error.
    """
    blocks, threads = check(source, grid, block, args)
    if 0 in blocks:
        return
    device = next(x.device for x in args if isinstance(x, Tensor))
    index = device.index if device.index is not None else torch.cuda.current_device()
    cupy = _cupy()
    # Without this guard the launch would go to the device that is current in this thread.
    guard = cupy.cuda.Device(index) if cupy.cuda.runtime.getDevice() != index else contextlib.nullcontext()
    with guard:
        if index not in _packed.devices:
            cupy.cuda.runtime.setDevice(index)
            _packed.devices.add(index)
        loaded = load(source, dtype, index)[kernel]
        if shared > loaded.shared:
            loaded.function.max_dynamic_shared_size_bytes = loaded.shared = shared
        _packed.put(args)
        stream = torch.cuda.current_stream(index).cuda_stream
        cupy.cuda.driver.launchKernel(loaded.pointer, *blocks, *threads, shared, stream, _packed.address, 0)


class _Packed(threading.local):
    """The arguments of a launch in memory, a thread's own: the driver has read them when the launch returns.

    Attributes:
        address: of an array with the address of each argument, as the driver takes it.
        devices: whose context has been current in this thread.
    """

    def __init__(self) -> None:
        self._values = (ctypes.c_char * (8 * _ARGUMENTS))()
        first = ctypes.addressof(self._values)
        self._addresses = (ctypes.c_void_p * _ARGUMENTS)(*range(first, first + 8 * _ARGUMENTS, 8))
        self.address = ctypes.addressof(self._addresses)
        self.devices: set[int] = set()

    def put(self, args: "Sequence[Tensor | np.generic | None]") -> None:
        """Write tensors as addresses, None as a null pointer, numbers as they are."""
        layout = "=" + "".join([_LAYOUT.get(type(x), "Q") for x in args])
        values = [x.data_ptr() if isinstance(x, Tensor) else 0 if x is None else x for x in args]
        struct.pack_into(layout, self._values, 0, *values)


_packed = _Packed()


def check(
    source: CudaSource, grid: int | tuple[int, ...], block: int | tuple[int, ...], args: Sequence[Any]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Refuse what CuPy would pass on unseen; gives grid and block as three numbers each.

    Raises:
        ValueError: a tensor is not dense, has 2**31 elements or more, or lies on another device than the others.
        TypeError: an argument is a Python number or anything else that a kernel does not take.
    """
    device = None
    for position, x in enumerate(args):
        if x is None or type(x) in _LAYOUT:
            continue
        if not isinstance(x, Tensor):
            raise TypeError(
                f"{source.name}: argument {position} must be a tensor, None or a NumPy int32, int64, uint64 or "
                f"float32, got {type(x).__name__}"
            )
        if device is None:
            device = x.device
        elif x.device != device:
            raise ValueError(f"{source.name}: all tensors must be on one device, got {device} and {x.device}")
        if x.numel() >= 1 << 31:
            raise ValueError(
                f"{source.name}: a tensor must have fewer than 2**31 elements on a GPU, got {tuple(x.shape)}"
            )
        if not (x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))):
            raise ValueError(f"{source.name}: argument {position} must be dense, got strides {x.stride()}")
    if len(args) > _ARGUMENTS:
        raise ValueError(f"{source.name}: a kernel takes at most {_ARGUMENTS} arguments, got {len(args)}")
    blocks, threads = _three(grid), _three(block)
    for limit, blocks_in in zip((2**31 - 1, 65535, 65535), blocks, strict=True):
        if blocks_in > limit:
            raise ValueError(f"{source.name}: a grid is limited to {limit} blocks here, got {blocks}")
    return blocks, threads


def _three(extent: int | tuple[int, ...]) -> tuple[int, ...]:
    return (extent, 1, 1) if isinstance(extent, int) else (*extent, 1, 1)[:3]


@dataclass
class _Loaded:
    """A kernel on a device: CuPy's object, the driver's handle, and the dynamic shared memory that it may have, which
    is what its static one leaves."""

    function: Any
    pointer: int
    shared: int


def load(source: CudaSource, dtype: torch.dtype | None, index: int) -> dict[str, _Loaded]:
    """Compile, or find compiled, and load all kernels of a source on a device.

    Args:
        source: the file.
        dtype: storage type, or None.
        index: of the CUDA device.

    Returns:
        Kernels by name.

    Raises:
        KernelError: CuPy, NVRTC, the GPU or the cache fails.
    """
    with _lock:  # else two threads would load a module each, and one be dropped under its kernel
        return _load(source, dtype, index)


@cache
def _load(source: CudaSource, dtype: torch.dtype | None, index: int) -> dict[str, _Loaded]:
    cupy = _cupy()
    with cupy.cuda.Device(index):
        arch = target(torch.cuda.get_device_capability(index), torch.cuda.get_device_name(index))
        for attempt in ("kept", "new"):
            path = _compiled(source, dtype, arch, anew=attempt == "new")
            try:
                module = cupy.RawModule(path=str(path))
                functions = {name: module.get_function(name) for name in source.kernels()}
                # Asking for the handle loads the module now: it must not happen during a graph's capture.
                return {
                    name: _Loaded(function, function.kernel.ptr, SHARED_LIMIT - function.shared_size_bytes)
                    for name, function in functions.items()
                }
            except Exception as error:  # CuPy has no common base of the driver's errors
                failure = error
        raise KernelError(
            f"{source.name}.cu was compiled for {arch} but {torch.cuda.get_device_name(index)} does not load it: "
            f"{failure}; {_ADVICE}"
        ) from failure


def fitting(capability: tuple[int, int], known: Sequence[int]) -> str | None:
    """The best that NVRTC can make for a GPU.

    Args:
        capability: compute capability of the GPU.
        known: compute capabilities, times 10, that NVRTC compiles for.

    Returns:
        ``sm_90``; or ``compute_120`` for the driver to finish, for a GPU newer than all of them; or None.
    """
    wanted = 10 * capability[0] + capability[1]
    # Machine code runs on every later minor version of the same major.
    same = [arch for arch in known if arch // 10 == capability[0] and arch <= wanted]
    fits = [arch for arch in same if arch == wanted or not {arch, wanted} & _TEGRA]
    if fits:
        return f"sm_{max(fits)}"
    return f"compute_{max(known)}" if known and wanted > max(known) else None


def target(capability: tuple[int, int], name: str) -> str:
    """What to compile for on a GPU, as :func:`fitting` says.

    Args:
        capability: compute capability of the GPU.
        name: of the GPU, for the error.

    Raises:
        KernelError: NVRTC no longer compiles for this GPU.
    """
    known = nvrtc_archs()
    found = fitting(capability, known)
    if found is None:
        raise KernelError(
            f"{name} (compute capability {capability[0]}.{capability[1]}) is none of those that NVRTC {_version()} "
            f"compiles for ({', '.join(f'{arch // 10}.{arch % 10}' for arch in known)}); {_ADVICE}"
        )
    if found.startswith("compute_"):
        warnings.warn(
            f"{name} (compute capability {capability[0]}.{capability[1]}) is newer than NVRTC {_version()} knows, so "
            f"that its driver compiles from {found}, which takes longer; {_ADVICE}",
            stacklevel=2,
        )
    return found


def compile_source(
    source: CudaSource, dtype: torch.dtype | None, arch: str, options: Sequence[str] = ()
) -> tuple[bytes, str]:
    """Compile a source by NVRTC; needs no GPU and no driver.

    Args:
        source: the file.
        dtype: storage type, or None.
        arch: ``sm_NN`` for machine code, ``compute_NN`` for PTX.
        options: more options of the compiler.

    Returns:
        The compiled file and the compiler's log.

    Raises:
        KernelError: CuPy or NVRTC is missing, or the source does not compile.
    """
    nvrtc = _nvrtc()
    program = nvrtc.createProgram(source.text(), f"{source.name}.cu", (), ())
    try:
        try:
            nvrtc.compileProgram(program, (*OPTIONS, f"--gpu-architecture={arch}", *source.defines(dtype), *options))
        except nvrtc.NVRTCError as error:
            lines = nvrtc.getProgramLog(program).splitlines()
            first = next((line for line in lines if "error" in line), lines[0] if lines else str(error))
            raise KernelError(
                f"{source.name}.cu does not compile for {arch} with NVRTC {_version()}: {first}"
            ) from None
        log = nvrtc.getProgramLog(program)
        # CuPy takes off the last byte, as if the cubin were a string; in a file it would be missing.
        return (nvrtc.getCUBIN(program) + b"\0" if arch.startswith("sm_") else nvrtc.getPTX(program)), log
    finally:
        nvrtc.destroyProgram(program)


def cache_folder() -> Path:
    """Where compiled kernels are kept: ``rcnn/kernels`` in the user's cache folder."""
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or os.path.expanduser("~/AppData/Local")
    elif sys.platform == "darwin":
        base = os.path.expanduser("~/Library/Caches")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "rcnn" / "kernels"


def _keep_here(name: str, content: bytes) -> Path:
    """Write a file for this process alone, gone when it ends: in memory, or else where temporary files go.

    Raises:
        KernelError: it can be written in neither.
    """
    for place in ("/dev/shm", None):
        try:
            path = Path(_temporary(place)) / name
            path.write_bytes(content)
            return path
        except OSError as error:
            failure = error
    raise KernelError(
        f"a compiled kernel can be kept neither in {cache_folder()} nor in a temporary folder: {failure}"
    ) from failure


@cache
def _temporary(place: str | None) -> str:
    _kept_open.append(tempfile.TemporaryDirectory(prefix="rcnn-kernels-", dir=place))
    return _kept_open[-1].name


_kept_open: list[tempfile.TemporaryDirectory] = []


def _compiled(source: CudaSource, dtype: torch.dtype | None, arch: str, anew: bool) -> Path:
    """File with the compiled source, from the cache or made now."""
    options = (*OPTIONS, arch, *source.defines(dtype), _version())
    key = hashlib.sha256("\0".join((source.text(), *options)).encode()).hexdigest()[:32]
    name = f"{source.name}-{key}.{'cubin' if arch.startswith('sm_') else 'ptx'}"
    folder = cache_folder()
    with contextlib.suppress(OSError):
        if not anew and (folder / name).stat().st_size:
            return folder / name
    binary, _ = compile_source(source, dtype, arch)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / name, lambda file: file.write(binary))
        return folder / name
    except OSError as error:
        _say_once(f"compiled kernels are kept for this process only, because {folder} cannot be written: {error}")
        return _keep_here(name, binary)


@cache
def _say_once(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)


def nvrtc_version() -> tuple[int, int]:
    """Version of the NVRTC that CuPy loads."""
    major, minor = _nvrtc().getVersion()
    return int(major), int(minor)


def nvrtc_archs() -> list[int]:
    """Compute capabilities, times 10, that NVRTC compiles for, rising."""
    return sorted(int(arch) for arch in _nvrtc().getSupportedArchs())


def _version() -> str:
    return "{}.{}".format(*nvrtc_version())


@cache
def _cupy() -> Any:
    try:
        # CuPy makes the folder of its own cache when it is imported, and fails where the home cannot be written. None
        # of our kernels goes there.
        os.makedirs(os.environ.get("CUPY_CACHE_DIR", os.path.expanduser("~/.cupy/kernel_cache")), exist_ok=True)
    except OSError:
        os.environ["CUPY_CACHE_DIR"] = str(_keep_here("empty", b"").parent)
    try:
        import cupy
    except Exception as error:  # a broken installation can raise anything
        missing = isinstance(error, ImportError) and error.name == "cupy"
        cause = f"is not installed: {_pip_line()}" if missing else f"does not load ({error}); {_ADVICE}"
        raise KernelError(f"a CUDA tensor needs CuPy, which {cause}") from error
    return cupy


@cache
def _nvrtc() -> Any:
    _cupy()
    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:  # CuPy raises RuntimeError, OSError or ImportError by version
        raise KernelError(f"kernels are compiled by NVRTC, which CuPy does not find ({error}); {_ADVICE}") from error
    return nvrtc


def _pip_line() -> str:
    """What installs CuPy and NVRTC for the CUDA of this torch."""
    major = 13 if (torch.version.cuda or "").startswith("13") else 12
    nvrtc = "nvidia-cuda-nvrtc" if major == 13 else "nvidia-cuda-nvrtc-cu12"
    return f"pip install cupy-cuda{major}x {nvrtc} (python -m rcnn.env checks that it fits the driver)"
