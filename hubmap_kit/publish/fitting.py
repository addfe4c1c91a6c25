"""Whether a training fits: its step into a card's memory, its epochs into so many weeks of quota; and what to change
where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from hubmap_kit.errors import PublishError
from hubmap_kit.publish.plan import WEEK, Session, gpu_hours

if TYPE_CHECKING:
    from hubmap_kit.config import Experiment, TrainingConfig
    from hubmap_kit.training.memory import StepMemory

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
