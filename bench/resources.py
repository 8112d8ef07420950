"""``python -m bench.resources``: what each kernel takes of a GPU, by the compiler's report; needs no GPU.

Compiles every source for every architecture and storage type and puts a table of registers, shared memory, spills and
theoretical occupancy between two marks of ``docs/kernels.md``.
"""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from bench.options import check_out
from rcnn.files import write_text
from rcnn.kernels import _launch
from rcnn.kernels.warmup import SOURCES

#: Architectures that the kernels are compiled for, from the GTX 10x0 to Blackwell.
ARCHS = (61, 70, 75, 80, 86, 89, 90, 100, 120)
#: Those with a column of their own in the table.
SHOWN = (61, 80, 90, 120)
PAGE = Path(__file__).resolve().parents[1] / "docs" / "kernels.md"
BEGIN, END = "<!-- resources: begin -->", "<!-- resources: end -->"

#: Per architecture: warps, blocks and bytes of shared memory of a multiprocessor, bytes that each block costs besides
#: (CUDA C++ Programming Guide, table "Technical Specifications per Compute Capability").
LIMITS = {
    61: (64, 32, 96 << 10, 0),
    70: (64, 32, 96 << 10, 0),
    75: (32, 16, 64 << 10, 0),
    80: (64, 32, 164 << 10, 1024),
    86: (48, 16, 100 << 10, 1024),
    89: (48, 24, 100 << 10, 1024),
    90: (64, 32, 228 << 10, 1024),
    100: (64, 32, 228 << 10, 1024),
    120: (48, 24, 100 << 10, 1024),
}
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for")
_SPILL = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_THREADS = re.compile(r"\.entry (\w+)\(.*?\.maxntid (\d+)", re.DOTALL)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes on one architecture.

    Attributes:
        kernel: name.
        arch: 10 times the compute capability.
        registers: of each thread.
        shared: static shared memory of a block, bytes.
        stack: of each thread in local memory, bytes.
        spills: stores and loads of spilled registers, bytes.
        threads: of a block, at most.
    """

    kernel: str
    arch: int
    registers: int
    shared: int
    stack: int
    spills: int
    threads: int

    @property
    def occupancy(self) -> float:
        """Share of a multiprocessor's warps that fit, by registers, static shared memory and blocks."""
        warps, blocks, shared, reserved = LIMITS[self.arch]
        mine = -(-self.threads // 32)
        registers = -(-self.registers * 32 // 256) * 256  # of a warp; given out in units of 256
        by_registers = (65536 // 4 // registers * 4) // mine  # a multiprocessor has four register files
        by_shared = shared // (self.shared + reserved) if self.shared + reserved else blocks
        return min(blocks, warps // mine, by_registers, by_shared) * mine / warps


def archs() -> list[int]:
    """Those of ``ARCHS`` that the installed NVRTC knows."""
    known = _launch.nvrtc_archs()
    return [arch for arch in ARCHS if arch in known]


def resources(source: _launch.CudaSource, dtype: torch.dtype | None, arch: int) -> list[Resources]:
    """The compiler's report on each kernel of a source."""
    _, log = _launch.compile_source(source, dtype, f"sm_{arch}", ("--ptxas-options=-v",))
    threads = {name: int(count) for name, count in _THREADS.findall(ptx(source, dtype, arch))}
    rows = []
    for part in _ENTRY.split(log)[1:]:
        if part.isidentifier():
            kernel = part
            continue
        spill, used = _SPILL.search(part), _USED.search(part)
        assert spill is not None and used is not None, f"no report on {kernel} in: {part}"
        stack, stores, loads = map(int, spill.groups())
        shared = int(used[2] or 0)
        rows.append(Resources(kernel, arch, int(used[1]), shared, stack, stores + loads, threads[kernel]))
    return rows


def ptx(source: _launch.CudaSource, dtype: torch.dtype | None, arch: int) -> str:
    """The source as PTX."""
    return _launch.compile_source(source, dtype, f"compute_{arch}")[0].decode()


def table() -> str:
    """A Markdown table with a row per kernel and storage type."""
    shown = [arch for arch in archs() if arch in SHOWN]
    columns = "/".join(f"sm_{arch}" for arch in shown)
    lines = [
        "Compiled by NVRTC {}.{}; ".format(*_launch.nvrtc_version()) + f"where a cell has several figures: {columns}.",
        "",
        "| kernel | storage | threads | registers | static shared, bytes | spills, bytes | occupancy, % |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for source in SOURCES:
        for dtype in source.dtypes:
            reports = [resources(source, dtype, arch) for arch in shown]
            for rows in sorted(zip(*reports, strict=True), key=lambda rows: rows[0].kernel):
                cells = (
                    f"`{rows[0].kernel}`",
                    "" if dtype is None else _launch.SCALARS[dtype],
                    str(rows[0].threads),
                    " / ".join(str(row.registers) for row in rows),
                    str(max(row.shared for row in rows)),
                    str(sum(row.spills for row in rows)),
                    " / ".join(f"{row.occupancy:.0%}".rstrip("%") for row in rows),
                )
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Write the table into the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.resources", description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=PAGE, help="Markdown page with the two marks (docs/kernels.md)")
    page = parser.parse_args(arguments).out
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        parser.exit(1, f"python -m bench.resources cannot read {page}: {reason}\n")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        parser.exit(1, f"python -m bench.resources writes between {BEGIN} and {END}, which {page} does not have\n")
    check_out(parser, page)
    try:
        write_text(page, f"{before}{begin}\n\n{table()}\n\n{end}{after}")
    except _launch.KernelError as error:
        parser.exit(1, f"python -m bench.resources: {error}\n")


if __name__ == "__main__":
    main()
