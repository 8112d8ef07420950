"""Loading processes that die, and those that an error leaves behind."""

import re
import sys

import jobs
import pytest

from rcnn.data import flowers

OPTIONS = ["--model.min_size", "64", "--model.max_size", "96", "--loader.batch_size", "2", "--loader.workers", "1"]


@pytest.fixture(scope="module")
def data(folder):
    return flowers.write(folder / "flowers", count=16, seed=1)


DEAD_WORKER = """
import signal
from torch.utils.data import get_worker_info
from rcnn.data.dataset import DetectionDataset
real = DetectionDataset.read

def read(self, index, *rest):
    if get_worker_info() is not None and index == 3:
        os.kill(os.getpid(), signal.{signal})
    return real(self, index, *rest)

DetectionDataset.read = read
"""


@pytest.mark.parametrize("name", ["SIGKILL", "SIGSEGV"])
def test_a_worker_that_dies_names_its_file(server, data, folder, name):
    out = folder / f"worker-{name}"
    words = ["--data", data, "--out", out, *OPTIONS]
    job = server.train(*words, before=jobs.BRIEF + DEAD_WORKER.format(signal=name))
    assert job.wait() == 1
    names = (data / "VOC2007/ImageSets/Main/train.txt").read_text().split()
    shown = job.text().replace("\0", "\n")  # torch's own last word ends in a zero
    assert "a loading process died" in shown, shown
    (line,) = [line for line in shown.splitlines() if "a loading process died" in line]
    assert line.startswith("rcnn train: a loading process died (") and f"/{names[3]}.jpg; if memory ran out" in line


BROKEN_OFF = """
import signal, threading, time
from multiprocessing import resource_sharer
from torch.utils.data import get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Items
from rcnn.data.dataset import DetectionDataset
real_read, real_get, at = DetectionDataset.read, Items._try_get_data, []

def read(self, index, *rest):
    if get_worker_info() is not None:
        at.append(index)
        if len(at) == 3:  # the second batch; the first stands in the queue, and its memory is still to be fetched here
            time.sleep(0.5)
            resource_sharer._resource_sharer._listener.close()
            threading.Event().wait(2)
            print("worker ends at", self.records[index].path.name, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
    return real_read(self, index, *rest)

def get(self, *rest):
    time.sleep(1.5)
    return real_get(self, *rest)

DetectionDataset.read, Items._try_get_data = read, get
"""


@pytest.mark.skipif(sys.platform != "linux", reason="workers hand over their memory by sockets on Linux")
def test_a_worker_that_dies_while_its_batch_is_fetched(server, data, folder):
    words = ["--data", data, "--out", folder / "broken-off", *OPTIONS]
    job = server.train(*words, before=jobs.BRIEF + BROKEN_OFF)
    assert job.wait() == 1
    shown = job.text()
    (name,) = re.findall(r"worker ends at (\S+)", shown)
    assert "rcnn train: a loading process died (" in shown and f"/{name}; if memory ran out" in shown, shown


PINNED = """
import signal
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter as Items

def get(self):
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # torch's handler seldom comes first then
    os.kill(self._workers[0].pid, signal.SIGKILL)
    raise RuntimeError("Pin memory thread exited unexpectedly")

Items._get_data = get
"""


def test_a_worker_whose_batch_the_thread_for_page_locked_memory_misses(server, data, folder):
    """There is one with a GPU alone; this is what torch says once it has ended."""
    job = server.train("--data", data, "--out", folder / "pinned", *OPTIONS, before=jobs.BRIEF + PINNED)
    assert job.wait() == 1
    told = r"rcnn train: a loading process died \((exited unexpectedly|killed by signal: Killed)\) at "
    assert re.search(told, job.text()), job.text()


def test_an_error_that_nobody_expects_ends_the_process_and_its_workers(server, data, folder):
    """Its traceback holds the loader, whose workers ignore the signal that multiprocessing ends them with."""
    words = ["train", "--data", data, "--out", folder / "error", *OPTIONS]
    job = server.start(f"""
import atexit, multiprocessing
def on_device(*_):
    print("workers", len(multiprocessing.active_children()))
    raise RuntimeError("planted")
engine.Step.on_device = on_device
try:
    cli.main({[*map(str, words)]!r})
except RuntimeError as error:
    atexit._run_exitfuncs()
    print(error, len(multiprocessing.active_children()))
""")
    assert job.wait(60) == 0, job.text()
    assert "workers 1" in job.text() and "planted 0" in job.text()
