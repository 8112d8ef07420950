"""What ``rcnn env`` asks of a machine, against planted distributions, a planted driver and a full disk.

The driver is a ``libcuda.so.1`` compiled here, which answers as NVIDIA's does.
"""

import ctypes
import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from rcnn import machine
from rcnn.kernels import _launch
from rcnn.machine import Facts

ROOT = Path(__file__).resolve().parents[1]


def planted(folder, name, version):
    """A folder with the metadata of a distribution, as pip leaves it."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_every_distribution_that_holds_cupy_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("cupy-cuda12x", "cupy-cuda112", "cupy-rocm-7-1", "cupy_cuda13x", "cupy", "cupy-xarray", "numpy"):
        planted(tmp_path, name, "14.2.0")
    planted(tmp_path / "shadowed", "cupy-cuda12x", "13.0.0")
    sys.path.append(str(tmp_path / "shadowed"))
    (tmp_path / "cupy_cuda11x-1.0.dist-info").mkdir()  # without METADATA
    torn = tmp_path / "~upy_cuda102-12.0.dist-info"  # pip names so what it could not delete
    torn.mkdir()
    (torn / "METADATA").write_text("Metadata-Version: 2.1\nName: cupy-cuda102\nVersion: 12.0\n")
    expected = ("cupy", "cupy-cuda112", "cupy-cuda12x", "cupy-cuda13x", "cupy-rocm-7-1")
    assert machine._cupy_wheels() == dict.fromkeys(expected, "14.2.0")


def test_wheels_of_nvrtc_are_seen_whether_or_not_their_files_are_there(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in ("nvidia-cuda-nvrtc-cu12", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime-cu12"):
        planted(tmp_path, name, "12.9.86")
    facts = machine.gather()
    assert facts.nvrtc_wheels == dict.fromkeys(("nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12"), "12.9.86")


def test_the_driver_tells_its_version(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_PROC", tmp_path)
    for line, version in (
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build", "580.65.06"),
    ):
        (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1~22.04)\n")
        assert machine._driver_version() == version


def test_what_cannot_be_asked_becomes_a_fact(tmp_path, monkeypatch):
    """Every probe raises, and the rest is still told."""

    def broken(*_):
        raise RuntimeError("broken")

    for name in ("_torch_gpu", "_driver_cuda", "_gpus", "_driver_version", "_cupy_wheels", "_write_into"):
        monkeypatch.setattr(machine, name, broken)
    monkeypatch.setattr(_launch, "nvrtc_version", broken)
    monkeypatch.setattr(_launch, "nvrtc_archs", broken)
    monkeypatch.setattr(machine, "_PROC", tmp_path / "none")
    facts = machine.gather()
    assert (facts.driver, facts.driver_cuda, facts.gpus, facts.cupy, facts.nvrtc) == (None, None, (), {}, None)
    assert facts.torch_problem == facts.driver_problem == facts.cache_problem == "broken"
    assert "broken" in (facts.cupy_problem, facts.nvrtc_problem)


def test_a_reason_is_one_line():
    def framed():
        frame = "=" * 64
        raise ImportError(f"\n{frame}\nFailed to import CuPy.\n\nOriginal error:\n  ImportError: libX: none\n{frame}\n")

    assert machine._ask(framed) == (None, "ImportError: libX: none")

    def nameless():
        raise KeyError

    assert machine._ask(nameless) == (None, "KeyError")

    def caused():
        raise ValueError("advice") from OSError(errno.EACCES, "Permission denied", "/root/.cupy")

    assert machine._ask(caused) == (None, "Permission denied: /root/.cupy")


def test_a_folder_is_tried_by_writing(tmp_path):
    folder = tmp_path / "not" / "yet"
    machine._write_into(folder)
    assert list(tmp_path.iterdir()) == [], "trying leaves nothing"
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="Not a directory"):
        machine._write_into(tmp_path / "file" / "cache")
    (tmp_path / "link").symlink_to("nowhere")
    _, problem = machine._ask(lambda: machine._write_into(tmp_path / "link" / "rcnn" / "kernels"))
    assert problem == f"Link to a folder that does not exist: {tmp_path / 'link'}"


def test_a_full_disk_is_noticed(tmp_path, monkeypatch):
    """``/dev/full`` is a file of a full disk."""
    monkeypatch.setattr(machine.tempfile, "TemporaryFile", lambda dir: io.FileIO("/dev/full", "w"))
    _, problem = machine._ask(lambda: machine._write_into(tmp_path))
    assert problem == f"{os.strerror(errno.ENOSPC)}: {tmp_path}"


# The command, in a process of its own.


def run_env(*arguments, program=("-m", "rcnn.env"), **environment):
    """A finished ``rcnn env`` with more in its environment."""
    variables = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"} | environment
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120)


def test_here_it_tells_what_it_finds_and_exits_by_it():
    text, data = run_env(), run_env("--json")
    content = json.loads(data.stdout)
    assert data.stderr == text.stderr == ""
    assert list(content) == ["rcnn", "facts", "problems", "notes"]
    assert set(content["facts"]) == {each.name for each in fields(Facts)}
    assert all(list(problem) == ["name", "sentence", "mend"] for problem in content["problems"])
    assert data.returncode == text.returncode == bool(content["problems"])
    lines = text.stdout.splitlines()
    assert [re.split(r"  +| (?=/)", line)[0] for line in lines[:4]] == ["rcnn", "Python", "torch", "driver"]
    assert "\x1b" not in text.stdout and "\u2502" not in text.stdout, "plain where there is no terminal"
    for problem in content["problems"]:
        assert f"wrong: {problem['sentence']}" in lines and f"  mend: {problem['mend']}" in lines
    assert ("nothing is wrong" in lines) is (content["problems"] == [])
    assert all(f"note: {note}" in lines for note in content["notes"])


def test_two_wheels_of_cupy_are_found(tmp_path):
    planted(tmp_path, "cupy-cuda11x", "13.6.0")
    planted(tmp_path, "cupy-cuda13x", "14.2.0")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run_env("--json", PYTHONPATH=path)
    found = {problem["name"]: problem for problem in json.loads(done.stdout)["problems"]}
    assert done.returncode == 1 and done.stderr == ""
    assert "cupy-cuda11x 13.6.0 and " in found["two-cupy"]["sentence"]
    mend = found["two-cupy"]["mend"]
    assert re.match(r"pip uninstall -y cupy-cuda11x .*cupy-cuda13x.* && pip install cupy-cuda", mend)


def test_a_broken_cupy_is_found(tmp_path):
    name = next(iter(machine._cupy_wheels()), "cupy-cuda12x")  # in front of the one that is installed
    planted(tmp_path, name, "14.2.0")
    (tmp_path / "cupy.py").write_text("raise ImportError('libcublas.so.12 is torn')")
    done = run_env("--json", PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]))
    found = {problem["name"]: problem["sentence"] for problem in json.loads(done.stdout)["problems"]}
    assert done.returncode == 1
    assert found["cupy-does-not-load"] == f"{name} 14.2.0 cannot be imported: libcublas.so.12 is torn"


def test_a_cache_folder_under_a_file_is_found(tmp_path):
    """Root may write into any folder, but not into a file."""
    (tmp_path / "file").write_text("")
    planted(tmp_path, "cupy-cuda12x", "14.2.0")
    (tmp_path / "cupy.py").write_text("raise ImportError('not today')")  # with no CuPy there is nothing to keep
    done = run_env(
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]), XDG_CACHE_HOME=str(tmp_path / "file" / "cache")
    )
    assert done.returncode == 1
    assert f"cannot be written: Not a directory: {tmp_path / 'file'}" in done.stdout


def test_what_env_says_of_a_folder_is_what_compiling_meets(tmp_path):
    """A link to nothing costs the cache; a file in the place of CuPy's own folder costs nothing."""
    pytest.importorskip("cupy")
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    variables = {"XDG_CACHE_HOME": str(tmp_path / "link"), "CUPY_CACHE_DIR": str(tmp_path / "file")}
    content = json.loads(run_env("--json", **variables).stdout)
    assert [p["name"] for p in content["problems"] if p["name"].startswith("c")] == ["cache-not-writable"]
    assert [note.split(",")[0] for note in content["notes"] if "CuPy keeps" in note] == [str(tmp_path / "file")]
    code = """if True:
        import os, warnings
        from rcnn.kernels import _launch
        from rcnn.kernels.nms import SOURCE
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            path = _launch._compiled(SOURCE, None, "sm_90", anew=True)
        assert any("kept for this process only" in str(each.message) for each in said), said
        assert path.stat().st_size and os.environ["CUPY_CACHE_DIR"] == str(path.parent)
    """
    done = run_env(program=("-c", code), **variables)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name != "posix", reason="closes a handle by the shell")
def test_with_its_output_closed_the_exit_code_is_left():
    for more in ("", " --json"):
        command = f"'{sys.executable}' -m rcnn.env{more} >&-"
        done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=120)
        assert (done.stderr, done.returncode) == ("", run_env("--json").returncode)


def test_a_home_that_cannot_be_written_costs_the_cache_and_no_more(tmp_path):
    pytest.importorskip("cupy")
    (tmp_path / "file").write_text("")
    variables = {"HOME": str(tmp_path / "file" / "me"), "XDG_CACHE_HOME": "", "CUPY_CACHE_DIR": ""}
    content = json.loads(run_env("--json", **variables).stdout)
    assert content["facts"]["cupy_loads"] and content["facts"]["nvrtc"]
    assert [p["name"] for p in content["problems"] if p["name"].startswith("c")] == ["cache-not-writable"]


DRIVER = r"""
#include <cstdlib>
#include <cstring>
// A driver with two GPUs, or one that fails in cuInit with the error that the environment names.
extern "C" int cuInit(unsigned) { const char* code = std::getenv("FAILS_WITH"); return code ? std::atoi(code) : 0; }
extern "C" int cuDriverGetVersion(int* version) { *version = 12020; return 0; }
extern "C" int cuDeviceGetCount(int* count) { *count = 2; return 0; }
extern "C" int cuDeviceGet(int* device, int ordinal) { *device = 7 + ordinal; return 0; }
extern "C" int cuDeviceGetName(char* name, int size, int device) {
    std::strncpy(name, device == 7 ? "NVIDIA H200" : "Tesla T4", size);
    return 0;
}
extern "C" int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    *bytes = (device == 7 ? 141ull : 15ull) << 30;
    return 0;
}
extern "C" int cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (attribute != 75 && attribute != 76) return 1;
    *value = device == 7 ? (attribute == 75 ? 9 : 0) : (attribute == 75 ? 7 : 5);
    return 0;
}
extern "C" int cuGetErrorName(int, const char** name) { *name = "CUDA_ERROR_OF_THIS_TEST"; return 0; }
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    """The driver above, compiled."""
    compiler = shutil.which("g++")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("needs Linux and g++")
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.cpp").write_text(DRIVER)
    command = [compiler, "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(folder / "driver.cpp")]
    subprocess.run(command, check=True)
    return str(folder / "libcuda.so.1")


#: Runs the command on the planted driver with a torch that knows no CUDA, and without CuPy.
BARE = """
import ctypes, os, sys
import torch
from rcnn import env, machine
torch.version.cuda, torch.cuda.is_available = None, lambda: False
sys.modules["cupy"], machine._cupy_wheels = None, dict
machine._libcuda = lambda: ctypes.CDLL(os.environ["PLANTED_DRIVER"])
env.main(sys.argv[1:])
"""


def test_a_machine_with_a_gpu_and_nothing_for_it(driver):
    done = run_env("--json", program=("-c", BARE), PLANTED_DRIVER=driver)
    content = json.loads(done.stdout)
    assert content["facts"]["driver_cuda"] == [12, 2]
    assert content["facts"]["gpus"] == [
        {"name": "NVIDIA H200", "capability": [9, 0], "memory": 141 << 30},
        {"name": "Tesla T4", "capability": [7, 5], "memory": 15 << 30},
    ]
    assert [problem["name"] for problem in content["problems"]] == ["torch-without-cuda", "no-cupy"]
    assert [problem["mend"] for problem in content["problems"]] == [
        "pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126",
        "pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12",
    ]
    assert done.returncode == 1


def test_a_driver_that_fails_is_told_from_one_without_gpus(driver, monkeypatch):
    monkeypatch.setattr(machine, "_libcuda", lambda: ctypes.CDLL(driver))
    monkeypatch.setenv("FAILS_WITH", "100")
    assert machine._ask(machine._gpus) == ((), "")
    monkeypatch.setenv("FAILS_WITH", "999")
    gpus, problem = machine._ask(machine._gpus)
    assert gpus is None and problem == "its driver fails in cuInit with CUDA_ERROR_OF_THIS_TEST (999)"
