"""What the commands share: a parser that names the nearest option, errors as one sentence, tables."""

import difflib
import os
import re
import sys
from collections.abc import Callable, Sequence
from itertools import pairwise, zip_longest
from types import UnionType
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import jsonargparse
from rich.console import Console
from rich.table import Table

from rcnn.data.dataset import DetectionDataset

#: How a problem that a reader could get past ends.
_KINDS = ("image skipped", "object skipped", "box clipped")

#: Exit code after Ctrl-C, as the shell's own; and after SIGTERM, SIGUSR1 or the end of the time given, when the run can
#: be resumed: sysexits.h's "temporary failure, try again".
INTERRUPTED, PREEMPTED = 130, 75


class Parser(jsonargparse.ArgumentParser):
    """jsonargparse's parser: no abbreviations, one sentence per error, the nearest known name for an unknown one."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, exit_on_error=False, allow_abbrev=False)

    def read(self, argv: Sequence[str] | None) -> jsonargparse.Namespace:
        """Parse, or end the process with exit code 2 and a sentence."""
        words = sys.argv[1:] if argv is None else list(argv)
        try:
            return self.parse_args(self._switches(words))
        except Exception as error:  # jsonargparse raises its own, argparse's and YAML's errors
            message = " ".join(str(error).split())
            self._refuse(words, self._misled(words, message) or self._sentence(message))

    def read_groups(self, words: Sequence[str]) -> dict[str, Any]:
        """Parse, and make the dataclasses of the groups; ends the process as :meth:`read` does."""
        options = self.read(words)
        options.pop("config", None)
        for group in {dest.split(".")[0] for dest in self._leaves() if "." in dest}:
            if not isinstance(options[group], jsonargparse.Namespace):
                self._refuse(words, f"{group} must be a group of settings, got {options[group]!r}")
        make = self.instantiate if hasattr(self, "instantiate") else self.instantiate_classes
        return vars(make(options))

    def _refuse(self, words: Sequence[str], sentence: str) -> NoReturn:
        file = next((following for word, following in pairwise(words) if word == "--config"), "")
        fail(self.prog, f"{file}: {sentence}" if file else sentence, 2)

    def _leaves(self) -> dict[str, Any]:
        actions = {action.dest: action for action in self._actions if action.option_strings}
        groups = {dest for dest in actions if any(other.startswith(f"{dest}.") for other in actions)}
        return {dest: action for dest, action in actions.items() if dest not in groups}

    def _switches(self, words: list[str]) -> list[str]:
        # A switch may stand alone: --resume means --resume true. A hyphen in a name is as good as an underscore.
        words = [re.sub(r"^--[\w.\-]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in words]
        switches = self._switch_hints()
        filled = []
        for word, following in zip_longest(words, words[1:], fillvalue=""):
            filled.append(word)
            if word in switches and following.lower() not in ("true", "false", "yes", "no", "auto"):
                filled.append("true")
        return filled

    def _switch_hints(self) -> dict[str, Any]:
        """The type of each option that may stand alone."""
        hints = {name: getattr(action, "_typehint", None) for action in self._actions for name in action.option_strings}
        return {name: hint for name, hint in hints.items() if bool in (hint, *get_args(hint))}

    def _misled(self, words: Sequence[str], message: str) -> str:
        """The sentence for a word behind a switch that is no value of it; empty if that is not what is wrong."""
        hints = self._switch_hints()
        for word, following in pairwise(words):
            name = word.replace("-", "_").lstrip("_")
            if f"--{name}" in hints and message.endswith(f"unrecognized arguments: {following}"):
                return f"{name} must be {_type_name(hints[f'--{name}'])}, got {following}"
        return ""

    def _sentence(self, message: str) -> str:
        known = self._leaves()
        unknown = re.search(r"unrecognized arguments: -*([\w.\-]+)", message)
        name = unknown[1] if unknown else ""
        if unknown := re.search(r"Group '([\w.]+)' does not accept option '([\w.\-]+)'", message):
            name = f"{unknown[1]}.{unknown[2]}"
        elif unknown := re.search(r"(?:[Kk]ey|[Oo]ption) ['\"]([\w.\-]+)['\"] is not (?:expected|accepted)", message):
            name = unknown[1]
        if name:
            near = difflib.get_close_matches(name.replace("-", "_"), known, 1, 0.5)
            hint = f"did you mean --{near[0]}?" if near else f"{self.prog} --help lists the options"
            return f"unknown option {name}; {hint}"
        if unexpected := re.search(r"Unexpected config: *(.*)$", message):
            return f"expected settings as lines of NAME: VALUE, got {unexpected[1] or 'none'}"
        key = re.search(r'[Kk]ey "([\w.]+)"', message)
        got = re.search(r"(?:Given value|Got value): ?(.*)$", message)
        if key and got and key[1] in known:
            expected = getattr(known[key[1]], "_typehint", None) or known[key[1]].type
            return f"{key[1]} must be {_type_name(expected)}, got {got[1] or 'nothing'}"
        return message.removeprefix('Parser key "config": ')


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return "one of " + ", ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type_name(part) for part in get_args(hint) if part is not type(None))
    plain = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
    return plain.get(hint, str(hint))


def run(prog: str, main: Callable[[], None]) -> None:
    """Call ``main``; an expected failure becomes one sentence on stderr and exit code 1, Ctrl-C exit code 130."""
    try:
        main()
    except OSError as error:
        fail(prog, f"{error.filename}: {error.strerror}" if error.filename and error.strerror else str(error))
    except ValueError as error:
        fail(prog, str(error))
    except KeyboardInterrupt:
        sys.stderr.write(f"{prog}: interrupted\n")
        sys.exit(INTERRUPTED)


def fail(prog: str, sentence: str, code: int = 1) -> NoReturn:
    """End the process with a sentence on stderr, which names the process if there are several, and an exit code."""
    who = f"{prog}, rank {os.environ['RANK']}" if "RANK" in os.environ else prog
    sys.stderr.write(f"{who}: {sentence}\n")
    sys.exit(code)


def print_problems(dataset: DetectionDataset, split: str, limit: int = 20) -> None:
    """Say what the reader skipped or mended, a line each."""
    for problem in dataset.problems[:limit]:
        print(f"{split}: {problem}")
    if dataset.problems:
        kinds = {kind: sum(p.endswith(f"; {kind}") for p in dataset.problems) for kind in _KINDS}
        counts = ", ".join(f"{n} x {kind}" for kind, n in kinds.items() if n)
        print(f"{split}: problems: {len(dataset.problems)}" + (f" ({counts})" if counts else ""))


def ap_table(title: str, voc: dict[str, Any], coco: dict[str, Any]) -> Table:
    """A table of AP per class with the means in its last row."""
    table = Table(title=title)
    table.add_column("class")
    for name in ("objects", "AP50", "AP", "VOC area", "VOC 11-point"):
        table.add_column(name, justify="right")
    for name, row in voc["per_class"].items():
        scores = coco["per_class"][name]
        table.add_row(name, str(row["gt"]), *_cells(scores["AP50"], scores["AP"], row["ap_area"], row["ap_11point"]))
    total = str(sum(row["gt"] for row in voc["per_class"].values()))
    table.add_section()
    table.add_row("all", total, *_cells(coco["AP50"], coco["AP"], voc["map_area"], voc["map_11point"]))
    return table


def _cells(*values: float) -> list[str]:
    return ["-" if value != value or value < 0 else f"{value:.3f}" for value in values]


def show(table: Table) -> None:
    """Print a table, as wide as it needs where the output is no terminal."""
    console = Console()
    (console if console.is_terminal else Console(width=100)).print(table)
