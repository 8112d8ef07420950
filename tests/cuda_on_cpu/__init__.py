"""The ``.cu`` files of ``rcnn/kernels`` on a machine without a GPU: compiled by g++, each CUDA thread a fiber.

:class:`Emulator` takes the place of ``rcnn.kernels._launch.launch`` and ``uses_kernels``, so that CPU tensors go
through the launchers, their grids and their arguments, and through the unmodified kernels. Every argument is checked
against the kernel's signature. ``CUDA_ON_CPU`` in the environment names a checker to build with: ``address`` (with
undefined behaviour; libasan must be preloaded) or ``races``; ``python -m tests.cuda_on_cpu`` does that for the tests.
"""

import contextlib
import ctypes
import getpass
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rcnn.kernels import _launch

HERE = Path(__file__).parent
#: Warp votes and shuffles only (sm_61), reductions of a warp (sm_80), vector atomics (sm_90).
ARCHS = (610, 800, 900)
SANITIZERS = {
    "": (),
    "address": ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fsanitize-sections=cuda_shared"),
    "races": ("-fsanitize=thread", "-fno-inline-functions"),
}
FLAGS = (
    *("-std=c++17", "-g1", "-fPIC", "-shared", "-ffp-contract=off", "-fno-strict-aliasing", "-fno-gnu-unique"),
    *("-Wall", "-Wno-unknown-pragmas", "-Wno-unused-function", "-Wno-unused-variable", "-Wno-unused-but-set-variable"),
)
#: How the words of a signature name the element types of tensors.
WORDS = {
    torch.float32: "f4",
    torch.bfloat16: "o2",
    torch.float16: "o2",
    torch.int64: "i8",
    torch.int32: "i4",
    torch.int16: "i2",
    torch.int8: "i1",
    torch.uint8: "u1",
    torch.bool: "u1",
    np.int32: "i4",
    np.int64: "i8",
    np.uint64: "u8",
    np.float32: "f4",
}


class EmulatorError(AssertionError):
    """A kernel did what it must not, or was launched with arguments that do not fit it."""


def build(text: str, kernels: Sequence[str], options: Sequence[str], arch: int, sanitizer: str) -> Path:
    """Compile a spliced source to a shared library, kept in the temporary folder under a hash of all that goes in."""
    compiler = shutil.which("g++")
    if compiler is None:
        raise EmulatorError("the kernels are emulated by g++, which is not on the PATH: apt-get install g++")
    entries = "\n".join(f"KERNEL_ENTRY({name})" for name in kernels)
    code = f'#define __CUDA_ARCH__ {arch}\n#include "cuda_on_cpu.h"\n{text}\n{entries}\n'
    optimise = "-O2" if not sanitizer else "-O1"
    flags = (*FLAGS, optimise, *options, *SANITIZERS[sanitizer], f"-I{HERE}")
    headers = [path.read_text(encoding="utf-8") for path in sorted(HERE.glob("*.h"))]
    key = hashlib.sha256("\0".join((code, *headers, *flags, _version(compiler))).encode()).hexdigest()[:24]
    folder = Path(tempfile.gettempdir()) / f"cuda-on-cpu-{getpass.getuser()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"{key}.so"
    if not library.exists():
        source, made = folder / f"{key}.{os.getpid()}.cpp", folder / f"{key}.{os.getpid()}.so"
        source.write_text(code, encoding="utf-8")
        # -fsanitize=thread is only for the calls it puts in: its library is not linked, races.h has the functions.
        steps = [[compiler, *flags, str(source), "-o", str(made)]]
        if sanitizer == "races":
            compiled = made.with_suffix(".o")
            link = [flag for flag in flags if "sanitize" not in flag]
            steps = [
                [compiler, *(flag for flag in flags if flag != "-shared"), "-c", str(source), "-o", str(compiled)],
                [compiler, *link, str(compiled), "-o", str(made)],
            ]
        for step in steps:
            done = subprocess.run(step, capture_output=True, text=True)
            if done.returncode:
                raise EmulatorError(f"g++ does not compile it:\n{done.stderr[:4000]}")
        os.replace(made, library)
        for rest in (source, made.with_suffix(".o")):
            rest.unlink(missing_ok=True)
    stray = _stray_shared(library)  # of a kept library, too
    if stray:
        raise EmulatorError(
            f"not in the section of shared memory: {', '.join(stray)}. g++ drops it in templates, where neither "
            "garbage nor races would be seen: declare the variable in the kernel and pass it"
        )
    return library


def _stray_shared(library: Path) -> list[str]:
    """Variables in functions, other than those of the emulator, outside shared memory; kernels have no such memory."""
    command = ["objdump", "-t", "-C", str(library)]
    try:
        table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise EmulatorError("the kernels are looked through by objdump, of the binutils that g++ needs") from error
    found = re.findall(r"^\w+ .{6}O (\.(?:t?bss|t?data)\S*)\s\w+ +(?:\.hidden )?(\S.*)$", table, re.MULTILINE)
    return sorted(name for _, name in found if "::" in name and not name.startswith("emulator::"))


def checked_environment(checker: str) -> dict[str, str]:
    """Environment of a process whose kernels are built with ``address`` or ``races``."""
    environment = dict(os.environ, CUDA_ON_CPU=checker)
    if checker == "address":
        command = ["g++", "-print-file-name=libasan.so"]
        environment["LD_PRELOAD"] = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        environment["ASAN_OPTIONS"] = "detect_leaks=0:detect_stack_use_after_return=0:detect_odr_violation=0"
        environment["UBSAN_OPTIONS"] = "print_stacktrace=1"
    return environment


@lru_cache(maxsize=1)
def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout


class Emulator:
    """Launches kernels on CPU tensors; stands in for ``_launch.launch``."""

    def __init__(self) -> None:
        self.seed = 0
        self.architecture = ARCHS[-1]
        self.sanitizer = os.environ.get("CUDA_ON_CPU", "")
        self.launches: list[str] = []
        self._libraries: dict[Any, ctypes.CDLL] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator["Emulator"]:
        """Every op takes its CUDA body while this lasts."""
        before = _launch.uses_kernels, _launch.launch
        _launch.uses_kernels, _launch.launch = lambda x: True, self.launch
        try:
            yield self
        finally:
            _launch.uses_kernels, _launch.launch = before

    @contextlib.contextmanager
    def order(self, seed: int) -> Iterator[None]:
        """Blocks and fibers run in an order drawn by the seed; 0 is the order of their numbers."""
        before, self.seed = self.seed, seed
        try:
            yield
        finally:
            self.seed = before

    @contextlib.contextmanager
    def arch(self, arch: int) -> Iterator[None]:
        """Compile with this ``__CUDA_ARCH__``: 610, 800 or 900."""
        before, self.architecture = self.architecture, arch
        try:
            yield
        finally:
            self.architecture = before

    def launch(
        self,
        source: _launch.CudaSource,
        kernel: str,
        grid: int | tuple[int, ...],
        block: int | tuple[int, ...],
        args: Sequence[Any],
        *,
        dtype: torch.dtype | None = None,
        shared: int = 0,
    ) -> None:
        """As ``_launch.launch``, at once and here."""
        blocks, threads = _launch.check(source, grid, block, args)
        if 0 in blocks:
            return
        count = int(np.prod(threads))
        if not 1 <= count <= 1024 or threads[2] > 64:
            raise EmulatorError(f"{kernel}: a block has 1 to 1024 threads, got {threads}")
        if shared > 227 << 10:
            raise EmulatorError(f"{kernel}: no GPU has {shared} bytes of shared memory for a block")
        library = self._library(source, dtype)
        signature = getattr(library, f"signature_{kernel}")
        signature.restype = ctypes.c_char_p
        words = signature().decode().split()
        if len(words) != len(args):
            raise EmulatorError(f"{kernel} takes {len(words)} arguments, got {len(args)}")
        values = [_value(kernel, i, word, arg) for i, (word, arg) in enumerate(zip(words, args, strict=True))]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        sizes = (ctypes.c_uint * 6)(*blocks, *threads)
        run = getattr(library, f"run_{kernel}")
        run.restype = ctypes.c_char_p
        run.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64]
        self.launches.append(kernel)
        if self.sanitizer == "races":
            tensors = [arg for arg in args if isinstance(arg, Tensor)]
            ends = [end for x in tensors for end in (x.data_ptr(), x.data_ptr() + x.numel() * x.element_size())]
            ranges = (ctypes.c_uint64 * len(ends))(*ends)
            library.watch(ranges, len(tensors))
        error = run(pointers, sizes, shared, self.seed)
        if error:
            raise EmulatorError(f"{kernel}: {error.decode()}")

    def _library(self, source: _launch.CudaSource, dtype: torch.dtype | None) -> ctypes.CDLL:
        options = source.defines(dtype)
        text = source.text()
        arch = self.architecture if "__CUDA_ARCH__" in text else ARCHS[-1]
        key = (text, options, arch, self.sanitizer)
        if key not in self._libraries:
            path = build(text, source.kernels(), options, arch, self.sanitizer)
            self._libraries[key] = ctypes.CDLL(str(path))
        return self._libraries[key]


def _value(kernel: str, position: int, word: str, arg: Any) -> Any:
    """The argument as ctypes, if it is of the parameter's type."""
    if isinstance(arg, Tensor):
        got = f"*{WORDS.get(arg.dtype, str(arg.dtype))}"
        # A pointer to a vector of floats or ints takes a tensor of them.
        vectors = {"*o8": ("*f4", "*i4"), "*o16": ("*f4", "*i4", "*i8")}
        if got != word and got not in vectors.get(word, ()) and got.replace("i", "u") != word:
            raise EmulatorError(f"{kernel}: argument {position} is {word} in the kernel, got a tensor of {arg.dtype}")
        return ctypes.c_void_p(arg.data_ptr())
    if arg is None:
        if not word.startswith("*"):
            raise EmulatorError(f"{kernel}: argument {position} is {word} in the kernel, got None")
        return ctypes.c_void_p(0)
    got = WORDS[type(arg)]
    if got != word and got.replace("i", "u") != word:
        raise EmulatorError(f"{kernel}: argument {position} is {word} in the kernel, got {type(arg).__name__}")
    return np.ctypeslib.as_ctypes_type(type(arg))(arg.item())
