"""Runs in processes of their own, which a test may kill: forked from a server that has imported everything once."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import rcnn

SERVER = """
import contextlib, json, os, sys, traceback
from pathlib import Path

import matplotlib.pyplot, pycocotools.cocoeval, tensorboardX, torch, torch._dynamo  # so that no job pays for them
from rcnn import cli, distributed, engine, run_folder, train, training

def job(order):
    output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(order["environment"])
    code = 0
    try:
        exec(compile(order["code"], "job", "exec"), {"__name__": "job", **globals()})
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    with contextlib.suppress(BaseException):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)

for line in sys.stdin:
    order = json.loads(line)
    if "poll" in order:
        pid, status = os.waitpid(order["poll"], os.WNOHANG)
        print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
    else:
        pid = os.fork()
        if not pid:
            job(order)
        print(pid, flush=True)
"""

#: Put before a job's code, this leaves out the pictures and plots at the end of a run.
BRIEF = "train._finish = lambda *_: None\n"


class Job:
    """A running job: ``pid``, and what it has printed so far."""

    def __init__(self, server: "Server", pid: int, output: Path) -> None:
        self.server, self.pid, self.output = server, pid, output
        self.code: int | None = None

    def poll(self) -> int | None:
        """The exit code, negative after a signal, once there is one."""
        if self.code is None:
            self.code = self.server.ask({"poll": self.pid})
        return self.code

    def wait(self, timeout: float = 300.0) -> int:
        """The exit code."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            assert time.monotonic() < end, f"still running after {timeout} s:\n{self.text()}"
            time.sleep(0.02)
        return code

    def text(self) -> str:
        """Standard output and error together."""
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def wait_for(self, words: str, timeout: float = 300.0) -> None:
        """Return once ``words`` are printed, or the job has ended."""
        end = time.monotonic() + timeout
        while words not in self.text() and self.poll() is None:
            assert time.monotonic() < end, f"no {words!r} after {timeout} s:\n{self.text()}"
            time.sleep(0.01)

    def signal(self, number: int) -> None:
        """Send a signal, if the job is still there."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


class Server:
    """Starts jobs; made by :func:`serving`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(Path(rcnn.__file__).parents[1]), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, order: dict) -> int | None:
        """Send an order to the server and give its answer."""
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def start(self, code: str, **environment: str) -> Job:
        """Start Python code; ``cli``, ``train``, ``training``, ``engine``, ``torch`` and others are imported there."""
        self.jobs += 1
        output = self.folder / f"job-{self.jobs}.txt"
        return Job(self, self.ask({"code": code, "output": str(output), "environment": environment}), output)

    def train(self, *words: object, before: str = BRIEF) -> Job:
        """Start ``rcnn train`` with ``words``, after the Python code ``before``."""
        return self.start(f"{before}\ncli.main({['train', *map(str, words)]!r})")


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server in ``folder``, which ends with all its jobs."""
    server = Server(folder)
    running: list[Job] = []
    start = server.start

    def noted(*words: str, **environment: str) -> Job:
        running.append(start(*words, **environment))
        return running[-1]

    server.start = noted  # type: ignore[method-assign]
    try:
        yield server
    finally:
        for job in running:
            job.signal(signal.SIGKILL)
        server.process.stdin.close()
        server.process.wait(60)
        server.process.stdout.close()
