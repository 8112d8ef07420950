"""Files that are either whole or not there: write to a temporary neighbour, then rename."""

import contextlib
import json
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO


def atomic_write(path: str | os.PathLike[str], write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a reader, a full disk or a kill never meets half of it.

    ``write`` fills a temporary file in the same folder (a dot file that ends in ``.tmp``), which is flushed to the
    disk and then renamed over ``path``. Whatever goes wrong before the rename leaves the previous file as it was
    and removes the temporary one; after a kill or a power cut the temporary one may stay behind.

    Args:
        path: the file to create or to replace. Its folder must exist.
        write: called once with the temporary file, open for writing and seeking in binary mode. What it returns
            is ignored.

    Raises:
        OSError: from the file system: a missing folder, no permission, a full disk.
        Exception: whatever ``write`` raises.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.strerror:
            error.filename = str(path)  # the name that its user knows
        raise
    sync_folder(path.parent)


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
