"""Processes that the kit starts: how a worker behaves, and how whoever started it ends it.

A signal may reach a whole group of processes: Ctrl-C, a batch system's SIGTERM, a closed terminal. The process that was
started first answers it and ends its workers in order, so a worker heeds nobody but its parent, and it never outlives
it.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any, NoReturn

LOOK_S = 1.0  # between two looks of a worker at whether its parent still lives
PATIENCE_S = 5.0  # for a worker to end of its own accord
CAN_WAIT = hasattr(signal, "sigtimedwait")  # Linux; elsewhere a worker dies of SIGTERM as any process does


def start_worker(context: BaseContext, work: Callable[..., object], *arguments: object) -> BaseProcess:
    """Start a process that does `work(*arguments)` as a worker from its first moment on: what it imports for that may
    take it many seconds.
    """
    maker: Any = context  # its stubs lack Process
    process: BaseProcess = maker.Process(target=_serve, args=(_Pledge(), work, *arguments))
    with sigterm_held_back():
        process.start()
    return process


class _Pledge:
    """Becomes `become_worker()` when it is unpickled, which in the arguments of a new process comes before all that
    follows it.
    """

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return become_worker, ()


def _serve(pledge: _Pledge | None, work: Callable[..., object], *arguments: object) -> None:
    if pledge is not None:  # forked: nothing was pickled
        become_worker()
    work(*arguments)


def become_worker() -> None:
    """Make this process, started by `multiprocessing`, a worker: it ends within seconds of its parent, even one that
    was killed.

    Ctrl-C is ignored. SIGTERM is obeyed when the parent sent it, as Python does at exit, and ignored when anybody else
    did. Call it first, in a process that was started inside `sigterm_held_back`: a thread that is older than the call
    would die of SIGTERM and take the process along.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if CAN_WAIT:
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    else:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    threading.Thread(target=_obey, args=(os.getppid(),), name="hubmap parent", daemon=True).start()


def _obey(starter: int) -> None:
    """End this process with its parent, or when that says so.

    `starter` started it: the parent, or a fork server in the parent's place.
    """
    while os.getppid() == starter and ((parent := multiprocessing.parent_process()) is None or parent.is_alive()):
        if not CAN_WAIT:
            time.sleep(LOOK_S)
            continue
        came = signal.sigtimedwait({signal.SIGTERM}, LOOK_S)
        if came is not None and came.si_pid in (starter, parent and parent.pid):
            break
    os._exit(0)


def leave(code: int) -> NoReturn:
    """End this process at once: output is written, what was registered for the exit runs, and that is all.

    Python would wait for threads that somebody left behind, and then take torch apart for a second or more.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # a closed pipe or stream has nobody left to read
            stream.flush()
    os._exit(code)


def end(workers: Iterable[BaseProcess], patience_s: float = PATIENCE_S) -> None:
    """Wait until all workers, told to stop already, are gone; kill those that are still there after `patience_s`
    seconds in all.
    """
    deadline = time.monotonic() + patience_s
    for worker in workers:
        worker.join(max(0.0, deadline - time.monotonic()))
        if worker.is_alive():
            worker.kill()
            worker.join(PATIENCE_S)  # not for ever: a process that waits for a broken disk cannot even be killed


@contextmanager
def threads(most: int | None = None) -> Iterator[ThreadPoolExecutor]:
    """A pool of at most `most` threads, no more than there are processors.

    What it has not begun is dropped when the block ends early.

    Python's own pool would work through all of it, after Ctrl-C as well.
    """
    pool = ThreadPoolExecutor(max(1, min(most or 64, os.cpu_count() or 1)))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def sigterm_noticed() -> Iterator[Callable[[], bool]]:
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
def sigterm_held_back() -> Iterator[None]:
    """SIGTERM waits until the block's end.

    Start workers inside: a handler would come too late for the seconds that they take to import.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
