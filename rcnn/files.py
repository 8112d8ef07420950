"""Files that are either whole or not there: write to a temporary neighbour, then rename."""

import contextlib
import errno
import io
import json
import math
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader, a full disk or a kill never meets half of it.

    ``write`` fills a temporary file in the same folder (a dot file that ends in ``.tmp``), which is flushed to the
    disk and then renamed over ``path``. Whatever goes wrong before the rename leaves the previous file as it was
    and removes the temporary one; after a kill or a power cut the temporary one may stay behind.

    A file that is replaced passes on its mode. A link stays, and the file that it leads to is replaced, or made where
    there is none. A device or a pipe is never replaced: it is written to, once ``write`` has come to its end.

    Args:
        path: the file to create or to replace. Its folder must exist.
        write: called once with the temporary file, open for writing and seeking in binary mode. What it returns
            is ignored.

    Raises:
        OSError: from the file system: a missing folder, a folder in place of the file, no permission, a full disk.
        Exception: whatever ``write`` raises.
    """
    target, mode = _target(path)
    if mode is not None and not stat.S_ISREG(mode):
        _write_through(path, write)
        return
    temporary = _neighbour(target)
    try:
        with open(temporary, "xb") as file:
            if mode is not None:
                with contextlib.suppress(OSError):  # not every file system has modes
                    os.chmod(temporary, stat.S_IMODE(mode))
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.strerror:
            error.filename = str(path)  # the name that its user knows
        raise
    sync_folder(target.parent)


def check_target(path: str | os.PathLike[str]) -> None:
    """Raise what would keep :func:`atomic_write` from a file, before there is anything to write. Nothing stays behind.

    Args:
        path: the file to be created or replaced later, or a device or a pipe.

    Raises:
        OSError: it is a folder, it may not be written, or no file can be made in its folder.
    """
    target, mode = _target(path)
    if mode is not None and not stat.S_ISREG(mode):
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    temporary = _neighbour(target)
    try:
        open(temporary, "xb").close()
        temporary.unlink()
    except OSError as error:
        error.filename = str(path)
        raise


def _target(path: str | os.PathLike[str]) -> tuple[Path, int | None]:
    """What a path leads to and its mode, None where nothing is there yet; a folder is an error."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    return Path(os.path.realpath(path) if os.path.islink(path) else path), mode


def _neighbour(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _write_through(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write to a device or a pipe, which cannot be sought in: hence in one go."""
    content = io.BytesIO()
    write(content)
    with open(path, "wb") as file:
        file.write(content.getbuffer())


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write text as UTF-8, with line ends as given, by :func:`atomic_write`.

    Args:
        path: the file to create or to replace. Its folder must exist.
        text: the whole content.

    Raises:
        OSError: from the file system.
    """
    data = text.encode("utf-8")
    atomic_write(path, lambda file: file.write(data))


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Flush a folder's list of names to the disk, so that a rename in it survives a power cut.

    Does nothing where that cannot be asked for: on Windows, and on file systems that refuse it.

    Args:
        folder: an existing folder.
    """
    if os.name != "posix":
        return
    # The rename is done by now: that this file system cannot flush a folder is no reason to report a failed write.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write plain values as JSON, atomically; see :func:`finite` for numbers that JSON does not have."""
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """Plain values with None for each number that is not finite: the AP of a class without objects, for one."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
