"""The run folder on the disk: one run at a time in it, its training states, and which of them to go on from."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from rcnn import checkpoint
from rcnn.checkpoint import CheckpointError

#: The settings of a run, every field filled in.
CONFIG = "config.yaml"

#: A training state, by the number of steps taken.
STATE = "state-{:09d}.pt"

#: A step whose loss or gradient was not finite, for ``rcnn train --replay``.
BAD_STEP = "bad_step-{:09d}-rank{}.pt"

_LOCK = ".lock"


class FolderInUseError(ValueError):
    """Another process trains in the folder."""


class Lock:
    """Keeps a run folder for one process until it ends, however it ends.

    The lock is the operating system's, on the file ``.lock``: no clock enters, and neither a killed process nor a
    copied folder leaves one behind. Loading processes do not inherit it.

    Args:
        folder: exists.
        warn: told a sentence where the file system has no locks.

    Raises:
        FolderInUseError: another process holds it.
        OSError: the file cannot be written.
    """

    def __init__(self, folder: Path, warn: Callable[[str], None]) -> None:
        self._file: IO[str] = open(folder / _LOCK, "a+", encoding="utf-8")  # noqa: SIM115
        try:
            _lock(self._file)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            holder = self._file.read().strip()
            self._file.close()
            raise FolderInUseError(
                f"{folder} is in use by another run ({holder or 'unknown'}); wait for its end, or choose another --out"
            ) from None
        except OSError as error:
            warn(f"warning: {folder} cannot be locked ({error.strerror}); see to it that no second run uses it")
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._file.flush()

    def release(self) -> None:
        """Let others in."""
        self._file.close()


def _lock(file: IO[str]) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        file.seek(0)
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        # Of the process, not of the open file as flock's: what a loading process inherits does not keep it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def remove_leavings(folder: Path) -> None:
    """Delete the temporary files of writes that a kill cut short; only for who holds the lock."""
    for file in folder.glob(".*.tmp"):
        file.unlink(missing_ok=True)


def states(folder: Path) -> list[Path]:
    """The training states of a folder, by rising number of steps."""
    return sorted(folder.glob("state-*.pt"))


def save_state(folder: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write a training state, then delete all but the newest ``keep``.

    Raises:
        CheckpointError: it cannot be written; those of before are whole.
    """
    checkpoint.save_state(folder / STATE.format(step), state)
    for old in states(folder)[:-keep]:
        old.unlink(missing_ok=True)


def newest_state(folder: Path, warn: Callable[[str], None]) -> Path:
    """The newest training state that is whole.

    A newer one that is torn or damaged gets ``.damaged`` at the end of its name, so that it neither counts nor is lost.

    Args:
        folder: the run folder.
        warn: told a sentence about each such file.

    Raises:
        CheckpointError: there is none.
    """
    for file in reversed(states(folder)):
        try:
            checkpoint.check_seal(file)
        except CheckpointError as error:
            os.replace(file, f"{file}.damaged")
            warn(f"warning: {error}; kept as {file.name}.damaged, and the state before it is used")
        else:
            return file
    raise CheckpointError(f"{folder} holds no training state that is whole; begin anew with another --out")
