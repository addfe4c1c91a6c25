"""Work on many slides in several processes: a bounded number at a time, so that memory does not grow with the
slides.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

import cv2

from hubmap_kit.errors import StoreError
from hubmap_kit.processes import become_worker, sigterm_held_back

T = TypeVar("T")
AHEAD = 2  # tasks handed out per process


def over_processes(work: Callable[[T], None], tasks: Sequence[T], jobs: int) -> Iterator[None]:
    """Do `work` for each task in `jobs` processes (1: in this one), and yield once for every task that is done, in any
    order.

    The first error ends it. Raises StoreError when a process dies, which is what an out-of-memory killer does.
    """
    if jobs <= 1 or len(tasks) <= 1:
        for task in tasks:
            work(task)
            yield
        return
    # A forked process would inherit locks that OpenCV's or pyarrow's threads hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context, initializer=_start_worker) as pool:
        try:
            yield from _hand_out(pool, work, tasks, jobs * AHEAD)
        except BrokenProcessPool as error:
            raise StoreError(
                "a process of the conversion was killed, as happens where memory is short; run again with fewer --jobs,"
                " it goes on"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _hand_out(pool: ProcessPoolExecutor, work: Callable[[T], None], tasks: Sequence[T], most: int) -> Iterator[None]:
    running: set[Future[None]] = set()
    for task in tasks:
        if len(running) >= most:
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
        with sigterm_held_back():
            running.add(pool.submit(work, task))
    while running:
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


def _start_worker() -> None:
    become_worker()
    cv2.setNumThreads(0)
