"""The script of docs/training-at-scale.md, run with stand-ins for what SLURM brings."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from rcnn import run_folder
from rcnn.data import flowers

ROOT = Path(__file__).resolve().parents[1]

#: Starts the ranks, hands signals on, waits for all, and ends with the largest code, as the real one does.
SRUN = """
import os, signal, subprocess, sys
assert sys.argv[1] == "--wait=300"
ranks = [
    subprocess.Popen(sys.argv[2:], env=os.environ | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r)}) for r in range(2)
]
signal.signal(signal.SIGUSR1, lambda number, _: [rank.send_signal(number) for rank in ranks])
print("srun", os.getpid(), flush=True)
sys.exit(max(rank.wait() for rank in ranks))
"""
SCONTROL = """
import sys
print("localhost" if sys.argv[1] == "show" else f"scontrol {' '.join(sys.argv[1:])}")
"""


def test_the_job_is_queued_again_after_its_signal_and_not_at_its_end(tmp_path):
    data = flowers.write(tmp_path / "flowers", count=12, seed=1)
    out = tmp_path / "run"
    page = (ROOT / "docs" / "training-at-scale.md").read_text(encoding="utf-8")
    script = re.search(r"<!-- script: slurm -->\n```bash\n(.*?)```", page, re.DOTALL)[1]
    small = "--device cpu --model.min_size 64 --model.max_size 96 --loader.batch_size 2 --loader.workers 0"
    small += " --log_interval 1"
    assert "--data DIR --out runs/mine " in script and "29500" in script
    script = script.replace("--data DIR --out runs/mine ", f"--data {data} --out {out} --epochs 2 {small} ")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, code in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(f"#!{sys.executable}\n{code}")
    (commands / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for command in commands.iterdir():
        command.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "SLURM_JOB_NODELIST": "here",
        "SLURM_JOB_ID": "4711",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "2",
    }
    log = tmp_path / "log.txt"

    def submit():
        with log.open("w") as file:
            return subprocess.Popen(["bash", "-c", script], env=environment, stdout=file, stderr=file)

    job = submit()
    end = time.monotonic() + 120
    while "loss_box_reg" not in log.read_text() and job.poll() is None:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.02)
    os.kill(int(re.search(r"srun (\d+)", log.read_text())[1]), signal.SIGUSR1)
    assert job.wait(120) == 75, log.read_text()
    shown = log.read_text()
    assert "2 process(es)" in shown and "stopped by a signal" in shown and "scontrol requeue 4711" in shown
    assert run_folder.states(out)
    (commands / "python").write_text("#!/bin/sh\nexit 0\n")  # a run that comes to its end
    assert submit().wait(120) == 0 and "scontrol requeue" not in log.read_text()
