"""Laying a training out over Kaggle sessions and weeks, as the train kernel will run it: one session after the other,
each going on from the output of the one before, and in each the next fold for whichever GPU is free.

Kaggle counts the wall clock of a GPU session, start-up included, and once for a machine with two GPUs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from hubmap_kit.errors import PublishError, finding

if TYPE_CHECKING:
    from hubmap_kit.config import Experiment, TrainingConfig
    from hubmap_kit.publish.client import Kaggle
    from hubmap_kit.training.memory import StepMemory

SESSION_HOURS = 11.5  # what the train kernel allows itself of Kaggle's 12
WEEK = timedelta(days=7)
ASSUMED_HOURS = 30.0  # what accounts are reported to get a week
_SATURDAY = 5


@dataclass(frozen=True)
class Budget:
    """GPU hours left this week and allowed in a whole one, and when the next week begins (UTC).

    `assumed`: what of it is not Kaggle's, and why.
    """

    left_h: float
    weekly_h: float
    refresh: datetime
    assumed: str = ""


def read_budget(kaggle: Kaggle, now: datetime | None = None) -> Budget:
    """The account's budget. Where Kaggle does not tell it, the usual one is assumed."""
    now = now or datetime.now(UTC)
    try:
        found = kaggle.quota()
    except PublishError as error:
        return assumed_budget(now, finding(error))
    if not found.gpu_total_h or found.gpu_used_h is None:
        return assumed_budget(now, "Kaggle names no GPU quota that can be read")
    left = max(0.0, found.gpu_total_h - found.gpu_used_h)
    if found.refresh is None or not now <= found.refresh <= now + WEEK + timedelta(days=1):
        return Budget(
            left,
            found.gpu_total_h,
            assumed_budget(now).refresh,
            "the date is assumed: Kaggle names none that can be read",
        )
    return Budget(left, found.gpu_total_h, found.refresh)


def assumed_budget(now: datetime | None = None, why: str = "nobody asked Kaggle") -> Budget:
    """A full week of the usual quota that ends on the next Saturday at 00:00 UTC, as accounts are reported to have."""
    today = (now or datetime.now(UTC)).astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    days = (_SATURDAY - today.weekday()) % 7 or 7
    return Budget(ASSUMED_HOURS, ASSUMED_HOURS, today + timedelta(days=days), f"assumed, not read from Kaggle: {why}")


def budget_sentence(budget: Budget) -> str:
    """One line about a budget."""
    text = f"{budget.left_h:.1f} of {budget.weekly_h:.1f} GPU hours are left until {utc_words(budget.refresh)}"
    return f"{text} ({budget.assumed})" if budget.assumed else text


def session_fits(need_h: float, budget: Budget) -> bool:
    """Whether a session that may last `need_h` hours stays within what is left. A minute of rounding is forgiven."""
    return need_h <= budget.left_h + 1 / 60


def utc_words(moment: datetime) -> str:
    """A moment as people read it, in UTC."""
    return moment.astimezone(UTC).strftime("%a %d %b %H:%M UTC")


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


# Whether a training fits: its step into a card's memory, its epochs into so many weeks of quota; and what to change
# where it does not.

# GiB that a card of 16 GB leaves to programs, as the driver reports it. Neither was looked at on Kaggle by this kit.
CARDS = {"t4x2": ("T4", 14.7), "p100": ("P100", 15.9)}
MOST = 20  # times the planned epochs or iterations are looked at, not more
GIB = 2**30


def memory_lines(settings: Experiment, accelerator: str) -> list[str]:
    """What a training step takes of a card in each precision, and what to lower where it does not fit.

    Raises ConfigError.

    All of it is an ESTIMATE (`training.memory.step_memory`), and says so.
    """
    from hubmap_kit.report.tables import text_table
    from hubmap_kit.training.memory import step_memory

    training, half = settings.training, settings.training.precision in ("auto", "fp16")
    rows = [
        _row(name, is_half == half, step_memory(settings, is_half))
        for name, is_half in (("fp16", True), ("fp32", False))
    ]
    header = [
        "precision",
        "weights etc.",
        "kept",
        "gradients",
        "spare",
        "GiB",
        *(f"{name} {gib} GiB" for name, gib in CARDS.values()),
    ]
    title = (
        f"memory of a training step, {training.batch_size} x {settings.tiles.size} px, ESTIMATE, no card has run it:"
    )
    lines = [title, text_table(header, rows)]
    need, (card, gib) = step_memory(settings, half).total / GIB, CARDS[accelerator]
    if need > gib:
        precision = "fp16" if half else "fp32"
        lines.append(
            f"WARNING: {need:.1f} GiB in {precision} do not fit a {card} ({gib} GiB); {_lower(settings, half, gib)}"
        )
    return lines


def _row(name: str, chosen: bool, need: StepMemory) -> list[str]:
    parts = [f"{value / GIB:.1f}" for value in (need.weights, need.keeps, need.gradients, need.spare, need.total)]
    fits = ["fits" if need.total / GIB <= gib else "too much" for _, gib in CARDS.values()]
    return [f"{name}{' (chosen)' if chosen else ''}", *parts, *fits]


def _lower(settings: Experiment, half: bool, gib: float) -> str:
    """The change that should make a step fit a card, as --set words."""
    from hubmap_kit.training.memory import batch_that_fits, side_that_fits

    training = settings.training
    if batch := batch_that_fits(settings, half, gib):
        return (
            f"lower the batch: --set training.batch_size={batch} --set"
            f" training.accumulate={round(training.batch_size * training.accumulate / batch)}"
        )
    if not half and batch_that_fits(settings, True, gib):
        return "a tile fits in half precision: --set training.precision=fp16 --set training.batch_size=1"
    side = side_that_fits(settings, half, gib)
    if side >= 64:
        return (
            f"not even one tile does; choose a smaller encoder, or about --set tiles.size={side} --set"
            " training.batch_size=1"
        )
    return "its weights alone are too much; choose a smaller encoder"


def held(
    settings: Experiment, lay_out: Callable[[Experiment], Sequence[Session]], weeks: int, now: datetime, weekly_h: float
) -> str:
    """How much training `weeks` weeks of quota hold, beginning with a full one now: a sentence with the --set words.

    `lay_out` gives the sessions of an experiment under such a quota. The number of steps (`training.iterations`) is
    changed where the experiment counts these, else the epochs, and where not even one fits, the tiles of an epoch.
    """

    def fits(changed: Experiment) -> bool:
        try:
            return lay_out(changed)[-1].starts < now + weeks * WEEK
        except PublishError:
            return False  # an epoch is longer than a session

    key, planned, least = _counted(settings.training)
    number = _most(lambda number: fits(_with(settings, key, number)), least, MOST * planned)
    if not number and key == "epochs" and settings.training.sampler == "random":
        key, planned = "samples_per_epoch", 0
        number = _most(lambda number: fits(_with(settings, key, number)), settings.training.batch_size, 10**6)
    quota = f"{weeks} week{'s' if weeks > 1 else ''} of quota ({weeks * weekly_h:g} h)"
    if not number:
        return (
            f"{quota} hold not even training.{key}={least} of these folds; train fewer of them with --folds, or a"
            " smaller network"
        )
    number = _round(number, key)
    sessions = lay_out(_with(settings, key, number))
    told = f"{planned} are planned" if planned else f"with all {settings.training.epochs} epochs"
    return (
        f"{quota} hold{'s' if weeks == 1 else ''} up to --set training.{key}={number} ({told}):"
        f" {gpu_hours(sessions):.1f} h in {len(sessions)} session{'s' if len(sessions) > 1 else ''}, by the speed below"
    )


def _counted(training: TrainingConfig) -> tuple[str, int, int]:
    """What a training's length is counted in, how many are planned, and the least."""
    return (
        ("iterations", training.iterations, training.epochs) if training.iterations else ("epochs", training.epochs, 1)
    )


def _with(settings: Experiment, key: str, number: int) -> Experiment:
    return settings.model_copy(update={"training": settings.training.model_copy(update={key: number})})


def _most(fits: Callable[[int], bool], least: int, most: int) -> int:
    """The largest number from `least` to `most` that fits, 0 when none does; more never fits better."""
    if not fits(least):
        return 0
    good, bad = least, most + 1
    while bad - good > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def _round(number: int, key: str) -> int:
    """A large number of steps or tiles, rounded down to two digits, as exact as the estimate is."""
    if key == "epochs" or number < 100:
        return number
    step = 10 ** (len(str(number)) - 2)
    return number // step * step
