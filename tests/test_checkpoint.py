import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from rcnn import checkpoint
from rcnn.checkpoint import CheckpointError

STATE = {"conv.weight": torch.arange(24.0).reshape(2, 3, 4), "bn.num_batches_tracked": torch.tensor(7)}
CONFIG = {"name": "tiny", "rpn": {"anchor_sizes": [[24.0], [48.0]], "dropout": None}, "flip": True}


class Evil:
    def __reduce__(self):
        return os.system, ("echo executed > /dev/null",)


def save_example(path, state=STATE):
    checkpoint.save(path, state, CONFIG, ["daisy", "tulip"], {"epoch": 3, "AP": float("nan"), "range": (1, 2)})


def message(path, read):
    with pytest.raises(CheckpointError) as caught:
        read(path)
    text = str(caught.value)
    assert str(path) in text and "\n" not in text
    return text


def test_round_trip(tmp_path):
    path = tmp_path / "m.safetensors"
    save_example(path)
    read = checkpoint.read(path)
    assert read.state.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert read.state[name].dtype == tensor.dtype and torch.equal(read.state[name], tensor)
    assert read.config == CONFIG
    assert read.classes == ["daisy", "tulip"]
    assert read.extra == {"epoch": 3, "AP": None, "range": [1, 2]}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_shared_and_strided_tensors_are_written(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3)
    checkpoint.save(tmp_path / "m.safetensors", {"a": weight, "b": weight, "c": weight.T}, {}, ["x"])
    state = checkpoint.read(tmp_path / "m.safetensors").state
    assert torch.equal(state["a"], weight) and torch.equal(state["b"], weight) and torch.equal(state["c"], weight.T)


def test_find(tmp_path):
    assert "does not exist" in message(tmp_path / "nowhere", checkpoint.find)
    assert "holds no checkpoint" in message(tmp_path, checkpoint.find)
    last, best = tmp_path / "model_last.safetensors", tmp_path / "model_best.safetensors"
    last.touch()
    assert checkpoint.find(tmp_path) == last
    best.touch()
    assert checkpoint.find(tmp_path) == best
    assert checkpoint.find(tmp_path, prefer="last") == last
    assert checkpoint.find(str(best)) == best


def test_bad_model_files(tmp_path):
    path = tmp_path / "m.safetensors"
    assert "does not exist" in message(path, checkpoint.read)
    path.write_bytes(b"")
    assert "0 bytes" in message(path, checkpoint.read)
    path.write_bytes(b"\xff\xd8\xff\xe0 a picture, not a checkpoint")
    assert "truncated or not a safetensors file" in message(path, checkpoint.read)
    save_example(path)
    whole = path.read_bytes()
    for size in (5, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "truncated" in message(path, checkpoint.read)
    path.unlink()
    path.mkdir()
    assert "is not a file" in message(path, checkpoint.read)
    assert "--model.weights" in message(tmp_path / "resnet18.pth", checkpoint.read)


def test_metadata(tmp_path):
    path = tmp_path / "m.safetensors"

    def write(metadata):
        safetensors.torch.save_file(STATE, path, metadata)

    write({"format": "pt"})
    assert "was not written by rcnn" in message(path, checkpoint.read)
    good = {"version": checkpoint.FORMAT_VERSION, "config": {}, "classes": ["a"], "extra": {}}
    write({"rcnn": json.dumps(good | {"version": checkpoint.FORMAT_VERSION + 1})})
    assert "newer rcnn" in message(path, checkpoint.read)
    for damaged in (
        "{",
        "[]",
        json.dumps(good | {"classes": [1]}),
        json.dumps(good | {"config": []}),
        json.dumps(good | {"version": "1"}),
        json.dumps({"version": 1}),
    ):
        write({"rcnn": damaged})
        assert "damaged metadata" in message(path, checkpoint.read)
    write({"rcnn": json.dumps(good)})
    assert checkpoint.read(path).classes == ["a"]


def test_load_into():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    state = {name: torch.full_like(tensor, 2) for name, tensor in model.state_dict().items()}
    checkpoint.load_into(model, state, "m.safetensors")
    assert all((tensor == 2).all() for tensor in model.state_dict().values())

    wrong = dict(state, extra=torch.ones(1))
    wrong["0.weight"] = torch.ones(5, 3)
    del wrong["1.bias"]
    wrong["0.bias"] = torch.zeros(4)
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_into(model, wrong, "m.safetensors")
    assert str(caught.value) == (
        "m.safetensors holds another model or another number of classes; of the tensors, 1 of another shape (0.weight "
        "is (5, 3) in the file and (4, 3) in the model), 1 missing in the file (1.bias), 1 unknown to the model (extra)"
    )
    assert (model[0].bias == 2).all()  # nothing was copied
    with pytest.raises(CheckpointError, match=r"7 missing in the file \(0.weight, .*, and 3 more\)"):
        checkpoint.load_into(model, {}, "m.safetensors")


def test_state_round_trip(tmp_path):
    path = tmp_path / "state_last.pt"
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    parameter.sum().backward()
    optimizer.step()
    state = {"optimizer": optimizer.state_dict(), "rng": torch.get_rng_state(), "step": 5, "best": None, "key": 2**100}
    checkpoint.save_state(path, state)
    read = checkpoint.read_state(path)
    assert read["step"] == 5 and read["best"] is None and read["key"] == 2**100
    assert torch.equal(read["rng"], state["rng"])
    moment = read["optimizer"]["state"][0]["exp_avg"]
    assert torch.equal(moment, optimizer.state_dict()["state"][0]["exp_avg"])


def test_one_flipped_bit_is_seen_in_either_file(tmp_path):
    """torch and safetensors would load the damaged numbers."""
    model, state = tmp_path / "m.safetensors", tmp_path / "s.pt"
    save_example(model)
    checkpoint.save_state(state, {"a": torch.arange(1000.0)})
    assert torch.equal(torch.load(state, weights_only=True)["a"], torch.arange(1000.0)), "any torch can read it"
    for path, at, read in ((model, -4, checkpoint.read), (state, 2000, checkpoint.read_state)):
        content = bytearray(path.read_bytes())
        content[at] ^= 1
        path.write_bytes(content)
        assert "checksum" in message(path, read)


@pytest.mark.parametrize("size", [0, 30, 1000, -1])
def test_a_torn_state_is_seen(tmp_path, size):
    path = tmp_path / "s.pt"
    checkpoint.save_state(path, {"a": torch.arange(1000.0)})
    path.write_bytes(path.read_bytes()[:size])
    assert "torn or damaged" in message(path, checkpoint.read_state) or size == 0


def test_a_model_file_from_before_the_checksum_is_read(tmp_path):
    good = {"version": checkpoint.FORMAT_VERSION, "config": {}, "classes": ["a"], "extra": {}}
    safetensors.torch.save_file(STATE, tmp_path / "m.safetensors", {"rcnn": json.dumps(good)})
    assert checkpoint.read(tmp_path / "m.safetensors").classes == ["a"]


def test_state_of_other_types_is_not_written(tmp_path):
    path = tmp_path / "state_last.pt"
    with pytest.raises(CheckpointError, match=r"state\['a'\]\[1\] must be a tensor or a plain value, got Evil"):
        checkpoint.save_state(path, {"a": [1, Evil()]})
    assert not path.exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_refused(tmp_path, legacy):
    path = tmp_path / "m.pth"
    torch.save({"a": torch.ones(2), "b": Evil()}, path, _use_new_zipfile_serialization=not legacy)
    if not legacy:  # a whole training state in all but its content
        path.write_bytes(path.read_bytes() + b"\nsha256 " + hashlib.sha256(path.read_bytes()).hexdigest().encode())
    for read in (checkpoint.read_weights,) if legacy else (checkpoint.read_state, checkpoint.read_weights):
        text = message(path, read)
        assert "was refused" in text and "can run code" in text and "system" in text


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_pickles_are_refused(tmp_path, protocol):
    path = tmp_path / "m.pth"
    path.write_bytes(pickle.dumps({"b": Evil()}, protocol=protocol))
    assert "was refused" in message(path, checkpoint.read_weights)


def test_whole_module_is_refused(tmp_path):
    path = tmp_path / "m.pth"
    torch.save(nn.Linear(2, 2), path)
    assert "torch.nn.modules.linear.Linear" in message(path, checkpoint.read_weights)


def test_read_weights(tmp_path):
    state = {"a": torch.arange(3.0), "b": nn.Parameter(torch.ones(2))}
    contents = {"bare": state, "model": {"model": state, "epoch": 3}, "dict": {"state_dict": state, "arch": "resnet"}}
    for name, content in contents.items():
        for legacy in (False, True):
            path = tmp_path / f"{name}{legacy}.pth"
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
            read = checkpoint.read_weights(path)
            assert read.keys() == state.keys() and all(torch.equal(read[k], state[k]) for k in state)
            assert not read["b"].requires_grad
    safetensors.torch.save_file({"a": state["a"]}, tmp_path / "m.safetensors")
    assert torch.equal(checkpoint.read_weights(tmp_path / "m.safetensors")["a"], state["a"])


@pytest.mark.parametrize("legacy", [False, True])
def test_bad_weight_files(tmp_path, legacy):
    path = tmp_path / "m.pth"
    assert "does not exist" in message(path, checkpoint.read_weights)
    path.write_bytes(b"")
    assert "0 bytes" in message(path, checkpoint.read_weights)
    path.write_text("<html>not found</html>")
    assert "not a checkpoint" in message(path, checkpoint.read_weights)
    torch.save({"a": torch.ones(3000)}, path, _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    for size in (3, 200, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "truncated or not a checkpoint" in message(path, checkpoint.read_weights)
    torch.save({"epoch": 3}, path, _use_new_zipfile_serialization=not legacy)
    assert "tensors by name, got int under 'epoch'" in message(path, checkpoint.read_weights)
    torch.save([torch.ones(1)], path, _use_new_zipfile_serialization=not legacy)
    assert "tensors by name, got list" in message(path, checkpoint.read_weights)
    assert "holding" not in message(path, checkpoint.read_state)
    assert ".safetensors" in message(tmp_path / "m.onnx", checkpoint.read_weights)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_leaves_the_previous_file(tmp_path, monkeypatch):
    path, state_path = tmp_path / "model_last.safetensors", tmp_path / "state_last.pt"
    save_example(path)
    checkpoint.save_state(state_path, {"step": 1})
    before = path.read_bytes(), state_path.read_bytes()

    def failing(target, write):
        # The disk fills up after a part of the temporary file was written.
        def half(file):
            class Half:
                def write(self, data):
                    file.write(bytes(data)[: len(data) // 2])
                    with open("/dev/full", "wb") as full:
                        full.write(b"x" * 100)

            write(Half())

        real(target, half)

    real = checkpoint.atomic_write
    monkeypatch.setattr(checkpoint, "atomic_write", failing)
    for save, file in ((save_example, path), (lambda p: checkpoint.save_state(p, {"step": 2}), state_path)):
        text = message(file, save)
        assert "No space left on device" in text and "as it was before" in text
    assert (path.read_bytes(), state_path.read_bytes()) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model_last.safetensors", "state_last.pt"]


def test_missing_folder(tmp_path):
    assert "could not be written" in message(tmp_path / "no" / "m.safetensors", save_example)


WRITER = """
import sys, torch
from rcnn import checkpoint
path, state_path = sys.argv[1:]
number = 0
while True:
    number += 1
    tensor = torch.full((500_000,), float(number))
    checkpoint.save(path, {"a": tensor}, {}, ["x"], {"number": number})
    checkpoint.save_state(state_path, {"a": tensor, "number": number})
    print(number, flush=True)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_kill_while_writing_leaves_a_whole_file(tmp_path):
    path, state_path = tmp_path / "model_last.safetensors", tmp_path / "state_last.pt"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path), str(state_path)],
        cwd=Path(checkpoint.__file__).parents[1],
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline()  # one round was written whole
        time.sleep(0.05)
    finally:
        process.kill()
        rounds = process.stdout.read().split() if process.stdout else []
        process.wait()
    model, state = checkpoint.read(path), checkpoint.read_state(state_path)
    finished = int(rounds[-1]) if rounds else 1
    for number, tensor in ((model.extra["number"], model.state["a"]), (state["number"], state["a"])):
        assert finished <= number <= finished + 1
        assert (tensor == number).all()
