"""Atomic writes: the previous file stays whole whatever happens before the rename."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import BinaryIO

import pytest

from rcnn.files import atomic_write, write_text


def test_creates_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    atomic_write(path, lambda file: file.write(b"one"))
    assert path.read_bytes() == b"one"
    atomic_write(str(path), lambda file: file.write(b"2"))
    assert path.read_bytes() == b"2"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_writer_may_seek(tmp_path: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"....tail")
        file.seek(0)
        file.write(b"head")

    atomic_write(tmp_path / "a.bin", write)
    assert (tmp_path / "a.bin").read_bytes() == b"headtail"


def test_text_is_utf8_with_line_ends_as_given(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "Gänseblümchen\n\r\n")
    assert (tmp_path / "a.txt").read_bytes() == "Gänseblümchen\n\r\n".encode()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_a_failed_write_leaves_the_previous_file_and_no_other(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"previous")

    def write(file: BinaryIO) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, write)
    assert path.read_bytes() == b"previous"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_flush_or_rename_leaves_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"previous")

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="Input/output error"):
        atomic_write(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"previous"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_content_is_flushed_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(descriptor: int) -> None:
        calls.append("fsync")
        fsync(descriptor)

    def record_replace(source: Path, target: Path) -> None:
        calls.append("replace")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", record_replace)
    atomic_write(tmp_path / "a.bin", lambda file: file.write(b"new"))
    assert calls == (["fsync", "replace", "fsync"] if os.name == "posix" else ["fsync", "replace"])


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "none" / "a.txt", "")


@pytest.mark.skipif(os.name != "posix", reason="kills with SIGKILL")
def test_a_kill_in_the_middle_leaves_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"previous")
    code = """if True:
        import os, signal, sys
        from rcnn.files import atomic_write
        def write(file):
            file.write(b"half")
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
        atomic_write(sys.argv[1], write)
    """
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=Path(__file__).parents[1])
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"previous"
