"""One process of folds side by side: it takes the next fold that nobody has begun, until there is none."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TextIO

import torch

from hubmap_kit import errors
from hubmap_kit.errors import HubmapError
from hubmap_kit.models.device import choose_device
from hubmap_kit.training.clock import Clock, OutOfTime, Stoppable
from hubmap_kit.training.history import Row
from hubmap_kit.training.run import Plan, train_fold

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
    sys.stdout = sys.stderr = lines  # type: ignore[assignment]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=lines, force=True)  # type: ignore[type-var]
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
            advice = (
                "; lower training.batch_size, inference.batch_size or tiles.size with --set"
                if "out of memory" in reason
                else ""
            )
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
