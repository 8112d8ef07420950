"""What asks a run to stop: signals once and twice, the time, and what is left behind."""

import os
import signal
import threading

import pytest

from rcnn import stopping
from rcnn.stopping import Reason


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGINT, Reason.INTERRUPTED),
        (signal.SIGTERM, Reason.PREEMPTED),
        (signal.SIGUSR1, Reason.PREEMPTED),
    ],
)
def test_a_signal_is_an_answer_however_often_and_ctrl_c_after_it_interrupts(number, reason):
    before = signal.getsignal(number)
    with stopping.requests() as asked:
        assert asked() is Reason.NONE and not asked()
        os.kill(os.getpid(), number)
        assert asked() is reason
        if number != signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        assert asked() is reason
    assert signal.getsignal(number) is before


def test_the_time_counts_from_the_start_and_a_signal_before_it(monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: clock[0])
    with stopping.requests(max_minutes=2) as asked:
        clock[0] += 119.9
        assert asked() is Reason.NONE
        clock[0] += 0.1
        assert asked() is Reason.TIME
        os.kill(os.getpid(), signal.SIGUSR1)
        assert asked() is Reason.PREEMPTED
    with stopping.requests() as asked:
        clock[0] += 1e9
        assert asked() is Reason.NONE


def test_outside_the_main_thread_only_the_time_counts():
    found = []

    def look():
        with stopping.requests(max_minutes=1e-9) as asked:
            found.append((asked(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(Reason.TIME, before)]


def test_processes_agree_on_the_strongest_reason():
    assert max(Reason) is Reason.INTERRUPTED and sorted(Reason)[:2] == [Reason.NONE, Reason.TIME]
    assert str(Reason.PREEMPTED) == "a signal (SIGTERM or SIGUSR1)"
