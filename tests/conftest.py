"""Where a test of an op runs: on the CPU body, on the kernels through the emulator, on a GPU where there is one.

And the server of a module that starts runs of its own.
"""

from collections.abc import Iterator
from pathlib import Path

import jobs
import pytest
import torch
from cuda_on_cpu import Emulator

EMULATED = pytest.param("cuda-on-cpu", marks=pytest.mark.emulated)
DEVICES = ["cpu", EMULATED] + (["cuda"] if torch.cuda.is_available() else [])

_emulator = Emulator()  # one for the session: it keeps the libraries it has loaded


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    """The emulator, in place of the GPU: every op takes its CUDA body, on CPU tensors."""
    with _emulator.installed(), _poisoned():
        yield _emulator


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Device to make tensors on; for ``cuda-on-cpu`` that is the CPU, with the emulator on."""
    if request.param == "cuda-on-cpu":
        request.getfixturevalue("emulator")
        return torch.device("cpu")
    return torch.device(request.param)


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the module's own."""
    return tmp_path_factory.mktemp(request.module.__name__)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[jobs.Server]:
    """Starts runs in processes of their own, which end with the module."""
    with jobs.serving(folder) as server:
        yield server


@pytest.fixture
def on_device(device: torch.device) -> Iterator[None]:
    """Tensors that are made without saying where are made on ``device``."""
    with device:
        yield


class _poisoned:
    """New tensors start as NaN and the largest integers, so that an output that a kernel does not write shows."""

    def __enter__(self) -> None:
        self.before = (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
        )
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before[0], warn_only=self.before[1])
