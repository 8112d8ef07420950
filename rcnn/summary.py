"""``python -m rcnn.summary``: what runs of one recipe reached, each by itself, with mean and spread."""

import csv
import glob
import statistics
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from rcnn import console, run_folder
from rcnn.files import check_target, write_json
from rcnn.tracking import RESULTS

PROG = "rcnn summary"

#: Columns of ``results.csv`` that are summed up.
METRICS = ("AP", "AP50", "VOC_AP", "val_loss")

#: Settings in which the runs of a sweep may differ.
_FREE = {"seed", "out", "resume"}


@dataclass(frozen=True)
class Run:
    """A run folder, as far as it tells of results.

    Attributes:
        folder: as it was named.
        settings: dotted name -> value, of ``config.yaml``.
        rows: of the finished epochs: ``epoch``, ``seconds`` and the METRICS that were measured after it.
    """

    folder: str
    settings: Mapping[str, Any]
    rows: Sequence[Mapping[str, float]]

    @property
    def measured(self) -> Sequence[Mapping[str, float]]:
        """The rows with an evaluation."""
        return [row for row in self.rows if "AP" in row]

    @property
    def best(self) -> Mapping[str, float]:
        """The row of the best AP, the first if there are several: that of ``model_best.safetensors``."""
        return max(self.measured, key=lambda row: row["AP"], default={})

    @property
    def last(self) -> Mapping[str, float]:
        """The row of the last evaluation."""
        return self.measured[-1] if self.measured else {}

    @property
    def epochs(self) -> int:
        """Epochs finished."""
        return int(self.rows[-1]["epoch"]) if self.rows else 0

    @property
    def finished(self) -> bool:
        """Whether it has taken all its epochs, or ended early because it got no better."""
        patience = self.settings["patience"]
        stale = sum(row["epoch"] > self.best["epoch"] for row in self.measured)
        return self.epochs >= self.settings["epochs"] or bool(patience) and stale >= patience


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` defaults to the process's own arguments."""
    parser = console.Parser(PROG, "Sum up runs: the best and the last epoch of each, with mean and spread over them.")
    parser.add_argument("runs", type=str, nargs="+", help="run folders or globs; folders without a run are left out")
    parser.add_argument("--out", type=str, default="", help="JSON file to write")
    options = parser.read(argv)
    console.run(PROG, lambda: _summarise(options.runs, options.out))


def read(folder: str) -> Run:
    """Read the settings and the epochs of a run folder.

    Raises:
        ValueError: it holds no run, or one whose files are not as ``rcnn train`` writes them.
    """
    config, results = Path(folder) / run_folder.CONFIG, Path(folder) / RESULTS
    for file in (config, results):
        if not file.is_file():
            raise ValueError(f"{folder} holds no run: {file.name} is missing")
    try:
        settings = _flat(yaml.safe_load(config.read_text(encoding="utf-8")))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        settings = {}
    for name in ("epochs", "patience"):
        if not isinstance(settings.get(name), int):
            raise ValueError(f"{config} must hold the settings of a run, with {name} as a whole number")
    rows = []
    with open(results, encoding="utf-8", newline="") as lines:
        for number, row in enumerate(csv.DictReader(lines), 1):
            try:
                values = {name: float(row[name]) for name in ("seconds", *METRICS) if row.get(name)}
                # -1 is the AP of a validation set without objects: nothing was measured.
                known = {name: value for name, value in values.items() if value >= 0}
                rows.append({"epoch": int(row["epoch"]), **known})
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{results}, row {number}, is none of an epoch: {error} is amiss") from None
    return Run(folder, settings, rows)


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Number, mean, sample standard deviation (of n - 1; None for a single value), least and most.

    Args:
        values: at least one.
    """
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {
        "n": len(values),
        "mean": statistics.fmean(values),
        "std": deviation,
        "min": min(values),
        "max": max(values),
    }


def differences(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings, other than seed and folder, in which runs differ: dotted name -> value of each run."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _FREE)
    found = {name: [run.settings.get(name) for run in runs] for name in names}
    return {name: values for name, values in found.items() if any(value != values[0] for value in values)}


def _summarise(words: Sequence[str], out: str) -> None:
    if out:
        check_target(out)
    runs, cautions = [], []
    for folder in _folders(words):
        try:
            runs.append(read(folder))
        except ValueError as error:
            cautions.append(f"{error}; left out")
    if not runs:
        raise ValueError("; ".join(sentence.removesuffix("; left out") for sentence in cautions))
    done = [run for run in runs if run.finished]
    cautions += [
        f"{run.folder} is not finished, {run.epochs} of {run.settings['epochs']} epochs; left out of mean and spread"
        for run in runs
        if not run.finished
    ]
    differ = differences(done)
    for name, values in differ.items():
        told = ", ".join(f"{run.folder} {value}" for run, value in zip(done, values, strict=True))
        cautions.append(f"{name} differs, so that the spread is not that of seeds alone: {told}")
    seeds = Counter(run.settings.get("seed") for run in done)
    cautions += [f"seed {seed} is that of {count} runs" for seed, count in seeds.items() if count > 1 and not differ]
    over = {which: _over([getattr(run, which) for run in done]) for which in ("best", "last")}
    if out:
        content = {
            "runs": [_content(run) for run in runs],
            "over": over,
            "differ": {name: dict(zip([r.folder for r in done], v, strict=True)) for name, v in differ.items()},
            "cautions": cautions,
        }
        write_json(out, content)
    for which, title in (("best", "the epoch of the best AP (model_best)"), ("last", "the last epoch")):
        console.show(_table(title, runs, which, over[which]))
    for sentence in cautions:
        sys.stderr.write(f"{PROG}: {sentence}\n")
    if out:
        print(f"written: {out}")


def _folders(words: Sequence[str]) -> list[str]:
    """Each folder once; what is none is a glob, for shells that leave them to the program."""
    found: dict[str, None] = {}
    for word in words:
        folders = [word] if Path(word).is_dir() else [name for name in sorted(glob.glob(word)) if Path(name).is_dir()]
        if not folders and not Path(word).exists():
            raise ValueError(f"{word} must be a run folder or a glob that finds some, got none")
        found |= dict.fromkeys(str(Path(name)) for name in folders)
    if not found:
        raise ValueError(f"{', '.join(words)}: expected run folders, got files")
    return list(found)


def _over(rows: Sequence[Mapping[str, float]]) -> dict[str, dict[str, float | None]]:
    values = {name: [row[name] for row in rows if name in row] for name in METRICS}
    return {name: spread(measured) for name, measured in values.items() if measured}


def _content(run: Run) -> dict[str, Any]:
    return {
        "run": run.folder,
        "seed": run.settings.get("seed"),
        "epochs": run.epochs,
        "of": run.settings["epochs"],
        "finished": run.finished,
        "seconds": run.rows[-1].get("seconds") if run.rows else None,
        "best": run.best,
        "last": run.last,
    }


def _table(title: str, runs: Sequence[Run], which: str, over: Mapping[str, Mapping[str, float | None]]) -> Table:
    table = Table(title=title)
    table.add_column("run", overflow="fold")
    for name in ("seed", "epoch", "minutes", "AP", "AP50", "VOC AP", "val loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for run in runs:
        row = getattr(run, which)
        epoch = f"{int(row['epoch'])}/{run.settings['epochs']}" if row else "-"
        minutes = f"{row['seconds'] / 60:.1f}" if "seconds" in row else "-"
        table.add_row(run.folder, str(run.settings.get("seed", "-")), epoch, minutes, *_cells(row))
    table.add_section()
    for name in ("mean", "std", "min", "max"):
        table.add_row(name, "", "", "", *_cells({metric: found[name] for metric, found in over.items()}))
    return table


def _cells(row: Mapping[str, float | None]) -> list[str]:
    return ["-" if (value := row.get(name)) is None else f"{value:.4f}" for name in METRICS]


def _flat(settings: Mapping[str, Any], start: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{start}{name}.")
        else:
            flat[start + name] = value
    return flat


if __name__ == "__main__":
    main()
