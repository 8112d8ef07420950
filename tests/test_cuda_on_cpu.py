"""The emulator itself: sound kernels give the right answer in every order, and each planted fault is reported."""

import os
import re
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import numpy as np
import pytest
import torch
from cuda_on_cpu import Emulator, EmulatorError
from torch import Tensor

from rcnn.kernels._launch import CudaSource

THREADS = 64
SOUND = 0
NO_BARRIER, BEYOND_TENSOR, BEYOND_SHARED, DIVERGENT, MISSED, WRONG_TIE, LOST_LANES, NEIGHBOUR, BEYOND_DYNAMIC = range(
    1, 10
)

pytestmark = pytest.mark.emulated


def faults(fault: int, name: str = "faults") -> CudaSource:
    return CudaSource(name, folder=Path(cuda_on_cpu.__file__).parent, THREADS=THREADS, FAULT=fault)


@pytest.fixture
def plain() -> Emulator:
    """Without a sanitizer, whatever the environment asks for."""
    emulator = Emulator()
    emulator.sanitizer = ""
    return emulator


@pytest.fixture
def races() -> Emulator:
    emulator = Emulator()
    emulator.sanitizer = "races"
    return emulator


def block_sum(emulator: Emulator, fault: int) -> list[float]:
    x, out = torch.arange(200.0), torch.zeros(4)
    emulator.launch(faults(fault), "block_sum", 4, THREADS, (x, out, np.int32(200)))
    return out.tolist()


def copy(emulator: Emulator, fault: int) -> Tensor:
    x, out = torch.arange(200.0), torch.zeros(200)
    emulator.launch(faults(fault), "copy", 4, THREADS, (x, out, np.int32(200)))
    return out


def split(emulator: Emulator, fault: int) -> list[int]:
    out = torch.zeros(THREADS, dtype=torch.int32)
    emulator.launch(faults(fault), "split", 1, THREADS, (out,))
    return out.tolist()


def arg_max(emulator: Emulator, fault: int) -> int:
    values = torch.tensor([1.0, 5.0, 3.0, 5.0] + [0.0] * 28)
    out = torch.zeros(1, dtype=torch.int32)
    emulator.launch(faults(fault), "arg_max", 1, 32, (values, out))
    return int(out)


def neighbour(emulator: Emulator, fault: int) -> list[int]:
    data = torch.arange(200, dtype=torch.int32)
    emulator.launch(faults(fault), "neighbour", 4, THREADS, (data, np.int32(200)))
    return data.tolist()


def last_block(emulator: Emulator, fault: int) -> float:
    part, arrived, out = torch.zeros(5), torch.zeros(1, dtype=torch.int32), torch.zeros(1)
    emulator.launch(faults(fault), "last_block", 5, THREADS, (torch.arange(5.0), part, arrived, out))
    return float(out)


def reverse(emulator: Emulator, fault: int) -> list[float]:
    out = torch.zeros(THREADS)
    emulator.launch(faults(fault), "reverse", 1, THREADS, (torch.arange(float(THREADS)), out), shared=4 * THREADS)
    return out.tolist()


def tally(emulator: Emulator, fault: int) -> list[int]:
    out = torch.zeros(THREADS, dtype=torch.int32)
    emulator.launch(faults(fault), "tally", 1, THREADS, (out,))
    return out.tolist()


def pass_on(emulator: Emulator, fault: int) -> list[int]:
    out = torch.zeros(32, dtype=torch.int32)
    emulator.launch(faults(fault), "pass_on", 1, 32, (out,))
    return out.tolist()


SUMS = [sum(range(first, min(first + 64, 200))) for first in range(0, 200, 64)]


@pytest.mark.parametrize("kind", ["", "races"])
def test_sound_kernels_are_right_in_every_order(kind: str) -> None:
    emulator = Emulator()
    emulator.sanitizer = kind
    for seed in range(21):
        with emulator.order(seed):
            assert block_sum(emulator, SOUND) == SUMS
            assert copy(emulator, SOUND).tolist() == list(range(200))
            assert split(emulator, SOUND) == list(range(THREADS))
            assert arg_max(emulator, SOUND) == 1
            assert neighbour(emulator, SOUND) == list(range(1, 201))
            assert last_block(emulator, SOUND) == 10
            assert reverse(emulator, SOUND) == list(range(THREADS))[::-1]
            assert tally(emulator, SOUND) == [THREADS] * THREADS
            assert pass_on(emulator, SOUND) == [(lane + 2) % 32 for lane in range(32)]


def test_a_missing_barrier_shows_as_another_result(plain: Emulator) -> None:
    results = []
    for seed in range(5):
        with plain.order(seed):
            results.append(tuple(block_sum(plain, NO_BARRIER)))
    assert tuple(SUMS) not in results
    assert len(set(results)) > 1


def test_a_missing_barrier_is_a_race_in_any_order(races: Emulator) -> None:
    for seed in range(5):
        with races.order(seed), pytest.raises(EmulatorError, match="block_sum: a data race: thread .* no barrier"):
            block_sum(races, NO_BARRIER)


def test_reading_what_another_block_writes_is_a_race(races: Emulator) -> None:
    for seed in range(5):
        with races.order(seed), pytest.raises(EmulatorError, match="a data race: thread .* of block"):
            neighbour(races, NEIGHBOUR)


@pytest.mark.parametrize("fault", [11, 12])
def test_the_last_block_needs_both_fences(races: Emulator, fault: int) -> None:
    for seed in range(5):
        with races.order(seed), pytest.raises(EmulatorError, match="last_block: a data race: thread 0 of block"):
            last_block(races, fault)


@pytest.mark.parametrize("fault", [13, 14, 15])
def test_an_atomic_hides_no_plain_access(races: Emulator, fault: int) -> None:
    """A plain access and atomics of other threads are a race, whatever atomics the thread itself does besides."""
    for seed in range(21):
        with races.order(seed), pytest.raises(EmulatorError, match="tally: a data race: thread"):
            tally(races, fault)


@pytest.mark.parametrize("fault", [16, 17])
def test_a_vote_or_shuffle_orders_no_memory(races: Emulator, fault: int) -> None:
    for seed in range(5):
        with races.order(seed), pytest.raises(EmulatorError, match="pass_on: a data race: thread"):
            pass_on(races, fault)


@pytest.mark.parametrize("kind", ["", "races"])
def test_shared_memory_that_the_compiler_puts_elsewhere_is_refused(kind: str) -> None:
    """GCC drops the section in templates: no garbage there and no race. A compiler that keeps it finds both."""
    emulator, out = Emulator(), torch.zeros(THREADS, dtype=torch.int32)
    emulator.sanitizer = kind
    try:
        emulator.launch(faults(SOUND, "in_template"), "in_template", 1, THREADS, (out,))
    except EmulatorError as error:
        assert re.search("not in the section of shared memory: .*count_in_template.*flags", str(error))
    else:
        assert out.tolist() == [THREADS // 2] * THREADS
        emulator.sanitizer = "races"
        with pytest.raises(EmulatorError, match="a data race"):
            emulator.launch(faults(1, "in_template"), "in_template", 1, THREADS, (out,))


def test_a_barrier_in_divergent_code_is_reported(plain: Emulator) -> None:
    with pytest.raises(EmulatorError, match="barrier in divergent code: thread 0 waits at __syncthreads of line"):
        split(plain, DIVERGENT)


def test_a_barrier_that_half_of_the_block_misses_is_reported(plain: Emulator) -> None:
    with pytest.raises(EmulatorError, match="not all threads reach: .* 32 wait at a block's barrier, .* 32 have ended"):
        split(plain, MISSED)


def test_a_collective_that_a_lane_misses_is_reported(plain: Emulator) -> None:
    with pytest.raises(EmulatorError, match="24 at a collective of their warp and 8 have ended"):
        arg_max(plain, LOST_LANES)


def test_a_wrong_tie_rule_is_seen_by_comparison(plain: Emulator) -> None:
    assert arg_max(plain, SOUND) == int(torch.tensor([1.0, 5.0, 3.0, 5.0]).argmax()) == 1
    assert arg_max(plain, WRONG_TIE) == 3


@pytest.mark.parametrize(
    ("call", "fault", "message"),
    [
        ("copy", SOUND, ""),
        ("copy", BEYOND_TENSOR, "heap-buffer-overflow"),
        ("copy", BEYOND_SHARED, "index 64 out of bounds for type 'float [64]'"),
        ("reverse", BEYOND_DYNAMIC, "heap-buffer-overflow"),
    ],
)
def test_an_access_out_of_bounds_is_reported(call: str, fault: int, message: str) -> None:
    """In a process of its own, because the sanitizer ends it."""
    code = f"import test_cuda_on_cpu as t\nt.{call}(t.Emulator(), {fault})\nprint('ran to the end')\n"
    command = [sys.executable, "-c", code]
    environment = cuda_on_cpu.checked_environment("address")
    environment["PYTHONPATH"] = str(Path(__file__).parent) + ":" + environment.get("PYTHONPATH", "")
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if message:
        assert message in done.stderr
        assert done.returncode != 0
    else:
        assert (done.returncode, done.stdout.strip()) == (0, "ran to the end"), done.stderr[-2000:]


def test_the_command_shows_the_report(tmp_path: Path) -> None:
    """The process ends inside a test, and what pytest had captured with it."""
    test = tmp_path / "test_fault.py"
    lines = ("import pytest, test_cuda_on_cpu as t", "@pytest.mark.emulated", "def test_fault():")
    test.write_text("\n".join((*lines, f"    t.copy(t.Emulator(), {BEYOND_TENSOR})\n")))
    tests = Path(__file__).parent
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join((str(tests), os.environ.get("PYTHONPATH", ""))))
    command = [sys.executable, "-m", "tests.cuda_on_cpu", "address", str(test)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tests.parent, timeout=300)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr and "faults.cu:" in done.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(4), torch.zeros(4)), "copy takes 3 arguments, got 2"),
        (
            (torch.zeros(4), torch.zeros(4, dtype=torch.int64), np.int32(4)),
            "argument 1 is .f4 in the kernel, got a tensor",
        ),
        ((torch.zeros(4), torch.zeros(4), np.float32(4)), "argument 2 is i4 in the kernel, got float32"),
        ((torch.zeros(4), torch.zeros(4), np.int64(4)), "argument 2 is i4 in the kernel, got int64"),
        ((torch.zeros(4), torch.zeros(4), None), "argument 2 is i4 in the kernel, got None"),
    ],
)
def test_arguments_that_do_not_fit_the_kernel_are_refused(plain: Emulator, args: tuple, message: str) -> None:
    with pytest.raises(EmulatorError, match=message):
        plain.launch(faults(SOUND), "copy", 1, THREADS, args)


def test_shared_memory_starts_as_garbage(plain: Emulator) -> None:
    """A kernel that forgets to write it does not see what the block before left, nor zeros."""
    out = torch.zeros(THREADS)
    plain.launch(faults(10), "reverse", 1, THREADS, (torch.arange(float(THREADS)), out), shared=4 * THREADS)
    assert out[-1] == np.frombuffer(b"\xa5\xa5\xa5\xa5", dtype=np.float32)[0]
    assert out[:-1].tolist() == list(range(1, THREADS))[::-1]
