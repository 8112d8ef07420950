"""When the state of a run is saved where epochs are short: on a GPU; here a CPU is taken for one."""

import csv
import json
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from rcnn import checkpoint, engine, run_folder, stopping, train, training
from rcnn.data import flowers
from rcnn.stopping import Reason

#: Three steps an epoch.
OPTIONS = [
    "--device", "cpu", "--model.min_size", "64", "--model.max_size", "96", "--loader.workers", "0",
    "--loader.batch_size", "4", "--epochs", "4", "--val_interval", "2",
]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return flowers.write(tmp_path_factory.mktemp("saving") / "flowers", count=16, seed=1)


@pytest.fixture
def saved(monkeypatch):
    """Steps whose state was saved; saving never counts as long ago."""
    monkeypatch.setattr(training, "SHORT_EPOCHS", ("cpu",))
    monkeypatch.setattr(training, "SAVINGS_APART", 1e9)
    steps, save = [], run_folder.save_state

    def noted(folder, step, state, keep):
        steps.append(step)
        save(folder, step, state, keep)

    monkeypatch.setattr(run_folder, "save_state", noted)
    return steps


def run(data, out, *words):
    try:
        train.main(["--data", str(data), "--out", str(out), *OPTIONS, *words])
    except SystemExit as end:
        return end.code
    return 0


def epochs(folder):
    """Of the epochs' rows in both files."""
    results, metrics = folder / "results.csv", folder / "metrics.jsonl"
    if not results.exists():
        return [], []
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    table = csv.DictReader(results.read_text().splitlines())
    return [int(row["epoch"]) for row in table], [row["epoch"] for row in rows if row["kind"] == "epoch"]


def test_short_epochs_are_left_out_but_for_the_first_and_the_last(data, tmp_path, saved):
    assert not run(data, tmp_path / "run")
    assert saved == [3, 12]


def test_each_epoch_is_saved_where_it_takes_longer_than_saving(data, tmp_path, saved, monkeypatch):
    monkeypatch.setattr(training, "SAVINGS_APART", 0)
    assert not run(data, tmp_path / "run")
    assert saved == [3, 6, 9, 12]


def test_on_a_cpu_each_epoch_is_saved(data, tmp_path, saved, monkeypatch):
    monkeypatch.setattr(training, "SHORT_EPOCHS", ("cuda",))
    assert not run(data, tmp_path / "run")
    assert saved == [3, 6, 9, 12]


def test_a_run_that_ends_early_is_saved(data, tmp_path, saved, monkeypatch):
    evaluate, found = engine.evaluate, []

    def worse(*args, **kwargs):
        one = evaluate(*args, **kwargs)
        one.coco["AP"] = 0.5 - len(found) / 10
        found.append(one)
        return one

    monkeypatch.setattr(engine, "evaluate", worse)
    assert not run(data, tmp_path / "run", "--val_interval", "1", "--patience", "1")
    assert saved == [3, 6]
    rows = epochs(tmp_path / "run")
    assert rows == ([1, 2], [1, 2])
    # Nothing is left to do, and what was done stays: the state is from after the last evaluation.
    assert not run(data, tmp_path / "run", "--resume", "true")
    assert epochs(tmp_path / "run") == rows


def test_a_run_that_is_stopped_between_epochs_keeps_their_rows(data, tmp_path, saved, monkeypatch):
    with monkeypatch.context() as patch:

        @contextmanager
        def requests(_):
            yield lambda: Reason.PREEMPTED if len(epochs(tmp_path / "run")[1]) == 2 else Reason.NONE

        patch.setattr(stopping, "requests", requests)
        assert run(data, tmp_path / "run") == 75
    assert saved == [3, 6]
    assert not run(data, tmp_path / "run", "--resume", "true")
    assert epochs(tmp_path / "run") == ([1, 2, 3, 4], [1, 2, 3, 4])


@pytest.mark.parametrize("ema", ["0", "0.9"])
def test_a_run_that_is_stopped_in_an_evaluation_is_saved_and_makes_it_again(data, tmp_path, saved, monkeypatch, ema):
    words = ["--optim.ema", ema]
    assert not run(data, tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        evaluate, began = engine.evaluate, []
        patch.setattr(engine, "evaluate", lambda *args, **kwargs: began.append(1) or evaluate(*args, **kwargs))

        @contextmanager
        def requests(_):
            yield lambda: Reason.PREEMPTED if began else Reason.NONE

        patch.setattr(stopping, "requests", requests)
        saved.clear()
        assert run(data, tmp_path / "stopped", *words) == 75
        assert saved == [3, 6]
    state = checkpoint.read_state(run_folder.states(tmp_path / "stopped")[-1])
    assert (state["position"]["epoch"], state["position"]["batch"], state["position"]["step"]) == (1, 3, 6)
    assert not run(data, tmp_path / "stopped", "--resume", "true")
    whole, stopped = (load_file(tmp_path / name / "model_last.safetensors") for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert epochs(tmp_path / "stopped") == epochs(tmp_path / "whole") == ([1, 2, 3, 4], [1, 2, 3, 4])
