"""One process of folds side by side: it takes the next fold that nobody has begun, until there is none."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, TextIO

import torch

from hubmap_kit.errors import HubmapError
from hubmap_kit.models.device import choose_device
from hubmap_kit.training.clock import Clock, OutOfTime
from hubmap_kit.training.fold import Row
from hubmap_kit.training.run import Plan, train_fold


@dataclass(frozen=True)
class Job:
    """What all workers share: the folds to train, how many of them are taken (a shared number), and the event that stops all."""

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
    """The life of a worker process on one device.

    Sends ("epoch", fold, rows) after every epoch, and at its end ("stopped", how far it came) or ("error", class, sentence), if
    there is something to say.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent alone answers it
    lines = _Lines(sys.stderr, device)
    sys.stdout = sys.stderr = lines  # type: ignore[assignment]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=lines, force=True)  # type: ignore[type-var]
    logging.getLogger("hubmap_kit").setLevel(job.level)

    def tell(fold: int, rows: list[Row]) -> None:
        messages.send(("epoch", fold, rows))

    try:
        chosen = choose_device(device)
        torch.set_num_threads(max(1, torch.get_num_threads() // job.workers))
        while (number := job.next()) is not None:
            lines.prefix = f"fold {number}, {device}"
            train_fold(job.planned, number, chosen, tell, _WorkerClock(job.clock, job.stop))
    except OutOfTime as error:
        if not job.stop.is_set():
            messages.send(("stopped", error.where))
    except HubmapError as error:
        messages.send(("error", type(error).__name__, str(error)))
    except Exception as error:
        traceback.print_exc()
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        advice = "; lower training.batch_size, inference.batch_size or tiles.size with --set" if "out of memory" in reason else ""
        messages.send(("error", "HubmapError", f"{lines.prefix}: {type(error).__name__}: {reason}{advice}"))
    finally:
        messages.close()


@dataclass
class _WorkerClock:
    """The session's clock, which is also up when the parent says so or is gone."""

    clock: Clock | None
    stop: Any

    def told(self) -> bool:
        parent = multiprocessing.parent_process()
        return self.stop.is_set() or (parent is not None and not parent.is_alive())

    def fits(self, seconds: float) -> bool:
        return not self.told() and (self.clock is None or self.clock.fits(seconds))


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
