"""Folds side by side: one process per device, each taking the next fold that nobody has begun.

A worker writes into the folder of its fold only. The tile store is there before the workers start, and everything that
belongs to the whole run is written by the parent.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from hubmap_kit import errors
from hubmap_kit.errors import HubmapError
from hubmap_kit.processes import end, start_worker
from hubmap_kit.runtime.fold_worker import Job, work
from hubmap_kit.training.clock import Clock, OutOfTime, Stoppable, was_told
from hubmap_kit.training.fold import OnEpoch
from hubmap_kit.training.run import Plan

log = logging.getLogger(__name__)
PATIENCE_S = 30.0  # for a worker that was told to stop; what it has finished is on disk in any case
LOOK_S = 0.5  # between two looks at whether this process was told to stop


@dataclass
class _Worker:
    device: torch.device
    process: BaseProcess
    messages: Connection
    fold: int | None = None  # what it trains
    ended: bool = False  # it has said that nothing more comes


@dataclass
class _Ends:
    """How the folds ended that are not done: by the clock, or by an error (its class, and a sentence that names the
    fold).
    """

    stopped: list[str] = field(default_factory=list)
    failed: list[tuple[type[HubmapError], str]] = field(default_factory=list)


def train_side_by_side(
    planned: Plan,
    numbers: Sequence[int],
    devices: Sequence[torch.device],
    on_epoch: OnEpoch | None = None,
    clock: Clock | None = None,
) -> None:
    """Train the folds `numbers`, at most one at a time on each device.

    Returns when all are done. An error of one fold ends that fold only: it is raised here, with its class and the
    number of its fold, once the others have come to their ends. Raises OutOfTime when nothing failed and the clock
    stopped one of them.
    """
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    if torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()  # what the parent tried out there; the first card is a worker's now
    used = devices[: len(numbers)]
    level = logging.getLogger("hubmap_kit").getEffectiveLevel()
    own = (
        clock.clock if isinstance(clock, Stoppable) else clock
    )  # what this process is told reaches the workers as `stop`
    job = Job(planned, list(numbers), context.Value("i", 0), context.Event(), own, len(used), level)
    workers: list[_Worker] = []
    try:
        for device in used:
            ours, theirs = context.Pipe(duplex=False)
            process = start_worker(context, work, job, str(device), theirs)
            theirs.close()
            workers.append(_Worker(device, process, ours))
        ends = _listen(workers, job, on_epoch, clock)
    finally:
        _end(workers, job)
    if ends.failed:
        left = [] if ends.stopped else [f"fold {number} is not begun" for number in job.numbers[job.taken.value :]]
        raise ends.failed[0][0]("; ".join([sentence for _, sentence in ends.failed] + ends.stopped + left))
    if ends.stopped:
        raise OutOfTime("; ".join(ends.stopped))


def _listen(workers: Sequence[_Worker], job: Job, on_epoch: OnEpoch | None, clock: Clock | None) -> _Ends:
    """Follow all workers to their ends, and pass on that this process was told to stop."""
    open_workers = {worker.messages: worker for worker in workers}
    ends = _Ends()
    while open_workers:
        if was_told(clock):
            job.stop.set()
        for connection in wait(list(open_workers), LOOK_S):
            worker = open_workers[connection]  # type: ignore[index]
            try:
                kind, *content = worker.messages.recv()
            except EOFError:
                del open_workers[worker.messages]
                _check_exit(worker, ends)
                continue
            if kind == "epoch":
                if on_epoch is not None:
                    on_epoch(*content)
            else:
                _note(worker, ends, kind, content)
    return ends


def _note(worker: _Worker, ends: _Ends, kind: str, content: Sequence[str]) -> None:
    if kind == "begun":
        worker.fold = int(content[0])
    elif kind == "stopped":
        ends.stopped += content
    elif kind == "error":
        name, sentence = content
        doer = _work_of(worker)
        ends.failed.append((_error_of(name), f"{doer} failed: {sentence.removeprefix(f'{doer}: ')}"))
        # The others go on, for hours perhaps: the log says at once what the end will say again.
        log.error("%s; what else is planned goes on", ends.failed[-1][1])
    elif kind == "end":
        worker.ended = True


def _work_of(worker: _Worker) -> str:
    return f"the worker on {worker.device}" if worker.fold is None else f"fold {worker.fold}"


def _check_exit(worker: _Worker, ends: _Ends) -> None:
    """Note a failure where a worker is gone that has not said so; how long the process takes to end after that is all
    one.
    """
    if worker.ended:
        return
    worker.process.join(PATIENCE_S)
    ends.failed.append(
        (
            HubmapError,
            (
                f"{_work_of(worker)} failed: the process that trained on {worker.device} ended with code"
                f" {worker.process.exitcode} (-9 is mostly too little memory); its finished epochs are kept, go on with"
                " --resume"
            ),
        )
    )
    log.error("%s", ends.failed[-1][1])


def _error_of(name: str) -> type[HubmapError]:
    found = getattr(errors, name, HubmapError)
    return found if isinstance(found, type) and issubclass(found, HubmapError) else HubmapError


def _end(workers: Sequence[_Worker], job: Job) -> None:
    """Ask every worker to stop, and end those that do not."""
    job.stop.set()
    end([worker.process for worker in workers], PATIENCE_S)
    for worker in workers:
        worker.messages.close()
