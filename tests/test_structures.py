"""The dataclasses of tensors: moving and un-padding."""

import dataclasses

import pytest
import torch

from rcnn.structures import AnchorSamples, Detections, Proposals, Samples, Targets


def detections() -> Detections:
    return Detections(
        boxes=torch.arange(24.0).reshape(2, 3, 4),
        scores=torch.tensor([[0.9, 0.5, 0.0], [0.0, 0.0, 0.0]]),
        labels=torch.tensor([[2, 1, 0], [0, 0, 0]]),
        count=torch.tensor([2, 0]),
    )


def test_unpad_gives_the_rows_in_use() -> None:
    first, second = detections().unpad()
    assert set(first) == {"boxes", "scores", "labels"}
    assert first["boxes"].tolist() == [[0.0, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]]
    assert first["labels"].tolist() == [2, 1]
    assert torch.equal(first["scores"], torch.tensor([0.9, 0.5]))
    assert second["boxes"].shape == (0, 4)
    assert second["scores"].shape == second["labels"].shape == (0,)


@pytest.mark.parametrize("kind", [Targets, Proposals, AnchorSamples, Samples, Detections])
def test_to_moves_every_tensor(kind: type) -> None:
    names = [field.name for field in dataclasses.fields(kind)]
    moved = kind(**{name: torch.zeros(1) for name in names}).to("meta")
    assert isinstance(moved, kind)
    assert all(getattr(moved, name).is_meta for name in names)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        detections().count = torch.zeros(2)  # type: ignore[misc]
