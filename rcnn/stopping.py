"""Why a run ends before its last step: Ctrl-C, a signal that announces pre-emption, or its time is up."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import Any


class Reason(IntEnum):
    """What asks a run to stop. Processes that differ agree on the largest."""

    NONE = 0
    TIME = 1
    PREEMPTED = 2
    INTERRUPTED = 3

    def __str__(self) -> str:
        return {0: "nothing", 1: "max_time", 2: "a signal (SIGTERM or SIGUSR1)", 3: "Ctrl-C"}[int(self)]


class Interrupted(Exception):
    """Training was asked to stop; a checkpoint of the moment lies in the run folder.

    Args:
        message: what happened and how to go on.
        reason: what asked.
    """

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def requests(max_minutes: float = 0.0) -> Iterator[Callable[[], Reason]]:
    """Turn SIGINT, SIGTERM and SIGUSR1 into an answer to ask for between steps; Ctrl-C after any of them interrupts.

    SIGTERM and SIGUSR1 may come twice for one reason, as a warning and at the end of the time, or from a scheduler that
    signals every process and from torchrun, which hands on what it got.

    Args:
        max_minutes: after which :attr:`Reason.TIME` is the answer, by a clock that nobody can set; 0: never.

    Yields:
        A function that gives the reason to stop, or ``Reason.NONE``. Outside the main thread, where signals cannot be
        had, only the time counts.
    """
    asked = [Reason.NONE]
    start = time.monotonic()

    def handler(number: int, frame: Any) -> None:
        if number == signal.SIGINT and asked[0]:
            raise KeyboardInterrupt
        asked[0] = asked[0] or (Reason.INTERRUPTED if number == signal.SIGINT else Reason.PREEMPTED)

    def reason() -> Reason:
        late = max_minutes and time.monotonic() - start >= 60 * max_minutes
        return asked[0] or (Reason.TIME if late else Reason.NONE)

    if threading.current_thread() is not threading.main_thread():
        yield reason
        return
    names = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows has no SIGUSR1
    previous = {s: signal.signal(s, handler) for s in (getattr(signal, n, None) for n in names) if s is not None}
    try:
        yield reason
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
