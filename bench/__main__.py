"""``python -m bench``: the comparisons that this machine can run, as a table, and as JSON with ``--out``."""

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench import model
from bench.timing import machine


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each (default: 15)")
    options = parser.parse_args()
    if find_spec("torchvision") is None:
        parser.exit(1, "python -m bench compares with torchvision, which is not installed: pip install torchvision\n")
    result = {"machine": machine(), "model": model.run(options.repeats)}

    console = Console()
    console = console if console.is_terminal else Console(width=120)
    table = Table("", "with", "ms", "p20..p80", "best", "CPU ms", "img/s", "speed-up", title="tiny, float32")
    for row in result["model"]["rows"]:
        median, p20, p80, best, processor = (
            f"{row[key] * 1e3:.0f}" for key in ("median", "p20", "p80", "best", "processor")
        )
        speed = f"{row['images_per_second']:.1f}", f"{row['speedup']:.2f}"
        table.add_row(row["task"], row["with"], median, f"{p20}..{p80}", best, processor, *speed)
    console.print(table)
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), soft_wrap=True)
    console.print("gate: " + ", ".join(f"{k} {v:.2g}" for k, v in result["model"]["gate"].items()), soft_wrap=True)
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
