import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcnn import distributed

SCRIPT = """
import json, sys, torch
from rcnn import distributed as d
device = d.init(torch.device("cpu"))
rank = d.rank()
d.barrier()
out = {
    "device": str(device),
    "world_size": d.world_size(),
    "is_main": d.is_main(),
    "broadcast": d.broadcast({"folder": f"runs/{rank}"}),
    "gathered": d.gather_objects({"rank": rank, "images": list(range(rank, 5, 2))}),
    "mean": {k: v.item() for k, v in d.mean({"a": torch.tensor(float(rank)), "b": torch.tensor(4.0 * rank)}).items()},
    "empty": d.mean({}),
    "maximum": d.maximum(rank, 1 - rank, 0),
    "mean_count": d.mean_count(torch.tensor(3 * rank)).item(),
}
d.shutdown()
d.barrier()
assert d.world_size() == 1
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump(out, file)
"""


def test_two_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    root = str(Path(distributed.__file__).parents[1])
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script, tmp_path],
        env=os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=60,
    )
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first.pop("gathered") == [{"rank": 0, "images": [0, 2, 4]}, {"rank": 1, "images": [1, 3]}]
    assert second.pop("gathered") is None
    assert first.pop("is_main") is True and second.pop("is_main") is False
    assert first == second
    assert first == {
        "device": "cpu",
        "world_size": 2,
        "broadcast": {"folder": "runs/0"},
        "mean": {"a": 0.5, "b": 2.0},
        "empty": {},
        "maximum": [1, 1, 0],
        "mean_count": 1.5,
    }


def test_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.init(torch.device("cpu")) == torch.device("cpu")
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    assert distributed.broadcast("a") == "a"
    assert distributed.gather_objects({"a": 1}) == [{"a": 1}]
    loss = torch.tensor(2.0, requires_grad=True)
    assert distributed.mean({"a": loss}) == {"a": 2.0} and not distributed.mean({"a": loss})["a"].requires_grad
    assert distributed.maximum(3, 0) == [3, 0]
    count = torch.tensor(0)
    assert distributed.mean_count(count) is count
    distributed.shutdown()


def test_wrong_start(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.raises(ValueError, match="LOCAL_RANK must be a number beside RANK and WORLD_SIZE"):
        distributed.init(torch.device("cpu"))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match=r"at most the number of GPUs here \(1\), got 2 or more"):
        distributed.init(torch.device("cuda"))
