"""Folds side by side: one process per device, each taking the next fold that nobody has begun.

A worker writes into the folder of its fold only. The tile store is there before the workers start, and everything that
belongs to the whole run is written by the parent.
"""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, TextIO

import torch

from hubmap_kit import errors
from hubmap_kit.errors import LESS_MEMORY, HubmapError
from hubmap_kit.models.device import choose_device
from hubmap_kit.processes import end, start_worker
from hubmap_kit.training.clock import Clock, OutOfTime, Stoppable, was_told
from hubmap_kit.training.fold import OnEpoch
from hubmap_kit.training.history import Row
from hubmap_kit.training.run import Plan, train_fold

# One process of folds side by side: it takes the next fold that nobody has begun, until there is none.

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What all workers share: the folds to train, how many of them are taken (a shared number), and the event that
    stops all.
    """

    planned: Plan
    numbers: Sequence[int]
    taken: Any
    stop: Any
    clock: Clock | None
    workers: int
    level: int

    def next(self) -> int | None:
        """The next fold that nobody has begun, now taken; None when there is none left."""
        with self.taken.get_lock():
            index = self.taken.value
            self.taken.value += 1
        return self.numbers[index] if index < len(self.numbers) else None


def work(job: Job, device: str, messages: Connection) -> None:
    """The life of a worker process (see `hubmap_kit.processes`) on one device.

    Sends ("begun", fold), ("epoch", fold, the new row), ("stopped", how far it came) or ("error", class, sentence) as
    they come, and ("end",) as its last word. After an error that a sentence explains, the next fold has its turn; after
    any other the process is not to be trusted, and the others take what is left.
    """
    lines = _Lines(sys.stderr, device)
    sys.stdout = sys.stderr = lines
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=lines, force=True)
    logging.getLogger("hubmap_kit").setLevel(job.level)

    try:
        _work(job, device, messages, lines)
        messages.send(("end",))
    except BrokenPipeError:
        log.warning("the process that started this one is gone; what is finished is on disk")
    finally:
        messages.close()


def _work(job: Job, device: str, messages: Connection, lines: _Lines) -> None:
    def tell(fold: int, row: Row) -> None:
        messages.send(("epoch", fold, row))

    try:
        chosen = choose_device(device)
    except HubmapError as error:
        messages.send(("error", _public_name(error), str(error)))
        return
    torch.set_num_threads(max(1, torch.get_num_threads() // job.workers))
    while (number := job.next()) is not None:
        lines.prefix = f"fold {number}, {device}"
        messages.send(("begun", number))
        try:
            train_fold(job.planned, number, chosen, tell, Stoppable(job.clock, job.stop.is_set))
        except OutOfTime as stop:
            messages.send(("stopped", stop.where))
            return
        except BrokenPipeError:
            raise
        except HubmapError as error:
            messages.send(("error", _public_name(error), str(error)))
        except Exception as error:
            traceback.print_exc()
            reason = (str(error).strip().splitlines() or ["no reason given"])[0]
            advice = f"; {LESS_MEMORY}" if "out of memory" in reason else ""
            messages.send(("error", "HubmapError", f"{type(error).__name__}: {reason}{advice}"))
            return


def _public_name(error: HubmapError) -> str:
    """The nearest class of the error that the module `errors` has."""
    return next(kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind)


class _Lines:
    """Standard error of a worker: whole lines with a prefix, each in one write, so that no two workers' lines mix."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self.stream, self.prefix, self._rest = stream, prefix, ""

    def write(self, text: str) -> int:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.strip():
                os.write(self.stream.fileno(), f"[{self.prefix}] {line}\n".encode(errors="replace"))
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return False  # bars then print lines

    def fileno(self) -> int:
        return self.stream.fileno()


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
