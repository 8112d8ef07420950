"""The lock, the states that are kept, and the one to go on from."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rcnn import run_folder
from rcnn.checkpoint import CheckpointError, read_state

HOLDER = """
import sys, time
from pathlib import Path
from rcnn import run_folder
try:
    lock = run_folder.Lock(Path(sys.argv[1]), print)
except run_folder.FolderInUseError as error:
    sys.exit(str(error))
print("held", flush=True)
time.sleep(60)
"""


def holder(folder):
    root = str(Path(run_folder.__file__).parents[1])
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_folder_is_for_one_run_and_free_once_that_is_killed(tmp_path):
    first = holder(tmp_path)
    try:
        assert first.stdout.readline() == "held\n"
        second = holder(tmp_path)
        _, told = second.communicate(timeout=60)
        assert second.returncode == 1
        assert f"{tmp_path} is in use by another run (process {first.pid} on " in told
        with pytest.raises(run_folder.FolderInUseError, match=f"process {first.pid}"):
            run_folder.Lock(tmp_path, print)
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    run_folder.Lock(tmp_path, print).release()


def test_what_a_loading_process_inherits_keeps_nobody_out(tmp_path):
    lock = run_folder.Lock(tmp_path, print)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:  # as a worker that lives on after the main process was killed
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    try:
        lock.release()
        second = holder(tmp_path)
        assert second.stdout.readline() == "held\n"
        second.kill()
        second.communicate()
    finally:
        os.close(writer)
        os.waitpid(child, 0)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run_folder, "_lock", refuse)
    told = []
    run_folder.Lock(tmp_path, told.append).release()
    assert told == [
        f"warning: {tmp_path} cannot be locked (Function not implemented); see to it that no second run uses it"
    ]


def test_the_newest_states_are_kept(tmp_path):
    for step in (3, 20, 100):
        run_folder.save_state(tmp_path, step, {"step": step}, keep=2)
    assert [read_state(file)["step"] for file in run_folder.states(tmp_path)] == [20, 100]
    run_folder.save_state(tmp_path, 100, {"step": 100}, keep=2)  # again, as a signal right after a checkpoint does
    assert len(run_folder.states(tmp_path)) == 2


def test_a_damaged_state_gives_way_to_the_one_before(tmp_path):
    for step in (1, 2, 3):
        run_folder.save_state(tmp_path, step, {"a": torch.full((100,), float(step))}, keep=3)
    first, second, third = run_folder.states(tmp_path)
    third.write_bytes(third.read_bytes()[:500])
    content = bytearray(second.read_bytes())
    content[600] ^= 4
    second.write_bytes(content)
    told = []
    assert run_folder.newest_state(tmp_path, told.append) == first
    assert len(told) == 2 and str(third) in told[0] and str(second) in told[1]
    assert all(line.startswith("warning: ") and "the state before it is used" in line for line in told)
    assert {file.name for file in tmp_path.iterdir()} == {first.name, f"{second.name}.damaged", f"{third.name}.damaged"}
    first.write_bytes(b"")
    with pytest.raises(CheckpointError, match="holds no training state that is whole"):
        run_folder.newest_state(tmp_path, told.append)


def test_what_killed_writes_leave_is_removed(tmp_path):
    (tmp_path / ".state-000000003.pt.0a1b2c3d.tmp").write_bytes(b"half")
    (tmp_path / "config.yaml").write_text("")
    run_folder.remove_leavings(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]
