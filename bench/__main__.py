"""``python -m bench``: what is first proved right is then timed against peers in the same run.

Without a GPU the CPU bodies run. Compared with torchvision where it is installed, and with the op as one writes it in
plain torch. ``--step`` takes whole training steps and detections instead, and says where their time goes. A table is
printed as the run goes on; ``--out`` keeps everything as JSON, which ``python -m bench.report`` turns into a page and
plots.
"""

import argparse
import importlib
import subprocess
import sys
import time
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench import compiling, model, step
from bench.cases import PEERS, OpSet, run
from bench.options import check_out, takes_parts
from bench.report import data_line, digits, step_cells, step_columns
from bench.timing import bandwidth, machine
from rcnn.data import open_dataset
from rcnn.files import write_json

OPS = ("anchors", "matching", "proposals", "nms", "roi_align", "roi_pool", "detections")
#: Timed calls of each rival, and seconds for a case if that is less.
REPEATS, SECONDS = {"cpu": 15, "cuda": 50}, {"cpu": 10.0, "cuda": 1.0}
ROOT = Path(__file__).resolve().parents[1]


def main(arguments: list[str] | None = None) -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--op", nargs="+", choices=(*OPS, "model"), metavar="OP", help=f"of {', '.join(OPS)}, model")
    parser.add_argument(
        "--against", nargs="*", choices=PEERS, metavar="PEER", help=f"of {', '.join(PEERS)} (default: all)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU")
    parser.add_argument(
        "--step", nargs="*", choices=step.MODELS, metavar="MODEL",
        help=f"training steps and detections by stage, of {', '.join(step.MODELS)} (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--batch", nargs="+", type=int, default=step.BATCHES, metavar="N", help="images per batch of --step"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="VOC or COCO folder for the loader of --step")
    parser.add_argument("--full", action="store_true", help="the tests of the ops first, then everything there is")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON file to write")
    parser.add_argument(
        "--repeats", type=int, help=f"timed calls of each (default: {REPEATS['cpu']}, GPU {REPEATS['cuda']})"
    )
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.exit(1, "python -m bench: torch finds no GPU for --device cuda; python -m rcnn.env says why\n")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    installed = {peer for peer in PEERS if find_spec(peer)}
    peers = installed if options.against is None else set(options.against)
    everything = () if options.step is not None and not options.full else OPS
    wanted = options.op or (everything if not options.full or device.type == "cuda" else (*OPS, "model"))
    if options.repeats is not None and options.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {options.repeats}")
    if min(options.batch) < 1:
        parser.error(f"--batch must be at least 1, got {min(options.batch)}")
    if device.type == "cuda" and "model" in wanted:
        parser.error("--op model compares detectors on the CPU: give --device cpu")
    if missing := (peers | ({"torchvision"} if "model" in wanted else set())) - installed:
        parser.exit(
            1, f"python -m bench compares with {missing.pop()}, which is not installed: pip install torchvision\n"
        )
    if options.data is not None and options.step is None:
        parser.error("--data is for the loader of --step, which is missing")
    if options.data is not None:
        try:
            open_dataset(options.data, "train")
        except (OSError, ValueError) as error:
            parser.exit(1, f"python -m bench: --data cannot be read: {error}\n")
    check_out(parser, options.out)
    kept = options.out is not None and takes_parts(options.out)

    console = Console() if Console().is_terminal else Console(width=220)
    result: dict[str, Any] = {"machine": {**machine(device), "device": device.type}, "rows": []}
    if options.full:
        result["tests"] = op_tests(device)
        console.print(f"tests: {result['tests']}")
    repeats, seconds = options.repeats or REPEATS[device.type], SECONDS[device.type]
    peak = result["machine"]["bandwidth"] = bandwidth(device)
    console.print(", ".join(f"{key} {value}" for key, value in result["machine"].items()), soft_wrap=True)
    for op in wanted:
        if op == "model":
            result["model"] = model.run(repeats)
            console.print(model_table(result["model"]["rows"]))
            continue
        module: OpSet = importlib.import_module(f"bench.{op}")
        rows: list[dict[str, Any]] = []
        for case in module.cases(device, peers):
            rows += run(op, case, device, peak, repeats, seconds)
        console.print(op_table(op, rows, device))
        result["rows"] += rows
        if kept:
            write_json(options.out, result)  # what is measured is kept, whatever comes after it
    if options.step is not None:
        models, compared = options.step or step.MODELS, "torchvision" in peers
        result["step"] = {"gate": {}, "rows": [], "loader": []}
        for part in step.run(models, options.batch, options.data, device, compared, repeats):
            for table in step_tables(part["rows"]):
                console.print(table)
            console.print(*map(data_line, part["loader"]), soft_wrap=True)
            result["step"]["gate"] |= part["gate"]
            result["step"]["rows"] += part["rows"]
            result["step"]["loader"] += part["loader"]
            if kept:
                write_json(options.out, result)
    if options.full:
        result["compile"] = compiling.rows(device)
        console.print(compile_table(result["compile"]))
    if options.out is not None:
        write_json(options.out, result)
        console.print(f"written: {options.out}")


def op_tests(device: torch.device) -> str:
    """Run the tests of the ops on a device; gives pytest's last line.

    Raises:
        SystemExit: a test fails; nothing is timed then.
    """
    files = [f"tests/test_{op}.py" for op in OPS]
    skipped = "cuda-on-cpu or (not cuda and cpu)" if device.type == "cuda" else "cuda"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", f"not ({skipped})", *files]
    start = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{done.stdout}{done.stderr}\nthe ops are not right on {device}, so nothing is timed")
    return f"{done.stdout.strip().splitlines()[-1]} ({time.perf_counter() - start:.0f} s with pytest's start)"


def op_table(op: str, rows: list[dict[str, Any]], device: torch.device) -> Table:
    """The rows of one op."""
    unit, host = (1e6, "host us") if device.type == "cuda" else (1e3, "CPU ms")
    table = Table(
        "case", "with", "us" if unit == 1e6 else "ms", "p20..p80", host, "of copy", "extra MB", "speed-up", title=op
    )
    before = None
    for row in rows:
        p20, median, p80, processor = (digits(row[key] * unit) for key in ("p20", "median", "p80", "processor"))
        speed = "" if row["speedup"] is None else f"{row['speedup']:.2f}"
        share, memory = f"{row['bandwidth_share']:.1%}", digits(row["peak_memory"] / 1e6)
        name = row["case"] + ("" if row["dtype"] == "float32" else f", {row['dtype']}")
        shown = "" if name == before else name
        table.add_row(shown, row["with"], median, f"{p20}..{p80}", processor, share, memory, speed)
        before = name
    return table


def model_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of ``bench/model.py``."""
    table = Table("", "with", "ms", "p20..p80", "best", "CPU ms", "img/s", "speed-up", title="tiny, float32")
    for row in rows:
        median, p20, p80, best, processor = (
            f"{row[key] * 1e3:.0f}" for key in ("median", "p20", "p80", "best", "processor")
        )
        speed = f"{row['images_per_second']:.1f}", f"{row['speedup']:.2f}"
        table.add_row(row["task"], row["with"], median, f"{p20}..{p80}", best, processor, *speed)
    return table


def step_tables(rows: list[dict[str, Any]]) -> list[Table]:
    """The rows of ``bench/step.py``, a table for each task."""
    tables = []
    for task, group in groupby(rows, key=lambda row: row["task"]):
        found = list(group)
        columns = step_columns(found)
        height, width = found[0]["size"]
        table = Table(*columns, title=f"{found[0]['model']}, {task}, {height} x {width} pixels, ms")
        for row in found:
            table.add_row(*step_cells(row, columns))
        tables.append(table)
    return tables


def compile_table(rows: list[dict[str, Any]]) -> Table:
    """The rows of ``bench/compiling.py``."""
    table = Table("source", "type", "for", "state", "ms", title="compile")
    for row in rows:
        table.add_row(row["source"], row["dtype"], row["for"], row["state"], f"{row['seconds'] * 1e3:.1f}")
    return table


if __name__ == "__main__":
    main()
