"""The benchmark's own gate: our tiny detector gives the losses, gradients and detections of torchvision's parts."""

import pytest

pytest.importorskip("torchvision")

from bench import model  # noqa: E402


def test_tiny_is_the_same_detector(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "WARM_STEPS", 10)
    images, targets = model.scenes()
    report = model.gate(model._trained(images, targets), images, targets)
    assert report["detections"] > 0
