"""What the commands of this folder share: options that could not be followed are refused before anything runs."""

import argparse
from pathlib import Path

from rcnn.files import check_target


def check_out(parser: argparse.ArgumentParser, out: Path | None) -> None:
    """End with a sentence and exit code 1 if a file could not be written later, and leave no trace."""
    if out is None:
        return
    try:
        if not out.parent.is_dir():
            parser.exit(1, f"{parser.prog} writes {out}, but its folder does not exist\n")
        check_target(out)
    except IsADirectoryError:
        parser.exit(1, f"{parser.prog} writes {out}, but that is a folder\n")
    except FileNotFoundError:
        parser.exit(1, f"{parser.prog} writes {out}, but no file can be made in its folder\n")
    except OSError as error:
        parser.exit(1, f"{parser.prog} cannot write {out}: {error.strerror}\n")


def takes_parts(out: Path) -> bool:
    """Whether a result may be written again and again as it grows: a pipe or a device would get one after another."""
    return not out.exists() or out.is_file()
