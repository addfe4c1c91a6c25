"""Laying a training out over Kaggle sessions and weeks, as the train kernel will run it: one session after the other,
each going on from the output of the one before, and in each the next fold for whichever GPU is free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from hubmap_kit.errors import PublishError
from hubmap_kit.publish.quota import Budget

SESSION_HOURS = 11.5  # what the train kernel allows itself of Kaggle's 12
WEEK = timedelta(days=7)


@dataclass(frozen=True)
class Job:
    """What is to be trained: fold numbers, epochs of each, hours of an epoch and of a fold's out-of-fold prediction at
    its end.
    """

    folds: tuple[int, ...]
    epochs: int
    epoch_h: float
    last_h: float


@dataclass(frozen=True)
class Terms:
    """What a session may be: hours at most, hours before its first epoch and after its last, GPUs side by side."""

    limit_h: float = SESSION_HOURS
    overhead_h: float = 0.2
    gpus: int = 2


@dataclass(frozen=True)
class Part:
    """A stretch of one fold in one session: epochs `first` to `last` (from 1; none when last < first), then out of fold
    if `finishes`.
    """

    fold: int
    gpu: int
    first: int
    last: int
    finishes: bool
    hours: float


@dataclass(frozen=True)
class Session:
    """One session.

    `starts`: the earliest moment; `waits`: only after the quota has come back; `limit_h`: what to give as --hours.
    """

    parts: tuple[Part, ...]
    hours: float
    limit_h: float
    starts: datetime
    waits: bool


@dataclass
class _Fold:
    number: int
    done: int = 0
    finished: bool = False


@dataclass
class _Lane:
    gpu: int
    clock: float
    parts: list[Part] = field(default_factory=list)


def lay_out(job: Job, budget: Budget | None, terms: Terms, now: datetime) -> list[Session]:
    """The sessions of a job, in order; `budget` None: no quota counts (a CPU).

    The rest of a week's quota is used for a shorter session where that session would train for at least as long as it
    starts up, or end the job. A session counts for the week in which it starts. Raises PublishError when an epoch is
    longer than a session.
    """
    folds, sessions, clock = [_Fold(number) for number in job.folds], [], now
    left = math.inf if budget is None else budget.left_h
    weekly = math.inf if budget is None else budget.weekly_h
    refresh = None if budget is None else budget.refresh
    waits = False
    while not all(fold.finished for fold in folds):
        while refresh is not None and clock >= refresh:
            left, refresh = weekly, refresh + WEEK
        limit = _tenths(min(terms.limit_h, left))
        trial = [_Fold(fold.number, fold.done, fold.finished) for fold in folds]
        parts, hours = _fill(trial, job, terms, limit)
        ends = all(fold.finished for fold in trial)
        if parts and (
            ends or limit >= _tenths(terms.limit_h) or limit >= _tenths(weekly) or hours >= 2 * terms.overhead_h
        ):
            sessions.append(Session(tuple(parts), hours, limit, clock, waits))
            folds, left, clock, waits = trial, left - hours, clock + timedelta(hours=hours), False
            continue
        if refresh is None or limit >= _tenths(min(terms.limit_h, weekly)):
            raise PublishError(
                f"a session of {limit:g} h with {terms.overhead_h:.2f} h of start-up is too short for an epoch of"
                f" {job.epoch_h:.2f} h or an out-of-fold prediction of {job.last_h:.2f} h; lower"
                " training.samples_per_epoch, or plan longer sessions with --hours"
            )
        clock, waits = refresh, True
    return sessions


def gpu_hours(sessions: Sequence[Session]) -> float:
    """What sessions cost of the quota: their wall clock."""
    return sum(session.hours for session in sessions)


def _fill(folds: list[_Fold], job: Job, terms: Terms, limit: float) -> tuple[list[Part], float]:
    """One session: every GPU takes the next unfinished fold until its time is up. Marks what is done in `folds`."""
    lanes = [_Lane(gpu, terms.overhead_h) for gpu in range(terms.gpus)]
    for fold in (fold for fold in folds if not fold.finished):
        lane = min(lanes, key=lambda lane: lane.clock)
        part = _stretch(fold, lane, job, limit)
        if part is not None:
            lane.parts.append(part)
            lane.clock += part.hours
    parts = [part for lane in lanes for part in lane.parts]
    return parts, max((lane.clock for lane in lanes if lane.parts), default=0.0)


def _stretch(fold: _Fold, lane: _Lane, job: Job, limit: float) -> Part | None:
    """As much of a fold as fits a lane; None when nothing does."""
    left = limit - lane.clock
    epochs = min(job.epochs - fold.done, max(0, math.floor(left / job.epoch_h + 1e-9)))
    hours = epochs * job.epoch_h
    finishes = fold.done + epochs == job.epochs and hours + job.last_h <= left + 1e-9
    if not epochs and not finishes:
        return None
    part = Part(
        fold.number, lane.gpu, fold.done + 1, fold.done + epochs, finishes, hours + (job.last_h if finishes else 0.0)
    )
    fold.done, fold.finished = fold.done + epochs, finishes
    return part


def _tenths(hours: float) -> float:
    """Hours as they are given to --hours: one digit, rounded down."""
    return hours if math.isinf(hours) else max(0.0, math.floor(hours * 10 + 1e-6) / 10)
