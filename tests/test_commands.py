"""The commands as a user meets them: train, evaluate, predict, resume, and the sentences for what goes wrong."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import yaml
from PIL import Image

import rcnn
from rcnn import cli, engine, run_folder
from rcnn.checkpoint import read_state
from rcnn.config import LoaderConfig, TrainConfig
from rcnn.data import flowers, open_dataset

#: On a CPU, wherever the tests run: runs are compared bit by bit, and several processes need no GPU each.
CPU = ["--device", "cpu"]
SMALL = [*CPU, "--model.min_size", "96", "--model.max_size", "128", "--loader.workers", "0", "--loader.batch_size", "4"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A small flower data set."""
    return flowers.write(tmp_path_factory.mktemp("data") / "flowers", count=24, seed=1)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a run of two epochs."""
    out = tmp_path_factory.mktemp("runs") / "small"
    cli.main(["train", "--data", str(data), "--out", str(out), "--epochs", "2", *SMALL])
    return out


def newest(folder):
    """The newest training state of a run folder."""
    return read_state(run_folder.states(folder)[-1])


def fails(capsys, code, *argv):
    """The one line on stderr of a command that must end with ``code``."""
    with pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in argv])
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == code
    assert len(lines) == 1, lines
    return lines[0]


def test_a_run_folder_holds_what_the_documentation_says(run):
    names = {path.name for path in run.iterdir()}
    assert names >= {
        "config.yaml",
        "model_best.safetensors",
        "model_last.safetensors",
        "state-000000010.pt",
        "metrics.jsonl",
        "results.csv",
        "tensorboard",
        "predictions",
        "predictions.jpg",
    }
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["min_size"] == 96 and config["optim"]["lr"] == 1e-3, "unset fields come from the recipe"
    rows = list(csv.DictReader((run / "results.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    parts = ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg")
    for row in rows:
        assert float(row["loss"]) == pytest.approx(sum(float(row[part]) for part in parts))
        assert float(row["val_loss"]) == pytest.approx(sum(float(row[f"val_{part}"]) for part in parts))
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"} <= set(steps[0])
    assert len(list((run / "predictions").glob("*.jpg"))) == 7, "one for each validation picture"


def test_its_configuration_trains_again(run, data, tmp_path):
    again = tmp_path / "again"
    cli.main(["train", "--config", str(run / "config.yaml"), "--out", str(again)])
    first = safetensors.torch.load_file(run / "model_last.safetensors")
    second = safetensors.torch.load_file(again / "model_last.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first), "the same seed must give the same weights"


def test_resuming_gives_the_same_weights_as_going_through(run, data, tmp_path):
    """SIGINT after the first step, then resume: bit-equal to the run that was not stopped."""
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "rcnn.train", "--data", str(data), "--out", str(out), "--epochs", "2", *SMALL]
    process = subprocess.Popen([*command, "--log_interval", "1"], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "step" in line and "loss " in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 130, rest
    assert "--resume" in rest
    assert 0 < newest(out)["position"]["step"] < 10
    cli.main(["train", "--out", str(out), "--resume"])  # data and settings are the run's own
    whole = safetensors.torch.load_file(run / "model_last.safetensors")
    parts = safetensors.torch.load_file(out / "model_last.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def damaged(data, folder, *splits):
    """A copy of the data set in which the first picture of each split ends after 400 bytes."""
    shutil.copytree(data, folder)
    voc = folder / "VOC2007"
    files = [voc / "JPEGImages" / f"{(voc / f'ImageSets/Main/{s}.txt').read_text().split()[0]}.jpg" for s in splits]
    for file in files:
        file.write_bytes(file.read_bytes()[:-400])
    return [file.name for file in files]


def test_a_damaged_picture_is_named_counted_and_no_more(data, tmp_path, capsys):
    """In training, in validation, and among the pictures drawn at the end; --strict stops instead."""
    train, val = damaged(data, tmp_path / "data", "train", "val")
    command = ["train", "--data", str(tmp_path / "data"), "--epochs", "2", *SMALL, "--out"]
    cli.main([*command, str(tmp_path / "run")])
    shown = capsys.readouterr().out
    for name in (train, val):
        assert len([line for line in shown.splitlines() if name in line]) == 1
    assert f"{train}: " in shown and "; image skipped" in shown and "; evaluated as if nothing were found" in shown
    assert "images that could not be read: 2" in shown
    assert len(list((tmp_path / "run" / "predictions").glob("*.jpg"))) == 6
    line = fails(capsys, 1, *command, tmp_path / "strict", "--strict")
    assert train in line or val in line


def test_what_fails_in_the_evaluation_loses_no_step(run, data, tmp_path, capsys, monkeypatch):
    """The state is saved first; the resumed run makes the evaluation again, and no row twice."""
    out = tmp_path / "run"
    command = ["train", "--data", str(data), "--out", str(out), "--epochs", "2", *SMALL]
    with monkeypatch.context() as patch:
        patch.setattr("rcnn.engine.evaluate", lambda *_: (_ for _ in ()).throw(ValueError("no evaluation today")))
        assert fails(capsys, 1, *command) == "rcnn train: no evaluation today"
    cli.main(["train", "--out", str(out), "--resume"])
    whole, parts = (list(csv.DictReader((folder / "results.csv").open())) for folder in (run, out))
    for name in ("epoch", "step", "loss", "val_loss", "AP"):
        assert [row[name] for row in parts] == [row[name] for row in whole]


def test_a_resumed_run_takes_settings_given_beside_it(run, data, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    cli.main(["train", "--out", str(out), "--resume", "--epochs", "3", "--optim.weight_decay", "0.125"])
    assert newest(out)["position"]["step"] == 15
    settings = yaml.safe_load((out / "config.yaml").read_text())
    assert settings["optim"]["weight_decay"] == 0.125
    assert not settings["resume"], "the file starts other runs, too"
    line = fails(capsys, 1, "train", "--out", out, "--resume", "--epochs", "4", "--optim.name", "sgd")
    assert "is of the optimizer adamw, this run has sgd" in line


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(run, data, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(run, out)
    before = (out / "state-000000010.pt").read_bytes()
    line = fails(capsys, 1, "train", "--out", out, "--resume", "--epochs", "3", "--optim.lr", "1e30")
    assert "is not finite at step 1" in line and ".jpg" in line
    assert (out / "state-000000010.pt").read_bytes() == before and len(run_folder.states(out)) == 2


def test_evaluate_writes_both_kinds_of_ap(run, data, capsys):
    cli.main(["evaluate", *CPU, "--checkpoint", str(run), "--data", str(data), "--split", "val", "--workers", "0"])
    shown = capsys.readouterr().out
    assert "daisy" in shown and "VOC area" in shown
    content = json.loads((run / "evaluation_val.json").read_text())
    assert set(content["coco"]) >= {"AP", "AP50", "AP75", "AR100", "per_class"}
    assert set(content["voc"]["per_class"]) == {"daisy", "tulip"}
    best = max(float(row["AP"]) for row in csv.DictReader((run / "results.csv").open()))
    assert content["coco"]["AP"] == pytest.approx(best, abs=1e-12), "evaluate must repeat what training measured"


def test_evaluate_computes_in_16_bits(run, data, tmp_path):
    out = tmp_path / "half.json"
    words = ["--checkpoint", str(run), "--data", str(data), "--workers", "0", "--batch_size", "4", "--out", str(out)]
    cli.main(["evaluate", *CPU, *words, "--half", "true"])
    content = json.loads(out.read_text())
    model, dataset = rcnn.load(run, "cpu"), open_dataset(data, "val")
    loading = LoaderConfig(batch_size=4, workers=0, color=0.0, scale=(1.0, 1.0))
    loader = engine.loader_for(model, dataset, loading, train=False)
    whole, half = (engine.evaluate(model, loader, dataset, precision=each) for each in ("tf32", "bf16"))
    assert content["precision"] == "bf16"
    assert content["losses"] == half.losses != whole.losses
    assert content["coco"]["AP"] == half.coco["AP"]


def test_a_file_that_cannot_be_written_is_told_before_the_work(run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rcnn.engine.evaluate", lambda *_, **__: pytest.fail("evaluated first"))
    evaluate = ["evaluate", *CPU, "--checkpoint", run, "--data", data, "--out"]
    for command in (evaluate, ["summary", run, "--out"]):
        assert f"{tmp_path}: Is a directory" in fails(capsys, 1, *command, tmp_path)
        assert "No such file or directory" in fails(capsys, 1, *command, tmp_path / "none" / "x.json")
    assert not list(tmp_path.iterdir())


def test_predict_takes_files_folders_and_globs(run, data, tmp_path, capsys):
    pictures = sorted((data / "VOC2007" / "JPEGImages").glob("*.jpg"))[:3]
    folder = tmp_path / "pictures"
    folder.mkdir()
    for picture in pictures:
        (folder / picture.name).write_bytes(picture.read_bytes())
    (folder / "torn.jpg").write_bytes(pictures[0].read_bytes()[:300])
    (folder / "notes.txt").write_text("no picture")
    out = tmp_path / "out"
    inputs = [str(pictures[0]), str(folder), str(folder / "*.jpg")]
    options = [*CPU, "--out", str(out), "--score_threshold", "0.06", "--batch_size", "1"]
    cli.main(["predict", "--checkpoint", str(run), *inputs, *options])
    assert "1 skipped" in capsys.readouterr().out
    content = json.loads((out / "detections.json").read_text())
    assert content["classes"] == ["daisy", "tulip"]
    assert len(content["images"]) == 4 and len({one["picture"] for one in content["images"]}) == 4
    for one in content["images"]:
        with Image.open(out / one["picture"]) as picture:
            assert picture.size == (one["width"], one["height"])
    net = rcnn.load(run)
    found = net.predict(pictures[0], score_threshold=0.06)
    listed = content["images"][0]["detections"]
    assert [row["name"] for row in listed] == found["names"]
    assert [row["box"] for row in listed] == found["boxes"].tolist()


def test_two_processes_train_and_evaluate_together(data, tmp_path):
    """DDP over gloo: one rank writes, the evaluation is sharded and covers each image once."""
    out = tmp_path / "two"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    job = subprocess.run(
        [*launch, "-m", "rcnn.train", "--data", str(data), "--out", str(out), "--epochs", "1", *SMALL],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert job.returncode == 0, job.stderr[-3000:]
    assert "2 process(es)" in job.stdout and "x 8 images per step / 8" in job.stdout
    assert job.stdout.count("run folder:") == 1
    rows = list(csv.DictReader((out / "results.csv").open()))
    assert len(rows) == 1
    cli.main(["evaluate", *CPU, "--checkpoint", str(out), "--data", str(data), "--workers", "0", "--batch_size", "4"])
    content = json.loads((out / "evaluation_val.json").read_text())
    assert content["coco"]["AP"] == pytest.approx(float(rows[0]["AP"]), abs=1e-6)
    assert sum(content["losses"].values()) == pytest.approx(float(rows[0]["val_loss"]), rel=1e-5)


def test_published_weights_are_reported(data, tmp_path, capsys):
    """A torchvision-like file initialises the trunk; what matched is said, and a file with code in it is refused."""
    model = rcnn.build(rcnn.ModelConfig(name="resnet18_fpn", frozen_stages=0), ["a"])
    trunk = {name.removeprefix("backbone.body."): t for name, t in model.state_dict().items() if ".body." in name}
    torch.save(trunk | {"fc.weight": torch.zeros(1000, 512)}, tmp_path / "resnet18.pth")
    config = rcnn.ModelConfig(name="resnet18_fpn", weights=str(tmp_path / "resnet18.pth"))
    other = rcnn.build(config, ["a"])
    assert torch.equal(other.backbone.body.conv1.weight, model.backbone.body.conv1.weight)
    assert "resnet18.pth" in other.loaded and other.config.norm == "frozen"
    with pytest.warns(UserWarning, match="random"):
        rcnn.build("resnet18_fpn", ["a"])
    torch.save({"conv1.weight": Path("x")}, tmp_path / "code.pth")
    line = fails(capsys, 1, "train", "--data", data, "--out", tmp_path / "r", "--model.weights", tmp_path / "code.pth")
    assert "code.pth" in line and "refused" in line


def test_bad_input_gets_one_sentence(run, data, tmp_path, capsys):
    line = fails(capsys, 2, "train", "--epohs", "3")
    assert line == "rcnn train: unknown option epohs; did you mean --epochs?"
    (tmp_path / "c.yaml").write_text("model:\n  nam: tiny\n")
    line = fails(capsys, 2, "train", "--config", tmp_path / "c.yaml")
    assert "c.yaml: unknown option model.nam; did you mean --model.name?" in line
    line = fails(capsys, 2, "train", "--model.name", "tinny")
    assert line == "rcnn train: model.name must be one of tiny, resnet18_fpn, resnet50_fpn, vgg16, got tinny"
    line = fails(capsys, 2, "train", "--channels-last", "maybe", "--epochs", "3")
    assert line == "rcnn train: channels_last must be true or false, got maybe"
    line = fails(capsys, 2, "train", "--channels-last=maybe")
    assert line == "rcnn train: channels_last must be true or false, got maybe"
    line = fails(capsys, 2, "train", "--precision", "")
    assert line == "rcnn train: precision must be one of fp32, tf32, bf16, fp16, got nothing"
    assert "none.yaml: File does not exist" in fails(capsys, 2, "train", "--config", tmp_path / "none.yaml")
    (tmp_path / "c.yaml").write_text("optim: 3\n")
    assert "c.yaml: optim must be a group of settings, got 3" in fails(
        capsys, 2, "train", "--config", tmp_path / "c.yaml"
    )
    (tmp_path / "c.yaml").write_text("")
    assert "c.yaml: expected settings as lines of NAME: VALUE, got none" in fails(
        capsys, 2, "train", "--config", tmp_path / "c.yaml"
    )
    assert "epochs must be a whole number, got x" in fails(capsys, 2, "train", "--epochs", "x")
    low = fails(capsys, 1, "train", "--model.min_size", "480")
    assert "model.max_size, the longer side at most, must not be less than model.min_size (480), got 320" in low
    assert "optim.clip_norm must be 0 or greater, got -1" in fails(capsys, 1, "train", "--optim.clip_norm", "-1")
    assert "epochs must be greater than 0, got 0" in fails(capsys, 1, "train", "--epochs", "0")
    assert "device must be auto, cpu, cuda or cuda:N, got 'gpu'" in fails(capsys, 1, "train", "--device", "gpu")
    assert "nowhere" in fails(capsys, 1, "train", "--data", tmp_path / "nowhere")
    assert "holds a run already" in fails(capsys, 1, "train", "--data", data, "--out", run)
    assert "name it with --out" in fails(capsys, 1, "train", "--data", data, "--resume")
    assert "holds no run to go on with" in fails(capsys, 1, "train", "--out", tmp_path / "new", "--resume")
    evaluate = ["evaluate", "--data", data, "--checkpoint"]
    assert "none" in fails(capsys, 1, *evaluate, tmp_path / "none")
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes((run / "model_best.safetensors").read_bytes()[:5000])
    assert "torn.safetensors" in fails(capsys, 1, *evaluate, torn)
    assert "tset" in fails(capsys, 1, *evaluate, run, "--split", "tset")
    predict = ["predict", "--checkpoint", run, "--out", tmp_path / "out"]
    assert "is a run of tiny, got --model.name vgg16" in fails(
        capsys, 1, "train", "--out", run, "--resume", "--model.name", "vgg16"
    )
    (tmp_path / "file").write_text("")
    assert "cannot be a run folder" in fails(capsys, 1, "train", "--data", data, "--out", tmp_path / "file" / "x")
    assert "nothing.jpg must be a picture" in fails(capsys, 1, *predict, tmp_path / "nothing.jpg")
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert "empty.jpg" in fails(capsys, 1, *predict, tmp_path / "empty.jpg")
    Image.new("RGB", (40, 40)).save(tmp_path / "mine.jpg")
    line = fails(capsys, 1, "predict", "--checkpoint", run, tmp_path / "mine.jpg", "--out", tmp_path)
    assert "holds the input mine.jpg, which its result might overwrite" in line


def test_no_argument_is_needed(monkeypatch):
    asked = []
    monkeypatch.setattr("rcnn.train._train", asked.append)
    cli.main(["train"])
    assert asked == [TrainConfig()]
    cli.main(["train", "--strict", "--resume", "false", "--one_based", "--epochs", "3"])
    assert asked[1] == TrainConfig(strict=True, epochs=3)


def test_resuming_with_other_classes_is_refused(run, tmp_path, capsys):
    other = flowers.write(tmp_path / "data", count=12, seed=2)
    for file in (other / "VOC2007" / "Annotations").glob("*.xml"):
        file.write_text(file.read_text().replace("<name>tulip</name>", "<name>rose</name>"))
    label_map = other / "VOC2007" / "pascal_label_map.pbtxt"
    label_map.write_text(label_map.read_text().replace("tulip", "rose"))
    settings = (run / "config.yaml").read_bytes()
    line = fails(capsys, 1, "train", "--data", other, "--out", run, "--resume", "--epochs", "3", *SMALL)
    assert "rose" in line and "tulip" in line
    assert (run / "config.yaml").read_bytes() == settings
