"""The sort of rows of keys, which runs on kernels only, against torch's."""

import pytest
import torch
from conftest import EMULATED
from cuda_on_cpu import Emulator
from torch import Tensor

from rcnn.kernels.sorting import EACH, RUN, THREADS, sort_rows

DEVICES = [EMULATED] + (["cuda"] if torch.cuda.is_available() else [])


def keys(rows: int, capacity: int, kinds: int = 1 << 62) -> Tensor:
    generator = torch.Generator().manual_seed(capacity)
    return torch.randint(-kinds, kinds, (rows, capacity), generator=generator)


def check(given: Tensor, counts: list[int], device: torch.device) -> None:
    result = sort_rows(given.clone().to(device), torch.tensor(counts, device=device)).to("cpu")
    assert result.shape == given.shape
    for row, count in enumerate(counts):
        wanted = given[row, :count].sort(descending=True).values
        assert torch.equal(result[row, :count], wanted)


#: On either side of the keys that a warp holds, two, four or EACH for a lane, and of those of 2, 4 and 8 warps.
SIDES = [size + i for size in (32, 64, 128, 32 * EACH, 64 * EACH, 128 * EACH, RUN) for i in (-1, 0, 1)]


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("capacity", [1, 2, 3, *SIDES, 2 * THREADS + 1, 1000, 2 * RUN + 1, 5 * RUN])
def test_equals_torch(device: torch.device, capacity: int) -> None:
    counts = [capacity, 0, 1, capacity // 2, capacity - 1]
    check(keys(5, capacity), counts, device)
    check(keys(5, capacity, kinds=2), counts, device)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("capacity", [64, 128, 32 * EACH, RUN])
def test_steps_between_two_values(device: torch.device, capacity: int) -> None:
    """Comparisons in a fixed order sort everything if they sort 0s and 1s; here with 65 numbers of 1s."""
    ones = torch.arange(0, capacity + 1, max(1, capacity // 64))
    order = keys(len(ones), capacity).argsort(dim=1)
    check((order < ones[:, None]).long(), [capacity] * len(ones), device)
    check((torch.arange(capacity) >= ones[:, None]).long(), [capacity] * len(ones), device)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_equal_keys(device: torch.device) -> None:
    counts = [2, 33, 65, 200, 300, RUN]
    check(torch.full((len(counts), RUN), -7), counts, device)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_the_lowest_and_the_highest_key(device: torch.device) -> None:
    limits = torch.iinfo(torch.int64)
    check(torch.tensor([[0, limits.min, limits.max, -1, limits.min]]), [5], device)


@pytest.mark.parametrize("device", DEVICES, indirect=True)
def test_keys_that_are_not_in_use_are_left_alone(device: torch.device) -> None:
    given = keys(2, 100)
    result = sort_rows(given.clone().to(device), torch.tensor([40, 0], device=device)).to("cpu")
    assert torch.equal(result[0, 40:], given[0, 40:])
    assert torch.equal(result[1], given[1])


@pytest.mark.parametrize("device", DEVICES, indirect=True)
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_nothing_to_sort(device: torch.device, shape: tuple[int, int]) -> None:
    check(torch.zeros(shape, dtype=torch.int64), [0] * shape[0], device)


@pytest.mark.emulated
def test_any_order_of_threads_gives_the_same(emulator: Emulator) -> None:
    given = keys(2, RUN + 500, kinds=400)
    for seed in range(1, 21):
        with emulator.order(seed):
            check(given, [RUN + 500, 700], torch.device("cpu"))
