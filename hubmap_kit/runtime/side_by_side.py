"""Folds side by side: one process per device, each taking the next fold that nobody has begun.

A worker writes into the folder of its fold only. The tile store is there before the workers start, and everything that belongs
to the whole run is written by the parent.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from hubmap_kit import errors
from hubmap_kit.errors import HubmapError
from hubmap_kit.runtime.fold_worker import Job, work
from hubmap_kit.training.clock import Clock, OutOfTime
from hubmap_kit.training.fold import OnEpoch
from hubmap_kit.training.run import Plan

log = logging.getLogger(__name__)
PATIENCE_S = 30.0  # for a worker that was told to stop; what it has finished is on disk in any case


@dataclass
class _Worker:
    device: torch.device
    process: BaseProcess
    messages: Connection


def train_side_by_side(
    planned: Plan, numbers: Sequence[int], devices: Sequence[torch.device], on_epoch: OnEpoch | None = None, clock: Clock | None = None
) -> None:
    """Train the folds `numbers`, at most one at a time on each device.

    Returns when all are done. Raises OutOfTime when the clock stopped one of them, after all have stopped. The first error of a
    worker stops the others, with their finished epochs kept, and is raised here with the same sentence.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()  # what the parent tried out there; the first card is a worker's now
    used = devices[: len(numbers)]
    level = logging.getLogger("hubmap_kit").getEffectiveLevel()
    job = Job(planned, list(numbers), context.Value("i", 0), context.Event(), clock, len(used), level)
    workers: list[_Worker] = []
    try:
        for device in used:
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=work, args=(job, str(device), theirs))
            process.start()
            theirs.close()
            workers.append(_Worker(device, process, ours))
        stopped = _listen(workers, on_epoch)
    finally:
        _end(workers, job)
    if stopped:
        raise OutOfTime("; ".join(stopped))


def _listen(workers: Sequence[_Worker], on_epoch: OnEpoch | None) -> list[str]:
    """Follow all workers to their ends; returns how far those came whose time was up. Raises the first error of one."""
    open_workers = {worker.messages: worker for worker in workers}
    stopped: list[str] = []
    while open_workers:
        for connection in wait(list(open_workers)):
            worker = open_workers[connection]  # type: ignore[index]
            try:
                kind, *content = worker.messages.recv()
            except EOFError:
                del open_workers[worker.messages]
                _check_exit(worker)
                continue
            if kind == "epoch" and on_epoch is not None:
                on_epoch(*content)
            elif kind == "stopped":
                stopped += content
            elif kind == "error":
                name, sentence = content
                raise _error_of(name)(sentence)
    return stopped


def _check_exit(worker: _Worker) -> None:
    worker.process.join(PATIENCE_S)
    if worker.process.exitcode != 0:
        raise HubmapError(
            f"the process that trained on {worker.device} ended with code {worker.process.exitcode} (-9 is mostly too little memory); "
            "its finished epochs are kept, go on with --resume"
        )


def _error_of(name: str) -> type[HubmapError]:
    found = getattr(errors, name, HubmapError)
    return found if isinstance(found, type) and issubclass(found, HubmapError) else HubmapError


def _end(workers: Sequence[_Worker], job: Job) -> None:
    """Ask every worker to stop, and end those that do not."""
    job.stop.set()
    for worker in workers:
        worker.process.join(PATIENCE_S)
        for end in (worker.process.terminate, worker.process.kill):
            if worker.process.is_alive():
                end()
                worker.process.join(PATIENCE_S)
        worker.messages.close()
