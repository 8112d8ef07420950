"""``rcnn summary``: best and last epochs, mean and spread by hand, and folders that are no run or another one."""

import json

import pytest
import yaml

from rcnn import cli
from rcnn.summary import differences, read, spread


def write_run(folder, *, rows, seed=0, epochs=3, patience=0, lr=0.001, **settings):
    """A run folder with a row for each (AP, AP50, VOC_AP, val_loss), or without an evaluation for None."""
    folder.mkdir(parents=True)
    config = {"out": str(folder), "resume": False, "seed": seed, "epochs": epochs, "patience": patience}
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "optim": {"lr": lr, "lr_factors": {}}, **settings}))
    lines = ["epoch,step,seconds,lr,loss,AP,AP50,VOC_AP,val_loss"]
    for epoch, row in enumerate(rows, 1):
        lines.append(f"{epoch},{epoch * 5},{epoch * 60.0},0.1,1.0,{','.join(map(str, row or ('',) * 4))}")
    (folder / "results.csv").write_text("\n".join(lines) + "\n")
    return folder


FIRST = [(0.1, 0.3, 0.2, 2.0), (0.5, 0.8, 0.7, 1.0), (0.25, 0.5, 0.5, 0.5)]
SECOND = [(0.3, 0.4, 0.3, 3.0), (0.2, 0.4, 0.2, 2.0), (0.75, 1.0, 0.9, 1.5)]


def summary(*words):
    cli.main(["summary", *map(str, words)])


def fails(capsys, *words):
    with pytest.raises(SystemExit) as end:
        summary(*words)
    assert end.value.code == 1
    return capsys.readouterr().err


def test_mean_and_spread_by_hand(tmp_path, capsys):
    runs = [write_run(tmp_path / f"seed-{seed}", rows=rows, seed=seed) for seed, rows in enumerate((FIRST, SECOND))]
    out = tmp_path / "summary.json"
    summary(*runs, "--out", out)
    told = capsys.readouterr()
    found = json.loads(out.read_text())
    assert found["runs"][0] == {
        "run": str(runs[0]),
        "seed": 0,
        "epochs": 3,
        "of": 3,
        "finished": True,
        "seconds": 180.0,
        "best": {"epoch": 2, "seconds": 120.0, "AP": 0.5, "AP50": 0.8, "VOC_AP": 0.7, "val_loss": 1.0},
        "last": {"epoch": 3, "seconds": 180.0, "AP": 0.25, "AP50": 0.5, "VOC_AP": 0.5, "val_loss": 0.5},
    }
    # Of two values a and b, the sample standard deviation is |a - b| / sqrt(2).
    best, last = found["over"]["best"], found["over"]["last"]
    assert best["AP"] == pytest.approx({"n": 2, "mean": 0.625, "std": 0.25 / 2**0.5, "min": 0.5, "max": 0.75})
    assert last["AP"] == pytest.approx({"n": 2, "mean": 0.5, "std": 0.5 / 2**0.5, "min": 0.25, "max": 0.75})
    assert best["val_loss"] == pytest.approx({"n": 2, "mean": 1.25, "std": 0.5 / 2**0.5, "min": 1.0, "max": 1.5})
    assert found["differ"] == {} and found["cautions"] == [] and told.err == ""
    assert "0.6250" in told.out and "0.1768" in told.out and "2/3" in told.out and f"written: {out}" in told.out


def test_three_values():
    found = spread([1.0, 2.0, 6.0])  # deviations -2, -1, 3: squares 14, over 2
    assert found == pytest.approx({"n": 3, "mean": 3.0, "std": 7**0.5, "min": 1.0, "max": 6.0})
    assert spread([0.5]) == {"n": 1, "mean": 0.5, "std": None, "min": 0.5, "max": 0.5}


def test_the_first_of_equal_epochs_is_the_best(tmp_path):
    rows = [None, (0.5, 0.6, 0.6, 1.0), None, (0.5, 0.7, 0.7, 0.9), None]
    run = read(str(write_run(tmp_path / "a", rows=rows, epochs=6)))
    assert run.best["epoch"] == 2 and run.last["epoch"] == 4, "epochs without an evaluation count for neither"
    assert run.epochs == 5 and not run.finished


def test_a_run_that_stopped_early_is_finished(tmp_path):
    rows = [(0.5, 0.6, 0.6, 1.0), None, (0.4, 0.6, 0.6, 1.0), (0.5, 0.6, 0.6, 1.0)]
    patience = [read(str(write_run(tmp_path / str(n), rows=rows, epochs=9, patience=n))) for n in range(4)]
    assert [run.finished for run in patience] == [False, True, True, False], "2 evaluations since the best"


def test_an_unfinished_run_is_shown_and_left_out_of_the_mean(tmp_path, capsys):
    done = write_run(tmp_path / "done", rows=FIRST)
    half = write_run(tmp_path / "half", rows=SECOND[:1], seed=1)
    new = write_run(tmp_path / "new", rows=[], seed=2)
    out = tmp_path / "summary.json"
    summary(done, half, new, "--out", out)
    told = capsys.readouterr()
    found = json.loads(out.read_text())
    assert [run["finished"] for run in found["runs"]] == [True, False, False]
    assert found["runs"][2]["best"] == {} and found["runs"][2]["seconds"] is None
    assert found["over"]["best"]["AP"] == {"n": 1, "mean": 0.5, "std": None, "min": 0.5, "max": 0.5}
    assert f"rcnn summary: {half} is not finished, 1 of 3 epochs; left out of mean and spread" in told.err
    assert f"{new} is not finished, 0 of 3 epochs" in told.err
    assert "0.3000" in told.out


def test_settings_that_differ_are_named(tmp_path, capsys):
    one = write_run(tmp_path / "one", rows=FIRST, data="x", seed=1)
    two = write_run(tmp_path / "two", rows=SECOND, data="y", lr=0.002, seed=1)
    other = write_run(tmp_path / "half", rows=SECOND[:1], data="z")
    assert differences([read(str(run)) for run in (one, two)]) == {"optim.lr": [0.001, 0.002], "data": ["x", "y"]}
    out = tmp_path / "summary.json"
    summary(one, two, other, "--out", out)
    err = capsys.readouterr().err
    assert f"data differs, so that the spread is not that of seeds alone: {one} x, {two} y" in err
    assert "optim.lr differs" in err and "half z" not in err, "what is left out of the mean may differ"
    assert json.loads(out.read_text())["differ"]["data"] == {str(one): "x", str(two): "y"}


def test_the_same_seed_twice_is_no_sample_of_seeds(tmp_path, capsys):
    summary(*(write_run(tmp_path / name, rows=FIRST, seed=4) for name in "ab"))
    assert "rcnn summary: seed 4 is that of 2 runs" in capsys.readouterr().err


def test_a_glob_may_find_what_is_no_run(tmp_path, capsys):
    run = write_run(tmp_path / "runs" / "a", rows=FIRST)
    (tmp_path / "runs" / "flowers").mkdir()
    (tmp_path / "runs" / "notes.txt").write_text("")
    summary(tmp_path / "runs" / "*", run)
    told = capsys.readouterr()
    assert f"{tmp_path / 'runs' / 'flowers'} holds no run: config.yaml is missing; left out" in told.err
    assert "notes" not in told.err and "0.5000" in told.out
    (run / "results.csv").unlink()
    assert "a holds no run: results.csv is missing" in fails(capsys, run)
    assert "must be a run folder or a glob that finds some, got none" in fails(capsys, tmp_path / "no" / "*")
    assert "expected run folders, got files" in fails(capsys, tmp_path / "runs" / "notes.txt")


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("config.yaml", "a: [", "must hold the settings of a run, with epochs as a whole number"),
        ("config.yaml", "- 1\n", "must hold the settings of a run"),
        ("config.yaml", "epochs: 3\n", "with patience as a whole number"),
        ("results.csv", "epoch,AP\n1,0.5\n2,x\n", "row 2, is none of an epoch: could not convert string to float: 'x'"),
        ("results.csv", "AP\n0.5\n", "row 1, is none of an epoch: 'epoch' is amiss"),
    ],
)
def test_files_that_are_not_of_a_run(tmp_path, capsys, name, text, told):
    run = write_run(tmp_path / "a", rows=FIRST)
    (run / name).write_text(text)
    err = fails(capsys, run)
    assert str(run / name) in err and told in err


def test_a_set_without_objects_measures_nothing(tmp_path):
    run = read(str(write_run(tmp_path / "a", rows=[(-1, -1, "", 2.0)], epochs=1)))
    assert run.finished and run.best == {} and run.rows[0]["val_loss"] == 2.0
