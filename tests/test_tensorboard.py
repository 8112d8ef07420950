"""TensorBoard for real: a run of two steps, the server, its HTTP interface, and a browser that looks at it.

``RCNN_SCREENSHOT=FILE`` keeps the picture, and ``RCNN_LOGDIR=FOLDER`` takes it of other runs: so the one in the docs
was made.
"""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rcnn import train
from rcnn.data import flowers
from rcnn.tracking import Tracker

pytest.importorskip("tensorboard")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs folder of two training steps."""
    folder = tmp_path_factory.mktemp("tensorboard")
    flowers.write(folder / "data", count=14, seed=1)
    size = ["--model.min_size", "64", "--model.max_size", "96", "--loader.workers", "0", "--loader.batch_size", "5"]
    where = ["--data", str(folder / "data"), "--out", str(folder / "runs" / "two_steps"), "--device", "cpu"]
    train.main([*where, *size, "--epochs", "1", "--log_interval", "1"])
    return folder / "runs"


@pytest.fixture(scope="module")
def server(runs: Path) -> Iterator[str]:
    """Address of a TensorBoard over the runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = os.environ.get("RCNN_LOGDIR", str(runs))
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", folder, "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for_runs(process, address)
        yield address
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for_runs(process: "subprocess.Popen[bytes]", address: str) -> None:
    """Until the server has read the events, which it does after it has begun to answer."""
    for _ in range(240):
        assert process.poll() is None, "the server ended"
        try:
            if ask(address, "scalars/tags" if "RCNN_LOGDIR" in os.environ else "pr_curves/tags"):
                return
        except OSError:
            pass
        time.sleep(0.5)
    pytest.fail("the server showed no run within two minutes")


def ask(address: str, what: str, **query: str) -> Any:
    """Answer of a plugin."""
    url = f"{address}/data/plugin/{what}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(url, timeout=10) as answer:
        return json.load(answer)


@pytest.mark.skipif("RCNN_LOGDIR" in os.environ, reason="other runs are shown")
def test_scalars_images_and_curves_are_served(server: str, runs: Path) -> None:
    (run,) = ask(server, "scalars/tags")
    assert run == os.path.join("two_steps", "tensorboard")
    rows = [json.loads(line) for line in (runs / "two_steps" / "metrics.jsonl").read_text("utf-8").splitlines()]
    steps = [row for row in rows if row["kind"] == "step"]
    assert [row["step"] for row in steps] == [1, 2]
    (epoch,) = [row for row in rows if row["kind"] == "epoch"]
    expected = {
        "train_loss": [row["loss"] for row in steps],
        "rpn_loss": [row["loss_objectness"] + row["loss_rpn_box_reg"] for row in steps],
        "cross_entropy": [row["loss_classifier"] for row in steps],
        "loss_box": [row["loss_box_reg"] for row in steps],
        "val_loss": [epoch["val_loss"]],
        "AP": [epoch["AP"]],
    }
    for tag, values in expected.items():
        served = ask(server, "scalars/scalars", run=run, tag=tag)  # rows of time, step, value
        assert [row[1] for row in served] == ([1, 2] if len(values) == 2 else [2])
        np.testing.assert_array_equal(np.float32([row[2] for row in served]), np.float32(values))
    assert list(ask(server, "images/tags")[run]) == ["predictions"]
    (picture,) = ask(server, "images/images", run=run, tag="predictions", sample="0")
    assert picture["step"] == 2
    with urllib.request.urlopen(
        f"{server}/data/plugin/images/individualImage?{picture['query']}", timeout=10
    ) as answer:
        assert Image.open(io.BytesIO(answer.read())).width == 1200
    curves = ask(server, "pr_curves/tags")[run]
    assert set(curves) == {"precision_recall/daisy", "precision_recall/tulip"}
    ((curve,),) = ask(server, "pr_curves/pr_curves", run=run, tag="precision_recall/tulip").values()
    assert len(curve["precision"]) == len(curve["recall"]) > 1 and max(curve["recall"]) <= 1


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_it(server: str, tmp_path: Path) -> None:
    assert CHROMIUM is not None
    file = Path(os.environ.get("RCNN_SCREENSHOT", tmp_path / "tensorboard.png")).resolve()
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    shot = (f"--screenshot={file}", "--window-size=1400,900", "--virtual-time-budget=20000")
    command = [CHROMIUM, *FLAGS, profile, *shot, f"{server}/#scalars&tagFilter=loss"]
    subprocess.run(command, check=True, capture_output=True, timeout=180)
    shown = np.asarray(Image.open(file).convert("RGB"))
    assert shown.shape == (900, 1400, 3)
    # TensorBoard's bar is orange, and without its scripts there is nothing but white.
    orange = (np.abs(shown[:40].astype(int) - (245, 124, 0)).max(2) < 40).mean()
    assert orange > 0.5
    assert len(np.unique(shown.reshape(-1, 3), axis=0)) > 100


def test_a_curve_counts_by_thresholds(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
    from tensorboard.util.tensor_util import make_ndarray

    with Tracker(tmp_path) as tracker:
        # Of 4 objects the first and the third detection hit one each.
        tracker.precision_recall("pr", np.array([0.9, 0.5, 0.5]), np.array([1, 1, 2]), 4, step=7)
    (file,) = (tmp_path / "tensorboard").iterdir()
    (event,) = [event for event in EventFileLoader(str(file)).Load() if event.summary.value]
    found = make_ndarray(event.summary.value[0].tensor)
    assert event.step == 7 and found.shape == (6, 127)
    # Rows: true positives, false positives, true negatives, false negatives, precision, recall.
    # Threshold i / 126: 63 is 0.5 exactly, which both later scores reach; 113 lies under 0.9, 114 above it.
    two_thirds = float(np.float32(2 / 3))
    assert found[:, 0].tolist() == found[:, 63].tolist() == [2, 1, 0, 2, two_thirds, 0.5]
    assert found[:, 64].tolist() == [1, 0, 0, 3, 1, 0.25]
    assert found[:, 113].tolist() == [1, 0, 0, 3, 1, 0.25]
    assert found[:, 114].tolist() == [0, 0, 0, 4, 1, 0]
