"""SIGTERM as a request: batch systems, containers and `timeout` send it a while before they kill."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def noticed() -> Iterator[Callable[[], bool]]:
    """Yield a function that says whether a SIGTERM has come; inside the block it does nothing else.

    Only the main thread of a process can listen to signals; in another one SIGTERM keeps its meaning.
    """
    came = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal came
        came = True
        if callable(before):
            before(number, frame)  # a block around this one wants to know as well

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, note)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextmanager
def held_back() -> Iterator[None]:
    """SIGTERM waits until the block's end. A process that is started inside never gets it: who started it decides when it ends.

    A handler would come too late there: for seconds, while it imports, a new process can answer no signal but by dying.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
