"""``python -m bench.report FILE``: a page of Markdown and plots from what ``python -m bench --out FILE`` wrote.

The page goes to ``FILE`` with the ending ``.md`` and the plots beside it, one for each op; nothing in them is typed.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

from rcnn.files import atomic_write, write_text

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Read, write the page, draw the plots."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="JSON of python -m bench --out FILE")
    parser.add_argument("--out", type=Path, help="the page; its folder gets the plots (default: beside FILE)")
    options = parser.parse_args(arguments)
    try:
        result = json.loads(options.file.read_text(encoding="utf-8"))
        groups = {op: list(rows) for op, rows in groupby(result["rows"], key=lambda row: row["op"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        parser.exit(1, f"python -m bench.report: {options.file} is no output of python -m bench: {error}\n")
    page = options.out or options.file.with_suffix(".md")
    if not page.parent.is_dir():
        parser.exit(1, f"python -m bench.report writes {page}, but its folder does not exist\n")
    plots = {op: page.with_name(f"{page.stem}-{op}.png") for op, rows in groups.items() if speedups(rows)}
    for op, path in plots.items():
        draw(op, speedups(groups[op]), path)
    write_text(page, markdown(result, groups, {op: path.name for op, path in plots.items()}))
    print(f"written: {page} and {len(plots)} plots")


def markdown(result: dict[str, Any], groups: dict[str, list[Row]], plots: dict[str, str]) -> str:
    """The page.

    Args:
        result: the whole JSON.
        groups: its rows by op.
        plots: file name of the plot of each op that has one.
    """
    machine = result["machine"]
    on_gpu = machine["device"] == "cuda"
    factor, unit = (1e6, "us") if on_gpu else (1e3, "ms")
    facts = ", ".join(f"{key} {value}" for key, value in machine.items() if key != "bandwidth" and value is not None)
    lines = [
        f"# Benchmarks: {machine.get('gpu') or machine['cpu']}",
        "",
        f"Measured on: {facts}. A copy moves {machine['bandwidth'] / 1e9:.1f} GB/s, read and written.",
        "",
        "Medians; every rival of a case in turn, in one run, after its result had been proved right. *Of copy* is the"
        " part of that bandwidth that the bytes of the op, each read and written once, make of the time. *Extra* is the"
        " most memory held at a time beyond the inputs. *Speed-up* is against torchvision, or plain torch where it has"
        " no such op.",
    ]
    for op, rows in groups.items():
        lines += ["", f"## {op}", ""]
        if op in plots:
            lines += [f"![Speed-up of {op} by case]({plots[op]})", ""]
        host = "host, us" if on_gpu else "CPU, ms"
        lines.append(f"| case | with | {unit} | p20 to p80 | {host} | of copy | extra, MB | speed-up |")
        lines.append("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |")
        for row in rows:
            p20, median, p80, processor = (f"{row[key] * factor:.4g}" for key in ("p20", "median", "p80", "processor"))
            cells = (
                case_of(row),
                row["with"],
                median,
                f"{p20} to {p80}",
                processor,
                f"{row['bandwidth_share']:.1%}",
                f"{row['peak_memory'] / 1e6:.4g}",
                "" if row["speedup"] is None else f"{row['speedup']:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    if "compile" in result:
        lines += ["", "## Compiling", "", "| source | type | for | state | ms |", "| --- | --- | --- | --- | ---: |"]
        lines += [
            f"| {r['source']} | {r['dtype']} | {r['for']} | {r['state']} | {r['seconds'] * 1e3:.1f} |"
            for r in result["compile"]
        ]
    return "\n".join(lines) + "\n"


def case_of(row: Row) -> str:
    """The case with its type, where that is not float32."""
    case: str = row["case"]
    return case if row["dtype"] == "float32" else f"{case}, {row['dtype']}"


def speedups(rows: list[Row]) -> list[tuple[str, float]]:
    """Case and speed-up of our rows, those that have one."""

    def pairs() -> Iterator[tuple[str, float]]:
        for row in rows:
            if row["with"] == "rcnn" and row["speedup"] is not None:
                yield case_of(row), row["speedup"]

    return list(pairs())


def draw(op: str, pairs: list[tuple[str, float]], path: Path) -> None:
    """Bars of the speed-up by case, on a logarithmic axis, with a line where both are as fast."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names, values = zip(*reversed(pairs), strict=True)
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.32 * len(values)), layout="constrained")
    bars = axes.barh(range(len(values)), [value - 1 for value in values], left=1, color="#3b6ea5")
    axes.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(values)), names, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(min(0.5, *(0.8 * value for value in values)), 1.6 * max(2.0, *values))
    axes.set_xlabel(f"{op}: times as fast as the peer")
    axes.spines[["top", "right"]].set_visible(False)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot.close(figure)


if __name__ == "__main__":
    main()
