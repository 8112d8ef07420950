import csv
import io
import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from rcnn import tracking
from rcnn.tracking import Tracker

LOSSES = {"loss_objectness": 0.5, "loss_rpn_box_reg": 0.25, "loss_classifier": 1.0, "loss_box_reg": 0.125}


def plain_console():
    return Console(file=io.StringIO(), width=80, force_terminal=False)


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rows(folder):
    return list(csv.DictReader((folder / "results.csv").open()))


def events(folder):
    """(tag, step) -> value of every scalar and picture; None for a mark that purges what later steps hold."""
    from tensorboardX.proto.event_pb2 import Event

    found, purged = {}, []
    for file in sorted((folder / "tensorboard").iterdir()):
        data, at = file.read_bytes(), 0
        while at < len(data):  # a record: length, its checksum, content, its checksum
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log"):
                purged.append(event.step)
            for value in event.summary.value:
                found[value.tag, event.step] = value.image if value.HasField("image") else value.simple_value
    return found, purged


def run(folder, steps, *, resume=0, console=None, epochs=2, per_epoch=4):
    console = console or plain_console()
    with Tracker(folder, epochs=epochs, total_steps=epochs * per_epoch, resume_step=resume, console=console) as t:
        for step in range(resume + 1, steps + 1):
            t.step((step - 1) // per_epoch, step, LOSSES if step % 2 == 0 else {}, 0.01 * step, 8, 0.1, 0.4)
            if step % per_epoch == 0:
                values = {"loss": 1.875, **LOSSES}
                if step == epochs * per_epoch:
                    values |= {f"val_{name}": 2 * loss for name, loss in LOSSES.items()} | {"AP": 0.5, "AP50": 0.75}
                t.epoch(step // per_epoch, values)
    return console.file.getvalue()


def test_lines_and_files(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)  # another test's memory on a GPU is not meant
    folder = tmp_path / "runs" / "a"
    shown = run(folder, 8).splitlines()
    assert len(shown) == 4 + 2  # a line for each row, however narrow the terminal is said to be
    assert shown[0].startswith(
        "epoch 1/2  step 2/8  loss 1.8750  loss_objectness 0.5000  loss_rpn_box_reg 0.2500  loss_classifier 1.0000  "
        "loss_box_reg 0.1250  lr 0.02  20.0 img/s  data 25%  mem "  # 16 images in 0.8 s, of which 0.2 s waiting
    )
    assert " MB  eta 0:0" in shown[0]
    assert shown[2].startswith("epoch 1/2 done  loss 1.8750")
    assert "AP 0.5000  AP50 0.7500" in shown[5]

    written = lines(folder)
    assert [(row["kind"], row["epoch"], row["step"]) for row in written] == [
        ("step", 1, 2),
        ("step", 1, 4),
        ("epoch", 1, 4),
        ("step", 2, 6),
        ("step", 2, 8),
        ("epoch", 2, 8),
    ]
    first = written[0]
    assert first["loss"] == 1.875 and first["lr"] == 0.02 and first["loss_box_reg"] == 0.125
    assert math.isclose(first["images_per_second"], 20) and math.isclose(first["data_share"], 0.25)
    assert first["memory_mb"] > 1 and first["eta_seconds"] >= 0

    table = rows(folder)
    assert [(row["epoch"], row["step"], row["loss"], row["AP"]) for row in table] == [
        ("1", "4", "1.875", ""),
        ("2", "8", "1.875", "0.5"),
    ]


def test_events(tmp_path):
    run(tmp_path, 8)
    found, _ = events(tmp_path)
    train = {"train_loss": 1.875, "rpn_loss": 0.75, "cross_entropy": 1.0, "loss_box": 0.125}
    for step in (2, 4, 6, 8):
        for tag, value in train.items():
            assert found[tag, step] == value
        assert found["lr", step] == np.float32(0.01 * step)
    validation = {"val_loss": 3.75, "val_rpn_loss": 1.5, "val_cross_entropy": 2.0, "val_loss_box": 0.25}
    for tag, value in (validation | {"AP": 0.5, "AP50": 0.75}).items():
        assert found[tag, 8] == value
        assert (tag, 4) not in found


def test_resume_drops_what_came_later(tmp_path):
    run(tmp_path, 8)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "ste')  # torn by a kill
    run(tmp_path, 8, resume=5)
    written = [(row["kind"], row["step"]) for row in lines(tmp_path)]
    assert written == [("step", 2), ("step", 4), ("epoch", 4), ("step", 6), ("step", 8), ("epoch", 8)]
    assert [row["step"] for row in rows(tmp_path)] == ["4", "8"]
    assert float(rows(tmp_path)[1]["seconds"]) >= float(rows(tmp_path)[0]["seconds"])
    _, purged = events(tmp_path)
    assert purged == [1, 6]  # readers drop what the first session wrote from step 6 on
    run(tmp_path, 2)
    assert [row["step"] for row in lines(tmp_path)] == [2]  # a run that begins anew keeps nothing
    assert rows(tmp_path) == []


def test_resume_without_files(tmp_path):
    run(tmp_path, 8, resume=4)
    assert [row["step"] for row in lines(tmp_path)] == [6, 8, 8]


def test_values_that_are_not_finite_become_null(tmp_path):
    with Tracker(tmp_path, console=plain_console()) as t:
        t.step(0, 1, {"loss_classifier": math.nan}, 0.1, 1, 0.0, 0.1)
        t.epoch(1, {"AP": math.nan, "AP50": np.float64("inf"), "gt": torch.tensor(3), "per_class": {"a": -math.inf}})
    step, epoch = lines(tmp_path)
    assert step["loss_classifier"] is None and step["loss"] is None and step["eta_seconds"] is None
    assert epoch["AP"] is None and epoch["AP50"] is None and epoch["gt"] == 3 and epoch["per_class"] == {"a": None}
    found, _ = events(tmp_path)
    assert found == {("lr", 1): np.float32(0.1)}


def test_rows_are_on_disk_at_once(tmp_path):
    with Tracker(tmp_path, console=plain_console()) as t:
        t.step(0, 1, LOSSES, 0.1, 1, 0.0, 0.1)
        assert len(lines(tmp_path)) == 1
        t.epoch(1, {"loss": 1.0})
        assert len(lines(tmp_path)) == 2 and len(rows(tmp_path)) == 1


def test_nothing_is_touched_before_the_first_step(tmp_path):
    run(tmp_path, 8)
    before = (tmp_path / "metrics.jsonl").read_text()
    console = plain_console()
    with Tracker(tmp_path, console=console) as t:
        t.message("[bold]hello")
    assert console.file.getvalue() == "[bold]hello\n"
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_process_that_does_not_write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    console = plain_console()
    with Tracker(None, console=console) as t:
        t.step(0, 1, LOSSES, 0.1, 1, 0.0, 0.1)
        t.epoch(1, {"AP": 0.5})
        t.message("hello")
        t.image("a", np.zeros((2, 2, 3), np.uint8), 1)
    assert console.file.getvalue() == "" and list(tmp_path.iterdir()) == []


def test_pictures(tmp_path):
    with Tracker(tmp_path, console=plain_console()) as t:
        t.image("predictions/a", np.full((4, 6, 3), 9, np.uint8), 3)
    picture = events(tmp_path)[0]["predictions/a", 3]
    assert (picture.height, picture.width) == (4, 6)


def test_bar_on_a_terminal(tmp_path):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    shown = run(tmp_path, 8, console=console)
    assert "epoch 2/2" in shown and "8/8" in shown and "loss_box_reg 0.1250" in shown and "img/s" in shown
    assert "epoch 1/2 done" in shown
    assert len(lines(tmp_path)) == 6


def test_the_terminal_is_left_in_order_after_an_error(tmp_path):
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    try:
        with Tracker(tmp_path, total_steps=8, console=console) as t:
            t.step(0, 1, LOSSES, 0.1, 1, 0.0, 0.1)
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    hide, show = "\x1b[?25l", "\x1b[?25h"  # the cursor
    shown = console.file.getvalue()
    assert hide in shown and shown.rindex(show) > shown.rindex(hide)


def test_import_is_lazy():
    code = "import sys, rcnn.tracking; print([m for m in ('tensorboardX', 'pycocotools') if m in sys.modules])"
    root = Path(tracking.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
