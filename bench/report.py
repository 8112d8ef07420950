"""``python -m bench.report FILE``: a page of Markdown and plots from what ``python -m bench --out FILE`` wrote.

The page goes to ``FILE`` with the ending ``.md`` and the plots beside it, one for each op; nothing in them is typed.
"""

import argparse
import json
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from typing import Any

from bench.options import check_out
from rcnn.files import atomic_write, write_text

Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> None:
    """Read, write the page, draw the plots."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__, allow_abbrev=False)
    parser.add_argument("file", type=Path, help="JSON of python -m bench --out FILE")
    parser.add_argument("--out", type=Path, help="the page; its folder gets the plots (default: beside FILE)")
    options = parser.parse_args(arguments)
    page = options.out or options.file.parent / f"{options.file.stem}.md"
    try:
        result = json.loads(options.file.read_text(encoding="utf-8"))
        groups = {op: list(rows) for op, rows in groupby(result["rows"], key=lambda row: row["op"])}
        plots = {op: page.with_name(f"{page.stem}-{op}.png") for op, rows in groups.items() if speedups(rows)}
        text = markdown(result, groups, {op: path.name for op, path in plots.items()})
    except KeyError as error:
        parser.exit(1, f"python -m bench.report: {options.file} is no output of python -m bench: it has no {error}\n")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        parser.exit(1, f"python -m bench.report: {options.file} is no output of python -m bench: {error}\n")
    for path in (page, *plots.values()):
        check_out(parser, path)
        if path.exists() and (path.samefile(options.file) or not path.is_file()):
            parser.exit(1, f"python -m bench.report writes {path}, which must be a file other than {options.file}\n")
    if plots and find_spec("matplotlib") is None:
        parser.exit(1, "python -m bench.report draws with matplotlib, which is not installed: pip install matplotlib\n")
    for op, path in plots.items():
        draw(op, speedups(groups[op]), path)
    write_text(page, text)
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
    host = (
        "Times are the GPU's, its second-level cache full of something else and the call queued while it was busy."
        " *Host* is the time until a call returns: what its checks and launches cost the processor, and its waits."
        if on_gpu
        else "*CPU* is the time of all threads together."
    )
    lines = [
        f"# {'Benchmarks' if groups else 'Training steps'}: {machine.get('gpu') or machine['cpu']}",
        "",
        f"Measured on: {facts}. A copy moves {machine['bandwidth'] / 1e9:.1f} GB/s, read and written.",
    ]
    if groups:
        lines += [
            "",
            "Medians; every rival of a case in turn, in one run, after its result had been proved right."
            f" {host} *Of copy* is the part of that bandwidth that the bytes of the op, each read and written once,"
            " make of the time. *Extra* is the most memory held at a time beyond the inputs. *Speed-up* is against"
            " torchvision, or plain torch where torchvision was not compared.",
        ]
    for op, rows in groups.items():
        lines += ["", f"## {op}", ""]
        if op in plots:
            lines += [f"![Speed-up of {op} by case]({plots[op]})", ""]
        host = "host, us" if on_gpu else "CPU, ms"
        lines.append(f"| case | with | {unit} | p20 to p80 | {host} | of copy | extra, MB | speed-up |")
        lines.append("| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |")
        for row in rows:
            p20, median, p80, processor = (digits(row[key] * factor) for key in ("p20", "median", "p80", "processor"))
            cells = (
                case_of(row),
                row["with"],
                median,
                f"{p20} to {p80}",
                processor,
                f"{row['bandwidth_share']:.1%}",
                digits(row["peak_memory"] / 1e6),
                "" if row["speedup"] is None else f"{row['speedup']:.2f}",
            )
            lines.append(f"| {' | '.join(cells)} |")
    if "step" in result:
        lines += step_lines(result["step"], on_gpu)
    if "compile" in result:
        lines += ["", "## Compiling", "", "| source | type | for | state | ms |", "| --- | --- | --- | --- | ---: |"]
        lines += [
            f"| {r['source']} | {r['dtype']} | {r['for']} | {r['state']} | {r['seconds'] * 1e3:.1f} |"
            for r in result["compile"]
        ]
    return "\n".join(lines) + "\n"


def step_lines(found: dict[str, Any], on_gpu: bool) -> list[str]:
    """The section of ``python -m bench --step``."""
    rest = (
        "gaps between kernels included, and a step replayed as a CUDA graph has none; *idle* is the part of a step in"
        " which the GPU does nothing"
        if on_gpu
        else ("*rest* is what belongs to none")
    )
    lines = [
        "",
        "## Training steps and detections",
        "",
        "A training step is forward, backward, clipping and the fused optimiser; a detection ends with results without"
        " padding; *predict* goes from files to boxes. Both detectors have the same weights, images and steps, after"
        " their losses had been equal. *Peak* is the most memory held at a time beyond images, weights and the"
        f" optimiser's state. Stages are medians, {rest}. Speed-up is against torchvision as it comes.",
    ]
    if not on_gpu:
        lines.append("\nThe images are small here, for the sake of a CPU: they say nothing about a GPU.")
    for (model, task), group in groupby(found["rows"], key=lambda row: (row["model"], row["task"])):
        rows = list(group)
        columns = step_columns(rows)
        height, width = rows[0]["size"]
        lines += ["", f"### {model}, {task}, {height} x {width} pixels, ms", "", f"| {' | '.join(columns)} |"]
        lines.append(f"| --- | --- | --- |{' ---: |' * (len(columns) - 3)}")
        lines += [f"| {' | '.join(step_cells(row, columns))} |" for row in rows]
    lines += ["", "### Data", "", *(f"- {data_line(row)}" for row in found["loader"])]
    for model, gate in found["gate"].items():
        named = ", ".join(f"{name} {value:.1e}" for name, value in gate.items())
        lines += ["", f"{model} and torchvision's, with every anchor and proposal in the loss, differed by: {named}."]
    return lines


def step_columns(rows: list[Row]) -> list[str]:
    """Columns of a table of steps: those that some row fills."""
    columns = ["batch", "precision", "with", "img/s", "total", "p20 to p80"]
    columns += dict.fromkeys(stage for row in rows for stage in row.get("stages", {}))
    optional = {"idle": "idle", "peak_memory": "peak, MB", "speedup": "speed-up"}
    return columns + [name for key, name in optional.items() if any(row.get(key) is not None for row in rows)]


def step_cells(row: Row, columns: list[str]) -> list[str]:
    """What a row has for each column."""
    idle, memory, speed = (row.get(key) for key in ("idle", "peak_memory", "speedup"))
    cells = {
        "batch": f"{row['batch']}, {row['files']} files" if "files" in row else str(row["batch"]),
        "precision": row["precision"],
        "with": row["with"],
        "img/s": digits(row["images_per_second"]),
        "total": milliseconds(row["median"]),
        "p20 to p80": f"{milliseconds(row['p20'])} to {milliseconds(row['p80'])}",
        **{stage: milliseconds(seconds) for stage, seconds in row.get("stages", {}).items()},
        "idle": "" if idle is None else f"{idle:.0%}",
        "peak, MB": "" if memory is None else digits(memory / 1e6),
        "speed-up": "" if speed is None else f"{speed:.2f}",
    }
    return [cells.get(column, "") for column in columns]


def digits(value: float) -> str:
    """Four digits, or all that stand before the point."""
    return f"{value:.0f}" if value >= 1e4 else f"{value:.4g}"


def milliseconds(seconds: float) -> str:
    """Three digits, or all that stand before the point."""
    value = seconds * 1e3
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def data_line(row: Row) -> str:
    """The loader's figures as a sentence."""
    return (
        f"{row['model']}, {row['precision']}: the loader alone gives {row['loader_images_per_second']:.4g} img/s with"
        f" {row['workers']} workers in batches of {row['batch']}; training with it {row['images_per_second']:.4g}"
        f" img/s, and {row['data']:.0%} of the time goes by for want of data"
    )


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
    from matplotlib import pyplot, ticker

    names, values = zip(*reversed(pairs), strict=True)
    figure, axes = pyplot.subplots(figsize=(9, 0.8 + 0.3 * len(values)), layout="constrained")
    bars = axes.barh(range(len(values)), [value - 1 for value in values], left=1, color="#3b6ea5")
    axes.bar_label(bars, labels=[f"{value:.2f}" for value in values], padding=3, fontsize=8)
    axes.set_yticks(range(len(values)), names, fontsize=8)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    least, most = min(0.6, *(0.8 * value for value in values)), max(2.0, *values)
    axes.set_xlim(least, most * (most / least) ** 0.15)  # a number has its place beyond the longest bar
    axes.set_ylim(-0.6, len(values) - 0.4)
    axes.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if most < 50 * least else (1,)))
    axes.xaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(ticker.NullFormatter())
    axes.set_xlabel(f"{op}: times as fast as the peer")
    axes.spines[["top", "right"]].set_visible(False)
    atomic_write(path, lambda file: figure.savefig(file, format="png", dpi=110))
    pyplot.close(figure)


if __name__ == "__main__":
    main()
