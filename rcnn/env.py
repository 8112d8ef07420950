"""``python -m rcnn.env``: what the CUDA kernels find here, what is wrong with it, and the line that mends it.

One small function for each thing that can be wrong judges the facts of :mod:`rcnn.machine`.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import NamedTuple

from rich.markup import escape
from rich.table import Table

from rcnn import __version__, console
from rcnn.kernels import _launch
from rcnn.machine import CUPY, GPU, Facts, Version, dotted, gather

PROG = "rcnn env"

#: The wheel with NVRTC for each CUDA that there are kernels for, and the oldest driver that runs that CUDA.
_NVRTC = {12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}
_DRIVERS = {12: 525, 13: 580}
#: CuPy finds the NVRTC that pip installed from this version on; before, it asked the system's loader alone.
_CUPY_FROM = 14
#: CUDA 13 has dropped the GPUs below this compute capability; torch's builds for CUDA 12.6 have no code from 10.0 on.
_CUDA13_FROM, _BLACKWELL = (7, 5), (10, 0)
_REACH = (
    "restart the machine if its driver was updated, and start a container with its GPUs, as in docker run --gpus all"
)


class Problem(NamedTuple):
    """Something wrong: a short name, a sentence, and what mends it."""

    name: str
    sentence: str
    mend: str


def problems(facts: Facts) -> list[Problem]:
    """All that is wrong.

    A GPU without what it needs is wrong; the same without a GPU is not, since the ops then run on the CPU. What is
    installed and broken is wrong with and without one.
    """
    return [problem for check in _CHECKS if (problem := check(facts))]


def notes(facts: Facts) -> list[str]:
    """What is not wrong and worth knowing."""
    found = []
    if facts.gpus_hidden and facts.gpus_listed and not facts.gpus:
        found.append("CUDA_VISIBLE_DEVICES hides every GPU of this machine")
    if not facts.gpus:
        found.append("no NVIDIA GPU is in reach: the ops run on the CPU, where they need no CuPy")
    if facts.cupy_cache_problem and facts.cupy:
        found.append(
            f"{facts.cupy_cache or 'CUPY_CACHE_DIR, which is empty'}, where CuPy keeps what it compiles for itself, "
            f"cannot be made ({facts.cupy_cache_problem}): it gets a temporary one, and no kernel of rcnn goes there"
        )
    newer = _unknown_to_nvrtc(facts, newer=True)
    if newer and facts.nvrtc:
        found.append(
            f"{newer} is newer than NVRTC {dotted(facts.nvrtc)} knows: its driver finishes each kernel when first "
            f"used, which a newer NVRTC saves: pip install --upgrade {_NVRTC.get(facts.nvrtc[0], _NVRTC[13])}"
        )
    return found


def _driver_is_old(facts: Facts) -> Problem | None:
    if not 0 < facts.driver_major < min(_NVRTC):
        return None
    mend = f"install an NVIDIA driver from {_DRIVERS[12]} on: https://www.nvidia.com/drivers"
    return Problem("old-driver", f"{_driver(facts)}, and the kernels need CUDA 12", mend)


def _gpu_is_out_of_reach(facts: Facts) -> Problem | None:
    if facts.gpus or facts.gpus_hidden or not (facts.gpus_listed or (facts.driver_cuda and facts.driver_problem)):
        return None
    reason = facts.driver_problem or "its driver gives it none"
    return Problem("gpu-out-of-reach", f"this process cannot use the GPU of this machine: {reason}", _REACH)


def _torch_has_no_cuda(facts: Facts) -> Problem | None:
    if facts.torch_cuda or not facts.gpus:
        return None
    sentence = f"torch {facts.torch} is built without CUDA, so it cannot use the {facts.gpus[0].name}"
    return Problem("torch-without-cuda", sentence, _install_torch(facts))


def _torch_is_newer_than_the_driver(facts: Facts) -> Problem | None:
    if not min(_NVRTC) <= facts.driver_major < facts.torch_major:
        return None
    sentence = f"torch {facts.torch} is built for CUDA {facts.torch_cuda}, but {_driver(facts)}"
    return Problem("torch-newer-than-driver", sentence, _install_torch(facts))


def _torch_finds_no_gpu(facts: Facts) -> Problem | None:
    if not facts.gpus or not facts.torch_cuda or facts.torch_gpu or facts.driver_major < facts.torch_major:
        return None
    reason = facts.torch_problem or "it finds none"
    return Problem("torch-finds-no-gpu", f"torch {facts.torch} cannot use the {facts.gpus[0].name}: {reason}", _REACH)


def _torch_has_no_code_for_the_gpu(facts: Facts) -> Problem | None:
    without = [gpu for gpu in facts.gpus if not any(_runs_on(arch, gpu.capability) for arch in facts.torch_archs)]
    if not facts.torch_archs or not without:
        return None
    sentence = f"torch {facts.torch} has no code for {without[0]}"
    return Problem("torch-without-gpu-code", sentence, _install_torch(facts))


def _cupy_is_missing(facts: Facts) -> Problem | None:
    if not facts.gpus or facts.cupy or facts.cupy_loads:
        return None
    sentence = "CuPy, through which the kernels are compiled and launched, is not installed"
    return Problem("no-cupy", sentence, _install(facts))


def _cupy_is_there_twice(facts: Facts) -> Problem | None:
    if len(facts.cupy) < 2:
        return None
    names = " and ".join(f"{name} {version}" for name, version in facts.cupy.items())
    sentence = f"{len(facts.cupy)} distributions of CuPy are installed and overwrite each other's files: {names}"
    return Problem("two-cupy", sentence, _install(facts))


def _cupy_does_not_fit_the_driver(facts: Facts) -> Problem | None:
    if not facts.gpus or len(facts.cupy) != 1:
        return None
    ((name, version),) = facts.cupy.items()
    major = _cuda_of(name)
    if name == "cupy" or (major in _NVRTC and not min(_NVRTC) <= facts.driver_major < major):
        return None  # a CuPy that conda or its user built does not tell its CUDA by its name
    sentence = f"{name} {version} is not made for CUDA 12 or 13, which the kernels are for"
    if major in _NVRTC:
        needs = f"CUDA {major}, which takes a driver from {_DRIVERS[major]} on"
        sentence = f"{name} {version} is made for {needs}; {_driver(facts)}"
    return Problem("cupy-does-not-fit", sentence, _install(facts))


def _cupy_does_not_load(facts: Facts) -> Problem | None:
    if len(facts.cupy) != 1 or facts.cupy_loads:
        return None
    ((name, version),) = facts.cupy.items()
    return Problem("cupy-does-not-load", f"{name} {version} cannot be imported: {facts.cupy_problem}", _install(facts))


def _nvrtc_is_missing(facts: Facts) -> Problem | None:
    if not facts.cupy_loads or facts.nvrtc or len(facts.cupy) > 1:
        return None
    sentence = f"NVRTC, which compiles the kernels, cannot be loaded: {facts.nvrtc_problem}"
    major = next(map(_cuda_of, facts.cupy), None)
    wheel = _NVRTC.get(major or 0, _NVRTC[_best_cuda(facts)])
    for name, version in facts.cupy.items():
        if major and int(version.split(".")[0]) < _CUPY_FROM:
            sentence += f"; CuPy before {_CUPY_FROM} does not find the one that pip installs"
            return Problem("no-nvrtc", sentence, f"pip install --upgrade {name} {wheel}")
    # Where files of a wheel are gone, pip still holds it to be installed and would leave it as it is.
    anew = "--force-reinstall " if wheel in facts.nvrtc_wheels else ""
    return Problem("no-nvrtc", sentence, f"pip install {anew}{wheel}")


def _nvrtc_is_newer_than_the_driver(facts: Facts) -> Problem | None:
    if not facts.gpus or not facts.nvrtc or _cupy_does_not_fit_the_driver(facts):
        return None
    if not min(_NVRTC) <= facts.driver_major < facts.nvrtc[0]:
        return None
    sentence = f"NVRTC {dotted(facts.nvrtc)} compiles for drivers from {_DRIVERS[13]} on; {_driver(facts)}"
    return Problem("nvrtc-newer-than-driver", sentence, _install(facts, 12))


def _nvrtc_does_not_know_the_gpu(facts: Facts) -> Problem | None:
    gpu = _unknown_to_nvrtc(facts, newer=False)
    if gpu is None or facts.nvrtc is None:
        return None
    first, last = (dotted(divmod(facts.nvrtc_archs[end], 10)) for end in (0, -1))
    sentence = f"NVRTC {dotted(facts.nvrtc)} compiles for compute capabilities {first} to {last}, but not for the {gpu}"
    major = 12 if gpu.capability < _CUDA13_FROM else 13
    mend = _install(facts, major) if facts.nvrtc[0] != major else "no NVRTC does; use --device cpu"
    return Problem("gpu-unknown-to-nvrtc", sentence, mend)


def _cache_cannot_be_written(facts: Facts) -> Problem | None:
    if not facts.cache_problem or not (facts.gpus or facts.cupy):
        return None
    sentence = f"{facts.cache}, where compiled kernels are kept, cannot be written: {facts.cache_problem}"
    mend = "make it writable or make room on its disk; until then every process compiles its kernels anew"
    return Problem("cache-not-writable", sentence, mend)


_CHECKS: tuple[Callable[[Facts], Problem | None], ...] = (
    _driver_is_old,
    _gpu_is_out_of_reach,
    _torch_has_no_cuda,
    _torch_is_newer_than_the_driver,
    _torch_finds_no_gpu,
    _torch_has_no_code_for_the_gpu,
    _cupy_is_missing,
    _cupy_is_there_twice,
    _cupy_does_not_fit_the_driver,
    _cupy_does_not_load,
    _nvrtc_is_missing,
    _nvrtc_is_newer_than_the_driver,
    _nvrtc_does_not_know_the_gpu,
    _cache_cannot_be_written,
)


def _driver(facts: Facts) -> str:
    name = f"the NVIDIA driver {facts.driver}" if facts.driver else "the NVIDIA driver"
    return f"{name} runs CUDA up to {dotted(facts.driver_cuda)}" if facts.driver_cuda else name


def _cuda_of(wheel: str) -> int | None:
    """Major version of CUDA in the name of a CuPy wheel: 12 for cupy-cuda12x, 11 for cupy-cuda112."""
    named = CUPY.fullmatch(wheel)
    return int(named["cuda"][:2]) if named and named["cuda"] else None


def _best_cuda(facts: Facts) -> int:
    """12, which every driver from 525 on runs, or 13 where torch has it as well and driver and GPUs allow it."""
    allowed = facts.driver_major >= 13 and all(gpu.capability >= _CUDA13_FROM for gpu in facts.gpus)
    return 13 if allowed and facts.torch_major >= 13 else 12


def _install(facts: Facts, major: int | None = None) -> str:
    """The line that leaves one CuPy for this CUDA, and its NVRTC, whatever there is now."""
    major = major or _best_cuda(facts)
    wheel = f"cupy-cuda{major}x"
    good = facts.cupy_loads and list(facts.cupy) == [wheel]
    remove = [] if good else list(facts.cupy)
    if facts.nvrtc and facts.nvrtc[0] > major:
        remove.append(_NVRTC[13])  # of several, CuPy loads the newest: torch for CUDA 13 brings one
    line = f"pip install {_NVRTC[major]}" if good else f"pip install {wheel} {_NVRTC[major]}"
    return f"pip uninstall -y {' '.join(remove)} && {line}" if remove else line


def _install_torch(facts: Facts) -> str:
    capabilities = [gpu.capability for gpu in facts.gpus] or [_CUDA13_FROM]
    if facts.driver_major >= 13 and min(capabilities) >= _CUDA13_FROM:
        build = "cu130"
    else:
        build = "cu128" if max(capabilities) >= _BLACKWELL else "cu126"
    return f"pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/{build}"


def _runs_on(arch: str, capability: Version) -> bool:
    """Machine code (``sm_86``) runs on later minor versions of its major, PTX (``compute_86``) on all later GPUs."""
    kind, _, digits = arch.partition("_")
    version = divmod(int(re.sub(r"\D", "", digits)), 10)
    return version <= capability and (kind == "compute" or version[0] == capability[0])


def _unknown_to_nvrtc(facts: Facts, newer: bool) -> GPU | None:
    """The first GPU that NVRTC compiles no machine code for: one whose driver can finish a kernel, or one for which
    there is no way."""
    for gpu in facts.gpus if facts.nvrtc_archs else ():
        found = _launch.fitting(gpu.capability, facts.nvrtc_archs)
        way = "none" if found is None else "driver" if found.startswith("compute_") else "machine code"
        if way == ("driver" if newer else "none"):
            return gpu
    return None


def rows(facts: Facts) -> list[tuple[str, str]]:
    """The facts as a reader wants them: a name and a text."""
    torch_cuda = f"CUDA {facts.torch_cuda}" if facts.torch_cuda else "no CUDA"
    archs = facts.nvrtc_archs
    compiles = f", compiles for {dotted(divmod(archs[0], 10))} to {dotted(divmod(archs[-1], 10))}" if archs else ""
    gpus = [f"{gpu}, {gpu.memory / 2**30:.1f} GiB" for gpu in facts.gpus] or ["none"]
    driver = _driver(facts) if facts.driver or facts.driver_cuda else "none"
    return [
        ("rcnn", __version__),
        ("Python", facts.python),
        ("torch", f"{facts.torch}, {torch_cuda}"),
        ("driver", driver.removeprefix("the NVIDIA driver ")),
        *((f"GPU {number}" if len(gpus) > 1 else "GPU", gpu) for number, gpu in enumerate(gpus)),
        ("CuPy", ", ".join(f"{name} {version}" for name, version in facts.cupy.items()) or "none"),
        ("NVRTC", f"{dotted(facts.nvrtc)}{compiles}" if facts.nvrtc else "none"),
        ("kernel cache", f"{facts.cache}, {facts.cache_bytes / 2**20:.1f} MiB"),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; ``argv`` defaults to the process's own arguments. Ends with exit code 1 if anything is wrong."""
    parser = console.Parser(PROG, "Show what the CUDA kernels find here, what is wrong, and the line that mends it.")
    parser.add_argument("--json", type=bool, default=False, help="print JSON")
    options = parser.read(argv)
    console.run(PROG, lambda: _show(options.json))


def _show(as_json: bool) -> None:
    facts = gather()
    wrong, worth_knowing = problems(facts), notes(facts)
    if as_json:
        content = {
            "rcnn": __version__,
            "facts": asdict(facts),
            "problems": [problem._asdict() for problem in wrong],
            "notes": worth_knowing,
        }
        print(json.dumps(content, indent=1))
    else:
        _print_rows(rows(facts))
        # Plain lines: a command to copy must not be broken by the frame of a table.
        for note in worth_knowing:
            print(f"note: {note}")
        for problem in wrong:
            print(f"wrong: {problem.sentence}\n  mend: {problem.mend}")
        if not wrong:
            print("nothing is wrong")
    if wrong:
        sys.exit(1)


def _print_rows(pairs: list[tuple[str, str]]) -> None:
    if sys.stdout is None or not sys.stdout.isatty():  # None: its user has closed it, and the exit code is what is left
        for name, text in pairs:
            print(f"{name:13} {text}")
        return
    table = Table(show_header=False)
    for name, text in pairs:
        table.add_row(name, escape(text))
    console.show(table)


if __name__ == "__main__":
    main()
