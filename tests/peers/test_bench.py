"""The benchmark's own gate: our tiny detector gives the losses, gradients and detections of torchvision's parts."""

import pytest
import torch

pytest.importorskip("torchvision")

from bench import model, step  # noqa: E402


def test_tiny_is_the_same_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "WARM_STEPS", 10)
    images, targets = model.scenes()
    report = model.gate(model._trained(images, targets), images, targets)
    assert report["detections"] > 0


@pytest.mark.parametrize("name", ["resnet50_fpn", "vgg16"])
def test_the_large_ones_have_the_losses_of_torchvisions(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(step, "WARM_STEPS", 1)
    report = step.gate(step.detector(name, step.GATE_SIZE, torch.device("cpu"))[0])
    assert len(report) == 5
