"""The images' files without an engine: what they name exists, what they promise is written down, their commands run."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    return found


def stages() -> dict[str, list[str]]:
    """Stage -> its instructions, one text each, with the lines that a backslash joins."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"))
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("FROM "):
            found[line.split(" AS ")[1]] = [line]
        elif line and not line.startswith("#") and found:
            found[next(reversed(found))].append(line)
    return found


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
def test_compose_file_is_valid(tmp_path: Path) -> None:
    command = ["docker-compose", "--file", str(ROOT / "docker-compose.yml"), "--profile", "cpu", "config"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "DATA": str(tmp_path)})
    assert result.returncode == 0, result.stderr
    resolved = yaml.safe_load(result.stdout)["services"]
    assert set(resolved) == {"train", "train-cpu", "notebook", "notebook-cpu", "tensorboard"}
    assert f"{tmp_path}:/data:rw" in resolved["train"]["volumes"]
    ports = [port for service in resolved.values() for port in service.get("ports", [])]
    assert ports and all(port.startswith("127.0.0.1:") for port in ports)


def test_train_asks_for_the_gpus_and_for_shared_memory() -> None:
    train = services()["train"]
    (device,) = train["deploy"]["resources"]["reservations"]["devices"]
    assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert train["shm_size"] == "8gb"
    assert "deploy" not in services()["train-cpu"]
    for service in services().values():
        assert {volume.split(":")[-1] for volume in service["volumes"]} == {"/data", "/runs"}


def test_images_are_pinned_and_have_no_toolkit() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE))
    names = set(stages())
    for image in (instructions[0].split()[1] for instructions in stages().values()):
        if image not in names:
            resolved = re.sub(r"\$\{(\w+)\}", lambda match: arguments[match[1]], image)
            assert re.search(r":\d+\.\d+\.\d+-", resolved), resolved
            assert "devel" not in resolved and "latest" not in resolved


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_what_runs_is_no_root_and_is_asked_for_its_health(name: str) -> None:
    instructions = stages()[name]
    assert "USER rcnn" in instructions
    assert any(line.startswith("HEALTHCHECK ") and line.endswith('CMD ["rcnn", "env"]') for line in instructions)
    assert any(line.startswith("COPY --from=") for line in instructions), "what built it stays behind"
    assert not any("pip install" in line for line in instructions)


def test_copied_files_exist_and_reach_the_engine() -> None:
    passed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copies = [line.split()[1:] for lines in stages().values() for line in lines if line.startswith("COPY ")]
    sources = {word for words in copies if "--from" not in words[0] for word in words[:-1] if not word.startswith("--")}
    assert sources == passed
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_the_wheel_builds_from_what_is_copied(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="68")
    (copy,) = [line for line in stages()["wheel"] if line.startswith("COPY setup.cfg")]
    for name in copy.split()[1:-1]:
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "rcnn", tmp_path / "rcnn", ignore=shutil.ignore_patterns("__pycache__"))
    (run,) = [line for line in stages()["wheel"] if line.startswith("RUN ")]
    words = run.removeprefix("RUN ").replace("/wheels", str(tmp_path / "wheels")).split()
    assert words[0] == "pip"
    command = [sys.executable, "-m", *words, "--no-build-isolation"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    assert list((tmp_path / "wheels").glob("rcnn-*.whl"))


def test_command_of_train() -> None:
    words = services()["train"]["command"]
    assert words[0] == "rcnn"
    command = [sys.executable, "-m", "rcnn.cli", *words[1:], "--print_config"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0 and "model:" in result.stdout, result.stderr


def test_the_notebook_does_not_start_without_a_token() -> None:
    words = [word.replace("$$", "$") for word in services()["notebook"]["command"]]  # as compose does
    environment = {**os.environ, "JUPYTER_TOKEN": ""}
    result = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=60)
    assert result.returncode != 0
    assert "JUPYTER_TOKEN: must be set to a secret text" in result.stderr


def test_command_of_tensorboard(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    swaps = {"/runs": str(tmp_path), "0.0.0.0": "127.0.0.1", "8888": str(port)}
    words = [swaps.get(word, word) for word in services()["tensorboard"]["command"]]
    assert words[0] == "tensorboard"
    command = [sys.executable, "-m", "tensorboard.main", *words[1:]]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/data/environment", timeout=5) as answer:
                    assert answer.status == 200
                    break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.5)
        else:
            pytest.fail("the server did not answer within a minute")
    finally:
        server.terminate()
        server.wait(timeout=30)
