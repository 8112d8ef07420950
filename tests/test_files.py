"""Atomic writes: the previous file stays whole whatever happens before the rename."""

import errno
import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import BinaryIO

import pytest

from rcnn.files import atomic_write, check_target, write_text


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


posix = pytest.mark.skipif(os.name != "posix", reason="has no links, pipes and modes to write into")


@posix
def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    link = tmp_path / "link"
    link.symlink_to(pipe)
    for name in (pipe, link):
        check_target(name)
        found: list[bytes] = []
        reader = threading.Thread(target=lambda found=found: found.append(pipe.read_bytes()), daemon=True)
        reader.start()

        def write(file: BinaryIO) -> None:
            file.write(b"....tail")
            file.seek(0)
            file.write(b"head")

        atomic_write(name, write)
        assert stat.S_ISFIFO(pipe.stat().st_mode), "replaced by a file"
        reader.join(timeout=60)
        assert found == [b"headtail"]
    assert link.is_symlink() and sorted(os.listdir(tmp_path)) == ["link", "pipe"]


@posix
def test_a_device_is_written_to_and_stays(tmp_path: Path) -> None:
    """A device of the test's own, of the kind of ``/dev/full``."""
    device = tmp_path / "full"
    try:
        os.mknod(device, 0o600 | stat.S_IFCHR, os.makedev(1, 7))
        open(device, "wb").close()
    except OSError:
        pytest.skip("may not make a device here")
    with pytest.raises(OSError, match="No space left on device"):
        write_text(device, "new")
    assert stat.S_ISCHR(device.stat().st_mode) and os.listdir(tmp_path) == ["full"]


def test_a_folder_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    for use in (check_target, lambda path: atomic_write(path, lambda file: pytest.fail("asked for the content"))):
        with pytest.raises(IsADirectoryError) as refused:
            use(tmp_path)
        assert (refused.value.filename, refused.value.strerror) == (str(tmp_path), "Is a directory")
    assert os.listdir(tmp_path) == []


@posix
def test_a_link_stays_and_what_it_leads_to_is_written(tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    link = tmp_path / "link"
    link.symlink_to(Path("far") / "file")
    for text in ("made", "replaced"):  # the link leads nowhere first
        check_target(link)
        write_text(link, text)
        assert link.is_symlink() and not (tmp_path / "far" / "file").is_symlink()
        assert (tmp_path / "far" / "file").read_text() == text
    assert os.listdir(tmp_path / "far") == ["file"]
    link.unlink()
    link.symlink_to(link)
    with pytest.raises(OSError, match="symbolic links"):
        write_text(link, "")
    assert link.is_symlink()


@posix
def test_a_file_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("private")
    path.chmod(0o600)
    modes: list[int] = []
    atomic_write(path, lambda file: modes.append(os.fstat(file.fileno()).st_mode & 0o777))
    assert (path.stat().st_mode & 0o777, modes) == (0o600, [0o600]), "private from the start"


def test_a_target_is_checked_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("kept")
    for name in ("a.txt", "b.txt"):
        check_target(tmp_path / name)
    assert os.listdir(tmp_path) == ["a.txt"] and (tmp_path / "a.txt").read_text() == "kept"
    for path in (tmp_path / "none" / "a.txt", tmp_path / "a.txt" / "b.txt", tmp_path / ("x" * 300)):
        with pytest.raises(OSError) as refused:
            check_target(path)
        assert refused.value.filename == str(path)


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
