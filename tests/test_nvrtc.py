"""The compile gate: every kernel for every GPU and storage type, by the compiler that runs it, on no GPU."""

import re
import subprocess
import sys
from pathlib import Path

import cuda_on_cpu
import pytest
import torch

from bench.resources import ARCHS, LIMITS, Resources, archs, ptx, resources
from rcnn.kernels import _launch
from rcnn.kernels.nms import KERNEL_CHUNK
from rcnn.kernels.warmup import SOURCES, warmup

CASES = [
    pytest.param(source, dtype, id=source.name if dtype is None else f"{source.name}-{_launch.SCALARS[dtype]}")
    for source in SOURCES
    for dtype in source.dtypes
]


def test_every_file_has_its_source() -> None:
    assert {source.name for source in SOURCES} == {path.stem for path in _launch.HERE.glob("*.cu")}
    assert len(SOURCES) == len({source.name for source in SOURCES})


def test_the_compiler_knows_the_gpus() -> None:
    """NVRTC 12.8 and 12.9 know them all, 13 has dropped the oldest."""
    known = archs()
    assert known == list(ARCHS) if _launch.nvrtc_version() < (13, 0) else known[-1] == ARCHS[-1]
    assert set(LIMITS) == set(ARCHS)


#: Bytes of shared memory that a launch asks for at most, besides what the kernel declares.
DYNAMIC = dict.fromkeys(("nms_padded", "nms_batched"), 20 * KERNEL_CHUNK)


@pytest.mark.parametrize(("source", "dtype"), CASES)
def test_compiles_without_spills(source: _launch.CudaSource, dtype: torch.dtype | None) -> None:
    for arch in archs():
        rows = resources(source, dtype, arch)
        assert {row.kernel for row in rows} == set(source.kernels())
        for row in rows:
            print(row, f"occupancy {row.occupancy:.0%}")
            assert row.spills == 0, row
            assert row.stack == 0, f"an array in local memory: {row}"
            assert row.shared + DYNAMIC.get(row.kernel, 0) <= _launch.SHARED_LIMIT, "more than old GPUs have"
            assert row.registers * row.threads <= 65536


#: Kernels that call exp or log, which are made of fused multiply-adds.
EXP = {"decode_anchors", "score_classes", "decode_candidates", "emit_detections"}
LOG = {"match_draw_anchors", "match_draw_proposals"}


@pytest.mark.parametrize("arch", archs())
def test_no_fused_multiply_add_in_area_iou_clip_and_anchors(arch: int) -> None:
    """Every kernel but those of RoI Align, which computes none of them and whose sums are fused.

    An exponential is known by its ``ex2``, so those who call it have as many multiply-adds as these bring, and not one
    more. A logarithm has no instruction of its own: a whole number of logarithms then.
    """
    probe = _launch.CudaSource("probe", folder=Path(cuda_on_cpu.__file__).parent)
    bodies = entries(ptx(probe, None, arch))
    for kernel in ("probe_area", "probe_iou", "probe_clip"):
        assert "fma" not in bodies[kernel]
        assert ".ftz" not in bodies[kernel]
    assert "fma.rn.f32" in bodies["probe_fused"], "the search would find one"
    of_exp, of_log = bodies["probe_exp"].count("fma."), bodies["probe_log"].count("fma.")
    assert of_exp > 1 and bodies["probe_exp"].count("ex2.") == 1
    assert of_log > 1 and "ex2." not in bodies["probe_log"]
    seen = set()
    for source in SOURCES:
        for dtype in source.dtypes if source.name != "roi_align" else ():
            for kernel, body in entries(ptx(source, dtype, arch)).items():
                seen.add(kernel)
                exps, fused = body.count("ex2."), body.count("fma.") - of_exp * body.count("ex2.")
                assert (exps > 0) == (kernel in EXP), kernel
                assert fused % of_log == 0 if kernel in LOG else fused == 0, kernel
                assert ".ftz" not in body.replace("ex2.approx.ftz", ""), kernel
    assert seen >= EXP | LOG | {"anchor_grid", "match_reach", "match_assign", "match_assign_proposals", "nms_padded"}


#: Kernels that read, and of these those that write, 16 bytes at a time: boxes, and the channels of a map.
READ_BOXES = {
    *("nms_padded", "nms_batched", "decode_anchors", "merge_levels", "decode_candidates", "emit_detections"),
    *("match_reach", "match_assign", "match_assign_proposals", "match_draw_anchors", "match_draw_proposals"),
}
WIDE_LOADS = READ_BOXES | {"roi_align_forward", "roi_align_backward", "roi_pool_forward"}
WIDE_STORES = {
    *("decode_anchors", "merge_levels", "decode_candidates", "emit_detections"),
    *("roi_align_forward", "roi_align_backward", "roi_pool_forward"),
}
#: Kernels that read the four deltas of a box one by one, from a head's output that may begin anywhere.
READ_DELTAS = {"decode_anchors", "decode_candidates", "emit_detections"}


@pytest.mark.parametrize(("source", "dtype"), CASES)
def test_sixteen_bytes_at_a_time(source: _launch.CudaSource, dtype: torch.dtype | None) -> None:
    """A map whose level is chosen at run time is read by a generic address, hence no ``.global``."""
    for arch in (archs()[0], archs()[-1]):
        for kernel, body in entries(ptx(source, dtype, arch)).items():
            if kernel in WIDE_LOADS:
                assert re.search(r"\bld(\.global)?(\.nc)?\.v4\.[fbu]32", body), kernel
            if kernel in WIDE_STORES:
                assert re.search(r"\bst(\.global)?\.v4\.[fbu]32", body), kernel
            if kernel in READ_BOXES:
                deltas = dtype == torch.float32 and kernel in READ_DELTAS
                assert quadruples(body) == int(deltas), f"{kernel} reads a box in four pieces"


def quadruples(body: str) -> int:
    """How often four neighbouring words of global memory are read one by one."""
    offsets: dict[str, set[int]] = {}
    for base, offset in re.findall(r"\bld\.global(?:\.nc)?\.[fbu]32\s+%\w+, \[(%\w+)(?:\+(-?\d+))?\]", body):
        offsets.setdefault(base, set()).add(int(offset or 0))
    return sum({i, i + 4, i + 8, i + 12} <= known for known in offsets.values() for i in known)


def test_the_wide_kernels_are_there() -> None:
    assert {kernel for source in SOURCES for kernel in source.kernels()} >= WIDE_LOADS | WIDE_STORES


def entries(text: str) -> dict[str, str]:
    """Body of each kernel in PTX."""
    parts = re.split(r"\.entry (\w+)\(", text)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_occupancy_by_hand() -> None:
    """On an sm_90: 65,536 registers, 64 warps, 32 blocks, 228 KB of shared memory."""

    def occupancy(registers: int, shared: int, threads: int) -> float:
        return Resources("k", 90, registers, shared, 0, 0, threads).occupancy

    assert occupancy(32, 0, 256) == 1.0  # 8 blocks of 8 warps, 1,024 registers each: 65,536
    assert occupancy(64, 0, 256) == 0.5
    assert occupancy(33, 0, 256) == 48 / 64  # rounded to 40 registers: 12 warps in each of four files
    assert occupancy(32, 0, 32) == 0.5  # 32 blocks of one warp
    assert occupancy(32, 48 << 10, 256) == 4 * 8 / 64  # 49 KB with what the system takes: four blocks


def test_the_report_of_the_compiler_is_read() -> None:
    probe = _launch.CudaSource("faults", folder=Path(cuda_on_cpu.__file__).parent, THREADS=64, FAULT=0)
    rows = {row.kernel: row for row in resources(probe, None, 90)}
    assert rows["block_sum"].shared == 64 * 4
    assert rows["block_sum"].threads == 64
    assert rows["arg_max"].threads == 32
    assert 0 < rows["copy"].registers < 64
    assert rows["neighbour"].shared == 0


def test_the_table_of_the_docs_can_be_written(tmp_path: Path) -> None:
    page = tmp_path / "kernels.md"
    page.write_text("before\n<!-- resources: begin -->\nold\n<!-- resources: end -->\nafter\n")
    command = [sys.executable, "-m", "bench.resources", "--out", str(page)]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    text = page.read_text()
    assert text.startswith("before\n<!-- resources: begin -->\n\nCompiled by NVRTC ")
    assert text.endswith("<!-- resources: end -->\nafter\n")
    assert "old" not in text
    for source in SOURCES:
        for kernel in source.kernels():
            assert text.count(f"| `{kernel}` |") == len(source.dtypes)


def test_warmup_is_for_cuda() -> None:
    with pytest.raises(ValueError, match="warmup is for CUDA devices, got cpu"):
        warmup("cpu")
    with pytest.raises(ValueError, match="device must be a CUDA device, as cuda or cuda:1, got 'gpu'"):
        warmup("gpu")
    there = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"one of the {there} CUDA devices that torch finds, got cuda:{there}"):
        warmup(f"cuda:{there}")


def test_warmup_loads_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(_launch, "load", lambda source, dtype, index: loaded.append((source.name, dtype, index)))
    warmup(torch.device("cuda", 3))
    assert loaded == [(source.name, dtype, 3) for source in SOURCES for dtype in source.dtypes]
