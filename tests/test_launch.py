"""The launcher against a stand-in for CuPy with the real NVRTC: what is passed on, what is refused, what is kept."""

import contextlib
import ctypes
import math
import struct
import subprocess
import sys
import threading
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_on_cpu
import numpy as np
import pytest
import torch

from rcnn.kernels import _launch
from rcnn.kernels._launch import CudaSource, KernelError

FOLDER = Path(cuda_on_cpu.__file__).parent


def source(**constants: int) -> CudaSource:
    return CudaSource("faults", folder=FOLDER, **{"THREADS": 64, "FAULT": 0, **constants})


class _Function:
    """What CuPy's ``RawKernel`` offers, and the driver's handle in it."""

    def __init__(self, name: str, path: str) -> None:
        self.name, self.path = name, path
        self.max_dynamic_shared_size_bytes = 0  # nobody has asked
        self.shared_size_bytes = 1 << 10

    @property
    def kernel(self) -> "_Function":
        if not Path(self.path).read_bytes().startswith((b"\x7fELF", b"//")):
            raise RuntimeError("CUDA_ERROR_INVALID_IMAGE: device kernel image is invalid")
        return self

    @property
    def ptr(self) -> int:
        return sum(map(ord, self.name))


@dataclass
class _Launch:
    """A call of the driver: grid, block and the first words of the packed arguments."""

    pointer: int
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    words: list[bytes]


class _Module:
    def __init__(self, *, path: str) -> None:
        self.path = path

    def get_function(self, name: str) -> _Function:
        return _Function(name, self.path)


class _Device(contextlib.nullcontext):
    entered: list[int] = []

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def __enter__(self) -> None:
        _Device.entered.append(self.index)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[types.SimpleNamespace]:
    """A machine with an H100 as device 1, as far as the launcher can tell; CPU tensors lie on it."""
    import cupy

    def launch(pointer: int, *numbers: int) -> None:
        *sizes, shared, stream, address, extra = numbers
        assert extra == 0
        words = [ctypes.string_at(place, 8) for place in (ctypes.c_void_p * 3).from_address(address)]
        fake.launches.append(_Launch(pointer, tuple(sizes[:3]), tuple(sizes[3:]), shared, stream, words))

    fake = types.SimpleNamespace(
        RawModule=_Module,
        cuda=types.SimpleNamespace(
            Device=_Device,
            runtime=types.SimpleNamespace(
                getDevice=lambda: fake.current, setDevice=lambda index: fake.made_current.append(index)
            ),
            driver=types.SimpleNamespace(launchKernel=launch),
            nvrtc=cupy.cuda.nvrtc,
        ),
        launches=[],
        made_current=[],
        current=0,
        capability=(9, 0),
    )
    monkeypatch.setattr(_launch, "_cupy", lambda: fake)
    monkeypatch.setattr(_launch, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: fake.capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda index: types.SimpleNamespace(cuda_stream=4000 + index))
    for cached in (_launch._load, _launch._say_once, _launch._temporary):
        cached.cache_clear()
    monkeypatch.setattr(_launch, "_packed", _launch._Packed())
    _Device.entered.clear()
    yield fake
    for cached in (_launch._load, _launch._say_once, _launch._temporary):
        cached.cache_clear()


def test_a_launch_passes_grid_block_arguments_and_torchs_stream(gpu: types.SimpleNamespace) -> None:
    kernels = source()
    x, out = torch.arange(200.0, requires_grad=True), torch.zeros(200, dtype=torch.bfloat16)
    _launch.launch(kernels, "copy", (4, 2), 64, (x, out, np.int32(-200)))
    (made,) = gpu.launches
    assert (made.grid, made.block, made.shared, made.stream) == ((4, 2, 1), (64, 1, 1), 0, 4001)
    assert made.pointer == sum(map(ord, "copy"))
    assert struct.unpack("Q", made.words[0]) == (x.data_ptr(),)
    assert struct.unpack("Q", made.words[1]) == (out.data_ptr(),)
    assert struct.unpack("i4x", made.words[2]) == (-200,)
    assert _Device.entered[0] == 1  # device 0 is current in this thread


@pytest.mark.parametrize(
    ("argument", "layout", "value"),
    [
        (None, "Q", 0),
        (np.int32(-5), "i4x", -5),
        (np.int64(-(1 << 40)), "q", -(1 << 40)),
        (np.uint64((1 << 64) - 1), "Q", (1 << 64) - 1),
        (np.float32(0.1), "f4x", float(np.float32(0.1))),
        (np.float32("inf"), "f4x", math.inf),
        (np.float32(0), "f4x", 0.0),
    ],
)
def test_numbers_keep_their_type_and_none_is_a_null_pointer(
    gpu: types.SimpleNamespace, argument: Any, layout: str, value: Any
) -> None:
    _launch.launch(source(), "copy", 1, 64, (torch.zeros(8), argument, np.int32(7)))
    words = gpu.launches[0].words
    assert struct.unpack(layout, words[1]) == (value,)
    assert struct.unpack("i4x", words[2]) == (7,)


def test_a_thread_has_arguments_of_its_own_and_makes_the_device_current_once(gpu: types.SimpleNamespace) -> None:
    def twice() -> None:
        for _ in range(2):
            _launch.launch(source(), "copy", 1, 64, (torch.zeros(8), torch.zeros(8), np.int32(8)))
        addresses.append(_launch._packed.address)

    addresses: list[int] = []
    twice()
    thread = threading.Thread(target=twice)
    thread.start()
    thread.join()
    assert gpu.made_current == [1, 1]
    assert addresses[0] != addresses[1]


def test_an_empty_grid_launches_nothing(gpu: types.SimpleNamespace) -> None:
    _launch.launch(source(), "copy", (0, 5), 64, (torch.zeros(0), torch.zeros(0), np.int32(0)))
    assert gpu.launches == []


def test_more_than_48_kb_of_shared_memory_is_asked_for(gpu: types.SimpleNamespace) -> None:
    kernels = source()
    args = (torch.zeros(64), torch.zeros(64))
    loaded = _launch.load(kernels, None, 1)["reverse"]
    # The kernel has 1 KB of its own, and both together have 48 KB without asking.
    for kilobytes, most in ((47, 0), (48, 48), (64, 64), (50, 64)):
        _launch.launch(kernels, "reverse", 1, 64, args, shared=kilobytes << 10)
        assert loaded.function.max_dynamic_shared_size_bytes == most << 10
    assert [made.shared for made in gpu.launches] == [47 << 10, 48 << 10, 64 << 10, 50 << 10]


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((torch.zeros(2), 1), TypeError, "argument 1 must be a tensor, None or a NumPy .*, got int"),
        ((torch.zeros(2), 0.5), TypeError, "argument 1 .* got float"),
        ((torch.zeros(2), np.float64(1)), TypeError, "argument 1 .* got float64"),
        ((torch.zeros(2), True), TypeError, "argument 1 .* got bool"),
        ((torch.zeros(4, 4).t()[1:],), ValueError, r"argument 0 must be dense, got strides \(1, 4\)"),
        ((torch.zeros(2), torch.zeros(2, device="meta")), ValueError, "must be on one device, got cpu and meta"),
        ((torch.zeros(1).expand(1 << 31),), ValueError, r"fewer than 2\*\*31 elements on a GPU, got \(2147483648,\)"),
    ],
)
def test_what_cupy_would_pass_on_unseen_is_refused(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"faults: .*{message}"):
        _launch.launch(source(), "copy", 1, 64, args)


def test_a_grid_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="limited to 65535 blocks here"):
        _launch.check(source(), (1, 65536), 64, ())
    assert _launch.check(source(), (1 << 20, 65535), 64, ()) == ((1 << 20, 65535, 1), (64, 1, 1))
    assert _launch.check(source(), (1, 2, 3), (4, 5, 6), ()) == ((1, 2, 3), (4, 5, 6))


def test_more_arguments_than_there_is_room_for_are_refused() -> None:
    assert _launch.check(source(), 1, 64, [None] * 128)
    with pytest.raises(ValueError, match="faults: a kernel takes at most 128 arguments, got 129"):
        _launch.check(source(), 1, 64, [None] * 129)


def test_an_unknown_storage_type_is_refused() -> None:
    kernels = CudaSource("faults", folder=FOLDER, dtypes=(torch.float32, torch.bfloat16))
    assert kernels.defines(torch.bfloat16) == ("-DSCALAR=bfloat16",)
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16 on a GPU, got torch.float64"):
        kernels.defines(torch.float64)


def test_includes_are_spliced_with_their_lines() -> None:
    text = source().text()
    assert '#include "' not in text
    assert "struct bfloat16" in text
    lines = text.splitlines()
    assert lines[0] == '#line 1 "faults.cu"'
    back = max(i for i, line in enumerate(lines) if line.startswith("#line"))
    number = int(lines[back].split()[1])
    original = (FOLDER / "faults.cu").read_text(encoding="utf-8").splitlines()
    assert lines[back + 1 :] == original[number - 1 :]


def test_compiled_kernels_are_kept_and_read_again(gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    compile_source = _launch.compile_source
    monkeypatch.setattr(_launch, "compile_source", lambda *args: compiled.append(args) or compile_source(*args))
    _launch.load(source(), None, 1)
    (kept,) = (_launch.cache_folder()).iterdir()
    assert kept.name.startswith("faults-")
    assert kept.read_bytes().startswith(b"\x7fELF")
    _launch.load(source(), None, 1)  # an equal source of another object
    assert len(compiled) == 1
    _launch.load(source(THREADS=128), None, 1)
    assert len(compiled) == 2, "other constants are another kernel"


def test_a_damaged_file_in_the_cache_is_compiled_anew(gpu: types.SimpleNamespace) -> None:
    _launch.load(source(), None, 1)
    (kept,) = _launch.cache_folder().iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(b"torn")
    assert set(_launch.load(source(), None, 1)) == set(source().kernels())
    assert kept.read_bytes() == whole


def test_a_kernel_that_the_driver_refuses_is_an_error(
    gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_launch, "compile_source", lambda *args: (b"nonsense", ""))
    with pytest.raises(
        KernelError, match=r"faults.cu was compiled for sm_90 but NVIDIA H100 does not load it: CUDA_ERROR"
    ):
        _launch.load(source(), None, 1)


def test_a_cache_folder_that_cannot_be_written_is_said_once(
    gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr(_launch, "cache_folder", lambda: tmp_path / "file" / "kernels")
    with pytest.warns(
        UserWarning, match="kept for this process only, because .*file/kernels cannot be written"
    ) as seen:
        _launch.launch(source(), "split", 1, 64, (torch.zeros(64, dtype=torch.int32),))
        _launch.launch(source(THREADS=32), "split", 1, 32, (torch.zeros(64, dtype=torch.int32),))
    assert len(seen) == 1


def test_memory_or_a_temporary_folder_takes_what_the_cache_does_not(
    gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def folder(prefix: str, dir: str | None) -> types.SimpleNamespace:
        if dir or not room:
            raise OSError(28, "No space left on device")
        return types.SimpleNamespace(name=str(tmp_path))

    monkeypatch.setattr(_launch, "cache_folder", lambda: Path("/proc/none"))
    monkeypatch.setattr(_launch.tempfile, "TemporaryDirectory", folder)
    args = (torch.zeros(64, dtype=torch.int32),)
    room = False
    nowhere = pytest.raises(KernelError, match="neither in /proc/none nor in a temporary folder: .*No space left")
    with pytest.warns(UserWarning, match="kept for this process only"), nowhere:
        _launch.launch(source(THREADS=64), "split", 1, 64, args)
    room = True
    _launch.launch(source(THREADS=64), "split", 1, 64, args)
    assert [file.suffix for file in tmp_path.iterdir() if file.is_file()] == [".cubin"]


@pytest.mark.parametrize(
    ("capability", "known", "found"),
    [
        ((8, 9), (80, 86, 87, 89), "sm_89"),
        ((8, 9), (80, 86, 87), "sm_86"),
        ((8, 7), (80, 86, 87, 89), "sm_87"),  # a Jetson's own
        ((8, 7), (80, 86, 89), None),  # which runs no other's
        ((10, 3), (90, 100, 101, 120), "sm_100"),
        ((10, 3), (90, 101, 120), None),
        ((10, 3), (90, 101), "compute_101"),
        ((6, 1), (50, 53, 60, 62), "sm_60"),
        ((12, 1), (75, 90), "compute_90"),
        ((6, 1), (75, 90), None),
        ((6, 1), (), None),
    ],
)
def test_machine_code_of_a_jetson_is_for_it_alone(
    capability: tuple[int, int], known: tuple[int, ...], found: str | None
) -> None:
    assert _launch.fitting(capability, known) == found


def test_a_gpu_that_nvrtc_does_not_know(gpu: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_launch, "nvrtc_archs", lambda: [75, 80, 86, 90, 120])
    assert _launch.target((8, 0), "A100") == "sm_80"
    assert _launch.target((8, 9), "L4") == "sm_86"  # of the same major version
    with pytest.raises(KernelError, match=r"GTX 1080 \(compute capability 6.1\) is none of .* \(7.5, 8.0,"):
        _launch.target((6, 1), "GTX 1080")
    with pytest.warns(UserWarning, match=r"Next \(compute capability 13.0\) is newer than NVRTC .* knows"):
        assert _launch.target((13, 0), "Next") == "compute_120"


def test_a_newer_gpu_gets_ptx(gpu: types.SimpleNamespace) -> None:
    gpu.capability = (99, 0)
    with pytest.warns(UserWarning, match="is newer than NVRTC"):
        _launch.load(source(), None, 1)
    (kept,) = _launch.cache_folder().iterdir()
    assert kept.suffix == ".ptx"
    assert b".entry copy" in kept.read_bytes()


def test_machine_code_is_a_whole_elf_file() -> None:
    """Its header tells where the tables of sections and segments lie, how long a row is and how many there are."""
    binary, _ = _launch.compile_source(source(), None, "sm_90")
    assert binary[:4] == b"\x7fELF"
    (segments, sections), counts = struct.unpack_from("<QQ", binary, 32), struct.unpack_from("<4H", binary, 54)
    assert len(binary) >= max(segments + counts[0] * counts[1], sections + counts[2] * counts[3])


def test_a_source_that_does_not_compile_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "broken.cu").write_text(
        '#include "box.cuh"\n\nextern "C" __global__ void f(int* x) { x[0] = wrong; }\n'
    )
    with pytest.raises(KernelError, match=r'broken.cu does not compile for sm_90 with NVRTC .*broken.cu\(3\).*"wrong"'):
        _launch.compile_source(CudaSource("broken", folder=tmp_path), None, "sm_90")


def test_without_cupy_the_error_has_the_pip_line() -> None:
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "import rcnn.kernels._launch as l\n"
        "try:\n    l.nvrtc_version()\nexcept l.KernelError as error:\n    print(error)\n"
        "import torch; print(l.uses_kernels(torch.zeros(1)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    problem, uses = done.stdout.splitlines()
    assert problem.startswith("a CUDA tensor needs CuPy, which is not installed: ")
    assert "pip install cupy-cuda1" in problem
    assert uses == "False"


def test_a_cupy_that_does_not_load_says_why(tmp_path: Path) -> None:
    (tmp_path / "cupy.py").write_text("raise OSError('libcudart.so.99: cannot open shared object file')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nimport rcnn.kernels._launch as l\nl.nvrtc_version()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "CuPy, which does not load (libcudart.so.99: cannot open shared object file)" in done.stderr
    assert "python -m rcnn.env gives the pip line" in done.stderr


def test_cupy_and_nvrtc_of_this_environment_work() -> None:
    assert _launch.nvrtc_version() >= (12, 8)
    assert {75, 80, 90, 120} <= set(_launch.nvrtc_archs())
