"""``rcnn env``: every finding from planted facts. ``test_machine.py`` has the asking, and the command as a process."""

import re
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from rcnn import env
from rcnn.kernels import _launch
from rcnn.machine import GPU, Facts

ROOT = Path(__file__).resolve().parents[1]

PASCAL = GPU("NVIDIA GeForce GTX 1080", (6, 1), 8 << 30)
TURING = GPU("Tesla T4", (7, 5), 15 << 30)
HOPPER = GPU("NVIDIA H200", (9, 0), 141 << 30)
THOR = GPU("NVIDIA Thor", (11, 0), 122 << 30)
BLACKWELL = GPU("NVIDIA GeForce RTX 5090", (12, 0), 32 << 30)

NVRTC_12_2 = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90)
NVRTC_12_9 = (50, 52, 53, 60, 61, 62, 70, 72, 75, 80, 86, 87, 89, 90, 100, 101, 103, 120, 121)
NVRTC_13_0 = (75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121)

#: A machine with nothing wrong: everything for CUDA 13.
WELL_13 = Facts(
    torch="2.13.0+cu130",
    torch_cuda="13.0",
    torch_archs=("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"),
    torch_gpu=True,
    driver="580.65.06",
    driver_cuda=(13, 0),
    gpus=(HOPPER,),
    gpus_listed=1,
    cupy={"cupy-cuda13x": "14.2.0"},
    cupy_loads=True,
    nvrtc=(13, 0),
    nvrtc_archs=NVRTC_13_0,
    cache="/home/me/.cache/rcnn/kernels",
    cache_bytes=3 << 20,
)
#: The same with an older driver and everything for CUDA 12.
WELL_12 = replace(
    WELL_13,
    torch="2.13.0+cu126",
    torch_cuda="12.6",
    torch_archs=("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"),
    driver="535.104.05",
    driver_cuda=(12, 2),
    cupy={"cupy-cuda12x": "14.2.0"},
    nvrtc=(12, 9),
    nvrtc_archs=NVRTC_12_9,
)
#: Neither a GPU nor CuPy.
CPU = Facts(torch="2.13.0+cpu", driver_problem="libcuda.so.1: cannot open shared object file")

CUPY_12 = "pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12"
CUPY_13 = "pip install cupy-cuda13x nvidia-cuda-nvrtc"
TORCH = "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/"


@pytest.mark.parametrize(
    "facts",
    [
        WELL_13,
        WELL_12,
        replace(WELL_13, cupy=WELL_12.cupy, nvrtc=(12, 9), nvrtc_archs=NVRTC_12_9),  # the majors may differ
        replace(WELL_13, cupy=WELL_12.cupy),  # with the NVRTC that torch for CUDA 13 brings
        replace(WELL_13, cupy={"cupy": "14.2.0"}),  # conda's, or one built from source
        replace(WELL_13, cupy={}),  # one that was built and never installed, on PYTHONPATH
        replace(WELL_12, gpus=(PASCAL, HOPPER)),
        replace(WELL_12, gpus=(GPU("NVIDIA L4", (8, 9), 24 << 30),)),  # runs the code for 8.6
    ],
)
def test_nothing_is_wrong_with_a_gpu_and_all_that_it_needs(facts):
    assert env.problems(facts) == []
    assert env.notes(facts) == []


@pytest.mark.parametrize(
    "facts",
    [
        CPU,
        replace(CPU, cache_problem="Read-only file system"),  # nothing would be kept there
        replace(CPU, torch="2.13.0+cu130", torch_cuda="13.0"),
        replace(CPU, driver_cuda=(13, 0), driver_problem=""),  # a driver and nothing for it to drive
        replace(CPU, cupy=WELL_12.cupy, cupy_loads=True, nvrtc=(12, 9), nvrtc_archs=NVRTC_12_9),
        replace(CPU, cupy={"cupy-rocm-7-1": "14.2.0"}, cupy_loads=True, nvrtc=(12, 9)),
    ],
)
def test_a_machine_without_a_gpu_lacks_nothing(facts):
    assert env.problems(facts) == []
    assert env.notes(facts) == ["no NVIDIA GPU is in reach: the ops run on the CPU, where they need no CuPy"]


def test_hidden_gpus_are_told_and_are_no_problem():
    facts = replace(WELL_13, gpus=(), gpus_hidden=True, torch_gpu=False)
    assert env.problems(facts) == []
    assert env.notes(facts)[0] == "CUDA_VISIBLE_DEVICES hides every GPU of this machine"
    assert env.notes(replace(facts, gpus=(HOPPER,))) == []


#: Facts, and the one thing that is wrong with them: its name, its sentence, what mends it.
CASES = [
    # The driver.
    (
        replace(WELL_12, driver="470.82.01", driver_cuda=(11, 4), torch_gpu=False),
        "old-driver",
        "the NVIDIA driver 470.82.01 runs CUDA up to 11.4, and the kernels need CUDA 12",
        "install an NVIDIA driver from 525 on: https://www.nvidia.com/drivers",
    ),
    (
        replace(WELL_13, gpus=(), driver_cuda=None, driver_problem="libcuda.so.1: no such file", torch_gpu=False),
        "gpu-out-of-reach",
        "this process cannot use the GPU of this machine: libcuda.so.1: no such file",
        env._REACH,
    ),
    (
        replace(WELL_13, gpus=(), gpus_listed=0, driver_problem="its driver fails in cuInit with X (999)"),
        "gpu-out-of-reach",
        "this process cannot use the GPU of this machine: its driver fails in cuInit with X (999)",
        env._REACH,
    ),
    (
        replace(WELL_13, gpus=(), torch_gpu=False),
        "gpu-out-of-reach",
        "this process cannot use the GPU of this machine: its driver gives it none",
        env._REACH,
    ),
    # torch.
    (
        replace(WELL_13, torch="2.13.0+cpu", torch_cuda=None, torch_gpu=False, torch_archs=()),
        "torch-without-cuda",
        "torch 2.13.0+cpu is built without CUDA, so it cannot use the NVIDIA H200",
        TORCH + "cu130",
    ),
    (
        replace(WELL_12, torch="2.13.0+cpu", torch_cuda=None, torch_gpu=False, torch_archs=()),
        "torch-without-cuda",
        "torch 2.13.0+cpu is built without CUDA, so it cannot use the NVIDIA H200",
        TORCH + "cu126",
    ),
    (
        replace(WELL_12, torch="2.13.0+cu130", torch_cuda="13.0", torch_gpu=False, torch_archs=()),
        "torch-newer-than-driver",
        "torch 2.13.0+cu130 is built for CUDA 13.0, but the NVIDIA driver 535.104.05 runs CUDA up to 12.2",
        TORCH + "cu126",
    ),
    (
        replace(WELL_13, torch_gpu=False, torch_archs=(), torch_problem="CUDA unknown error"),
        "torch-finds-no-gpu",
        "torch 2.13.0+cu130 cannot use the NVIDIA H200: CUDA unknown error",
        env._REACH,
    ),
    (
        replace(WELL_12, gpus=(BLACKWELL,)),
        "torch-without-gpu-code",
        "torch 2.13.0+cu126 has no code for NVIDIA GeForce RTX 5090 (compute capability 12.0)",
        TORCH + "cu128",
    ),
    (
        replace(WELL_13, gpus=(PASCAL,), cupy=WELL_12.cupy, nvrtc=(12, 9), nvrtc_archs=NVRTC_12_9),
        "torch-without-gpu-code",
        "torch 2.13.0+cu130 has no code for NVIDIA GeForce GTX 1080 (compute capability 6.1)",
        TORCH + "cu126",
    ),
    # CuPy.
    (
        replace(WELL_13, cupy={}, cupy_loads=False, nvrtc=None, nvrtc_archs=(), cupy_problem="No module named"),
        "no-cupy",
        "CuPy, through which the kernels are compiled and launched, is not installed",
        CUPY_13,
    ),
    (
        replace(WELL_12, cupy={}, cupy_loads=False, nvrtc=None, nvrtc_archs=()),
        "no-cupy",
        "CuPy, through which the kernels are compiled and launched, is not installed",
        CUPY_12,
    ),
    (
        replace(WELL_12, driver_cuda=(13, 0), cupy={}, cupy_loads=False, nvrtc=None, nvrtc_archs=()),
        "no-cupy",
        "CuPy, through which the kernels are compiled and launched, is not installed",
        CUPY_12,  # beside a torch for CUDA 12
    ),
    (
        replace(WELL_13, cupy={"cupy-cuda12x": "14.1.0", "cupy-cuda13x": "14.2.0"}),
        "two-cupy",
        "2 distributions of CuPy are installed and overwrite each other's files: "
        "cupy-cuda12x 14.1.0 and cupy-cuda13x 14.2.0",
        f"pip uninstall -y cupy-cuda12x cupy-cuda13x && {CUPY_13}",
    ),
    (
        # What follows from it is not told as well.
        replace(CPU, cupy={"cupy": "13.6.0", "cupy-cuda12x": "14.2.0"}, cupy_problem="undefined symbol"),
        "two-cupy",
        "2 distributions of CuPy are installed and overwrite each other's files: cupy 13.6.0 and cupy-cuda12x 14.2.0",
        f"pip uninstall -y cupy cupy-cuda12x && {CUPY_12}",
    ),
    (
        replace(WELL_12, cupy=WELL_13.cupy, nvrtc=(13, 0), nvrtc_archs=NVRTC_13_0),
        "cupy-does-not-fit",
        "cupy-cuda13x 14.2.0 is made for CUDA 13, which takes a driver from 580 on; "
        "the NVIDIA driver 535.104.05 runs CUDA up to 12.2",
        f"pip uninstall -y cupy-cuda13x nvidia-cuda-nvrtc && {CUPY_12}",
    ),
    (
        replace(WELL_13, cupy={"cupy-cuda112": "10.6.0"}),
        "cupy-does-not-fit",
        "cupy-cuda112 10.6.0 is not made for CUDA 12 or 13, which the kernels are for",
        f"pip uninstall -y cupy-cuda112 && {CUPY_13}",
    ),
    (
        replace(WELL_12, cupy={"cupy-rocm-7-1": "14.2.0"}),
        "cupy-does-not-fit",
        "cupy-rocm-7-1 14.2.0 is not made for CUDA 12 or 13, which the kernels are for",
        f"pip uninstall -y cupy-rocm-7-1 && {CUPY_12}",
    ),
    (
        replace(WELL_12, cupy_loads=False, nvrtc=None, nvrtc_archs=(), cupy_problem="undefined symbol: X"),
        "cupy-does-not-load",
        "cupy-cuda12x 14.2.0 cannot be imported: undefined symbol: X",
        f"pip uninstall -y cupy-cuda12x && {CUPY_12}",
    ),
    # NVRTC.
    (
        replace(WELL_12, nvrtc=None, nvrtc_archs=(), nvrtc_problem="No such file: libnvrtc.so.12"),
        "no-nvrtc",
        "NVRTC, which compiles the kernels, cannot be loaded: No such file: libnvrtc.so.12",
        "pip install nvidia-cuda-nvrtc-cu12",
    ),
    (
        # Its files are gone and what pip knows of it is not; the wheel for the other CUDA does not count.
        replace(WELL_12, nvrtc=None, nvrtc_problem="none", nvrtc_wheels={"nvidia-cuda-nvrtc-cu12": "12.9.86"}),
        "no-nvrtc",
        "NVRTC, which compiles the kernels, cannot be loaded: none",
        "pip install --force-reinstall nvidia-cuda-nvrtc-cu12",
    ),
    (
        replace(WELL_13, nvrtc=None, nvrtc_problem="none", nvrtc_wheels={"nvidia-cuda-nvrtc-cu12": "12.9.86"}),
        "no-nvrtc",
        "NVRTC, which compiles the kernels, cannot be loaded: none",
        "pip install nvidia-cuda-nvrtc",
    ),
    (
        replace(WELL_13, nvrtc=None, nvrtc_archs=(), nvrtc_problem="none"),
        "no-nvrtc",
        "NVRTC, which compiles the kernels, cannot be loaded: none",
        "pip install nvidia-cuda-nvrtc",
    ),
    (
        # CuPy's own CUDA decides, not torch's; without a GPU as well, since what is installed does not work.
        replace(CPU, torch_cuda="13.0", cupy=WELL_12.cupy, cupy_loads=True, nvrtc_problem="none"),
        "no-nvrtc",
        "NVRTC, which compiles the kernels, cannot be loaded: none",
        "pip install nvidia-cuda-nvrtc-cu12",
    ),
    (
        replace(WELL_13, cupy={"cupy": "14.2.0"}, nvrtc=None, nvrtc_archs=(), nvrtc_problem="none"),
        "no-nvrtc",
        "NVRTC, which compiles the kernels, cannot be loaded: none",
        "pip install nvidia-cuda-nvrtc",
    ),
    (
        # It may well be there, and this CuPy would not find it.
        replace(
            WELL_12,
            cupy={"cupy-cuda12x": "13.6.0"},
            nvrtc=None,
            nvrtc_problem="none",
            nvrtc_wheels={"nvidia-cuda-nvrtc-cu12": "12.9.86"},
        ),
        "no-nvrtc",
        "NVRTC, which compiles the kernels, cannot be loaded: none; CuPy before 14 does not find the one that pip "
        "installs",
        "pip install --upgrade cupy-cuda12x nvidia-cuda-nvrtc-cu12",
    ),
    (
        # An NVRTC for CUDA 13 beside CuPy for CUDA 12, which loads the newest.
        replace(WELL_12, nvrtc=(13, 0), nvrtc_archs=NVRTC_13_0),
        "nvrtc-newer-than-driver",
        "NVRTC 13.0 compiles for drivers from 580 on; the NVIDIA driver 535.104.05 runs CUDA up to 12.2",
        "pip uninstall -y nvidia-cuda-nvrtc && pip install nvidia-cuda-nvrtc-cu12",
    ),
    (
        replace(WELL_12, driver_cuda=(13, 0), gpus=(PASCAL,), nvrtc=(13, 0), nvrtc_archs=NVRTC_13_0),
        "gpu-unknown-to-nvrtc",
        "NVRTC 13.0 compiles for compute capabilities 7.5 to 12.1, but not for the "
        "NVIDIA GeForce GTX 1080 (compute capability 6.1)",
        "pip uninstall -y nvidia-cuda-nvrtc && pip install nvidia-cuda-nvrtc-cu12",
    ),
    (
        replace(WELL_12, driver_cuda=(13, 0), gpus=(PASCAL,), cupy=WELL_13.cupy, nvrtc_archs=NVRTC_13_0, nvrtc=(13, 0)),
        "gpu-unknown-to-nvrtc",
        "NVRTC 13.0 compiles for compute capabilities 7.5 to 12.1, but not for the "
        "NVIDIA GeForce GTX 1080 (compute capability 6.1)",
        f"pip uninstall -y cupy-cuda13x nvidia-cuda-nvrtc && {CUPY_12}",
    ),
    (
        replace(
            WELL_13, gpus=(THOR,), torch_archs=("sm_110",), cupy=WELL_12.cupy, nvrtc_archs=NVRTC_12_9, nvrtc=(12, 9)
        ),
        "gpu-unknown-to-nvrtc",
        "NVRTC 12.9 compiles for compute capabilities 5.0 to 12.1, but not for the "
        "NVIDIA Thor (compute capability 11.0)",
        f"pip uninstall -y cupy-cuda12x && {CUPY_13}",
    ),
    (
        replace(WELL_12, gpus=(GPU("Tesla K80", (3, 7), 11 << 30),), torch_archs=("sm_37",)),
        "gpu-unknown-to-nvrtc",
        "NVRTC 12.9 compiles for compute capabilities 5.0 to 12.1, but not for the Tesla K80 (compute capability 3.7)",
        "no NVRTC does; use --device cpu",
    ),
    # The cache.
    *(
        (
            replace(facts, cache="/home/me/.cache/rcnn/kernels", cache_problem="Read-only file system: /home/me"),
            "cache-not-writable",
            "/home/me/.cache/rcnn/kernels, where compiled kernels are kept, cannot be written: "
            "Read-only file system: /home/me",
            "make it writable or make room on its disk; until then every process compiles its kernels anew",
        )
        for facts in (WELL_12, replace(CPU, cupy=WELL_12.cupy, cupy_loads=True, nvrtc=(12, 9)))
    ),
]


@pytest.mark.parametrize(("facts", "name", "sentence", "mend"), CASES)
def test_each_problem_is_found_alone_with_the_line_that_mends_it(facts, name, sentence, mend):
    assert env.problems(facts) == [env.Problem(name, sentence, mend)]


def test_the_documentation_has_a_section_for_each_problem():
    """Under the problem's name, with its two lines as the command prints them."""
    text = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    sections = re.findall(r"^\(([\w-]+)\)=\n### .+\n\n```text\nwrong: (.+)\n  mend: (.+)\n```$", text, re.MULTILINE)
    assert sorted(name for name, _, _ in sections) == sorted({name for _, name, _, _ in CASES})
    assert len({name for _, name, _, _ in CASES}) == len(env._CHECKS)
    assert [section for section in sections if section not in [case[1:] for case in CASES]] == []


def test_problems_that_do_not_follow_from_each_other_are_all_told():
    facts = replace(
        CPU, driver="580.65.06", driver_cuda=(13, 0), gpus=(TURING,), cache_problem="No space left on device"
    )
    assert [problem.name for problem in env.problems(facts)] == ["torch-without-cuda", "no-cupy", "cache-not-writable"]


def test_a_gpu_newer_than_nvrtc_is_told_with_the_line_that_saves_time():
    facts = replace(WELL_12, gpus=(BLACKWELL,), torch_archs=("sm_120",), nvrtc=(12, 2), nvrtc_archs=NVRTC_12_2)
    assert env.problems(facts) == []
    (note,) = env.notes(facts)
    assert note.startswith("NVIDIA GeForce RTX 5090 (compute capability 12.0) is newer than NVRTC 12.2 knows")
    assert note.endswith(": pip install --upgrade nvidia-cuda-nvrtc-cu12")
    (note,) = env.notes(replace(WELL_13, gpus=(GPU("NVIDIA Next", (14, 0), 1 << 30),), torch_archs=("compute_120",)))
    assert note.endswith(": pip install --upgrade nvidia-cuda-nvrtc")


@pytest.mark.parametrize("archs", [NVRTC_12_2, NVRTC_12_9, NVRTC_13_0])
def test_the_launcher_and_the_diagnosis_agree_on_what_nvrtc_knows(archs, monkeypatch):
    monkeypatch.setattr(_launch, "nvrtc_archs", lambda: list(archs))
    monkeypatch.setattr(_launch, "nvrtc_version", lambda: (12, 9))
    seen = set()
    for capability in ((3, 7), (5, 0), (6, 1), (7, 5), (8, 8), (8, 9), (9, 0), (10, 3), (11, 0), (12, 1), (14, 0)):
        gpu = GPU("a GPU", capability, 1 << 30)
        facts = replace(WELL_12, gpus=(gpu,), torch_archs=(), nvrtc_archs=archs)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                outcome = "newer" if _launch.target(capability, "a GPU").startswith("compute_") else "fits"
            except _launch.KernelError:
                outcome = "unknown"
        assert bool(said) is (outcome == "newer")
        assert bool(env.notes(facts)) is (outcome == "newer"), capability
        assert [p.name for p in env.problems(facts)] == ["gpu-unknown-to-nvrtc"] * (outcome == "unknown"), capability
        seen.add(outcome)
    assert seen == {"fits", "newer", "unknown"}


def test_a_folder_of_cupys_own_is_a_note():
    facts = replace(WELL_12, cupy_cache="/home/me/file", cupy_cache_problem="File exists: /home/me/file")
    assert env.problems(facts) == []
    (note,) = env.notes(facts)
    assert note == (
        "/home/me/file, where CuPy keeps what it compiles for itself, cannot be made (File exists: /home/me/file): "
        "it gets a temporary one, and no kernel of rcnn goes there"
    )
    assert env.notes(replace(facts, cupy={})) == []
    assert env.notes(replace(facts, cupy_cache=""))[0].startswith("CUPY_CACHE_DIR, which is empty, where CuPy keeps")


def test_the_lines_install_what_the_extras_do():
    text = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for major in (12, 13):
        (extra,) = re.findall(rf"^cuda{major} =\n((?:    .+\n)+)", text, re.MULTILINE)
        names = [re.split(r"[<>=]", line.strip())[0] for line in extra.splitlines()]
        assert env._install(CPU, major) == f"pip install {' '.join(names)}"


def test_a_terminal_gets_a_table(monkeypatch, capsys):
    monkeypatch.setattr(env, "gather", lambda: replace(WELL_12, gpus=(HOPPER, TURING)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    env.main([])
    shown = capsys.readouterr().out
    assert re.search(r"\u2502 NVRTC +\u2502 12\.9, compiles for 5\.0 to 12\.1 +\u2502", shown)
    assert re.search(r"\u2502 GPU 1 +\u2502 Tesla T4 \(compute capability 7\.5\), 15\.0 GiB +\u2502", shown)
    assert shown.endswith("nothing is wrong\n")


def test_an_unknown_option_gets_a_sentence(capsys):
    with pytest.raises(SystemExit) as end:
        env.main(["--jsn"])
    assert end.value.code == 2
    assert capsys.readouterr().err == "rcnn env: unknown option jsn; did you mean --json?\n"
