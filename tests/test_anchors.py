"""Anchors: the numbers of the cell, the order of the grid, and the cache."""

import pytest
import reference
import torch

from rcnn.kernels.anchors import anchors, cell_anchors

pytestmark = pytest.mark.usefixtures("on_device")


def test_cell_anchors_by_hand() -> None:
    # 32 / sqrt(0.5) = 45.25 wide, 22.63 high; halves 22.63 and 11.31 round to 23 and 11.
    assert cell_anchors([32], [0.5, 1.0, 2.0]).tolist() == [[-23, -11, 23, 11], [-16, -16, 16, 16], [-11, -23, 11, 23]]


def test_cell_anchors_are_ratio_major_and_round_half_to_even() -> None:
    assert cell_anchors([1, 3, 5], [1.0, 4.0]).tolist() == [
        [0, 0, 0, 0],  # 0.5 rounds to 0
        [-2, -2, 2, 2],  # 1.5 rounds to 2
        [-2, -2, 2, 2],  # 2.5 rounds to 2
        [0, -1, 0, 1],
        [-1, -3, 1, 3],
        [-1, -5, 1, 5],
    ]


@pytest.mark.parametrize("sizes", [(32, 64, 128, 256, 512), (16.5,), (8, 200)])
@pytest.mark.parametrize("ratios", [(0.5, 1.0, 2.0), (0.3,)])
def test_cell_anchors_equal_the_oracle(sizes: tuple[float, ...], ratios: tuple[float, ...]) -> None:
    result = cell_anchors(sizes, ratios)
    assert result.dtype == torch.float32
    assert result.tolist() == [list(map(float, row)) for row in reference.cell_anchors(sizes, ratios)]


@pytest.mark.parametrize(
    ("shapes", "strides"),
    [([(3, 5), (2, 3), (1, 1)], [4, 8, 16]), ([(4, 2)], [16]), ([(0, 3), (1, 2)], [8, 16]), ([(0, 0)], [8])],
)
def test_grid_equals_the_oracle(shapes: list[tuple[int, int]], strides: list[int]) -> None:
    cells = torch.stack([cell_anchors([8 * 2**level], [0.5, 1.0, 2.0]) for level in range(len(shapes))])
    result = anchors(cells, shapes, strides)
    expected = reference.anchors(cells.tolist(), shapes, strides)
    assert torch.equal(result, torch.tensor(expected).reshape(-1, 4))


@pytest.mark.parametrize("width", [1, 31, 32, 33, 63, 64, 65, 85, 86, 255, 256, 257, 1000])
def test_every_number_of_anchors(width: int) -> None:
    """On either side of a warp and of a block, with strides that a float32 holds and rows far from the origin."""
    cells = torch.stack([cell_anchors([16.5, 700], [0.5, 1.0, 2.0]), cell_anchors([33, 1400], [0.5, 1.0, 2.0])])
    shapes, strides = [(3, width), (1, width // 2)], [7, 1024]
    expected = reference.anchors(cells.tolist(), shapes, strides)
    assert torch.equal(anchors(cells, shapes, strides), torch.tensor(expected))


def test_cells_of_any_layout_are_left_alone() -> None:
    cells = torch.stack([cell_anchors([16, 32], [0.5, 1.0, 2.0])] * 2)
    strided = cells.transpose(1, 2).contiguous().transpose(1, 2)
    before = strided.clone()
    assert torch.equal(anchors(strided, [(3, 4), (2, 2)], [8, 16]), anchors(cells, [(3, 4), (2, 2)], [8, 16]))
    assert torch.equal(strided, before)


def test_order_is_level_row_column_anchor() -> None:
    cells = torch.tensor([[[-1.0, -2.0, 1.0, 2.0], [-2.0, -1.0, 2.0, 1.0]]])
    result = anchors(cells, [(2, 2)], [10])
    centres = ((result[:, :2] + result[:, 2:]) / 2).tolist()
    assert centres == [[0, 0], [0, 0], [10, 0], [10, 0], [0, 10], [0, 10], [10, 10], [10, 10]]
    assert result[0::2, 2].tolist() == [1, 11, 1, 11]


def test_the_cache_returns_the_same_tensor_and_notices_changes() -> None:
    cells = cell_anchors([32], [1.0])[None]
    first = anchors(cells, [(2, 3)], [16])
    assert anchors(cells, [(2, 3)], (16,)) is first
    assert anchors(cells, [(3, 2)], [16]) is not first
    assert anchors(cells, [(2, 3)], [8]) is not first
    assert anchors(cells, [(2, 3)], [16.5])[-1, 0] == 33 + cells[0, 0, 0]
    cells.mul_(2)
    assert torch.equal(anchors(cells, [(2, 3)], [16])[0], cells[0, 0])
    other = cells + 1
    assert torch.equal(anchors(other, [(2, 3)], [16])[0], other[0, 0])


def test_the_cache_forgets_the_oldest() -> None:
    cells = cell_anchors([32], [1.0])[None]
    first = anchors(cells, [(1, 1)], [16])
    for width in range(2, 30):
        anchors(cells, [(1, width)], [16])
    again = anchors(cells, [(1, 1)], [16])
    assert again is not first
    assert torch.equal(again, first)


def test_anchors_made_in_inference_mode_serve_training() -> None:
    cells = cell_anchors([32], [1.0])[None]
    with torch.inference_mode():
        grid = anchors(cells, [(1, 2)], [16])
        anchors(cells.clone(), [(1, 2)], [16])
    assert not grid.is_inference()
    weight = torch.ones(2, 4, requires_grad=True)
    (weight * grid).sum().backward()
    assert torch.equal(weight.grad, grid)


def test_cells_made_in_inference_mode_may_change() -> None:
    """Such a tensor does not count its changes, so its grids are made anew."""
    with torch.inference_mode():
        cells = cell_anchors([32], [1.0])[None]
        assert anchors(cells, [(1, 1)], [16]).tolist() == [[-16, -16, 16, 16]]
        cells.mul_(2)
        assert anchors(cells, [(1, 1)], [16]).tolist() == [[-32, -32, 32, 32]]


@pytest.mark.parametrize(("sizes", "ratios", "name"), [([], [1.0], "sizes"), ([32], [0.0], "aspect_ratios")])
def test_cell_errors(sizes: list[float], ratios: list[float], name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one or more positive numbers"):
        cell_anchors(sizes, ratios)


def test_grid_errors() -> None:
    with pytest.raises(
        ValueError, match=r"cells must be float32 of shape \(L, A, 4\) with L at least 1, got .*\(3, 4\)"
    ):
        anchors(torch.zeros(3, 4), [(1, 1)], [8])
    with pytest.raises(ValueError, match="each of 2 levels, got 1 shapes and 2 strides"):
        anchors(torch.zeros(2, 3, 4), [(1, 1)], [8, 16])
