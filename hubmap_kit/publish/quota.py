"""The week's GPU hours: how many are left, when they come back, and whether a session fits.

Kaggle counts the wall clock of a GPU session, start-up included, and once for a machine with two GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from hubmap_kit.errors import PublishError, finding

if TYPE_CHECKING:
    from hubmap_kit.publish.client import Kaggle

ASSUMED_HOURS = 30.0  # what accounts are reported to get a week
WEEK = timedelta(days=7)
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


def read(kaggle: Kaggle, now: datetime | None = None) -> Budget:
    """The account's budget. Where Kaggle does not tell it, the usual one is assumed."""
    now = now or datetime.now(UTC)
    try:
        found = kaggle.quota()
    except PublishError as error:
        return assumed(now, finding(error))
    if not found.gpu_total_h or found.gpu_used_h is None:
        return assumed(now, "Kaggle names no GPU quota that can be read")
    left = max(0.0, found.gpu_total_h - found.gpu_used_h)
    if found.refresh is None or not now <= found.refresh <= now + WEEK + timedelta(days=1):
        return Budget(
            left, found.gpu_total_h, assumed(now).refresh, "the date is assumed: Kaggle names none that can be read"
        )
    return Budget(left, found.gpu_total_h, found.refresh)


def assumed(now: datetime | None = None, why: str = "nobody asked Kaggle") -> Budget:
    """A full week of the usual quota that ends on the next Saturday at 00:00 UTC, as accounts are reported to have."""
    today = (now or datetime.now(UTC)).astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    days = (_SATURDAY - today.weekday()) % 7 or 7
    return Budget(ASSUMED_HOURS, ASSUMED_HOURS, today + timedelta(days=days), f"assumed, not read from Kaggle: {why}")


def sentence(budget: Budget) -> str:
    """One line about a budget."""
    text = f"{budget.left_h:.1f} of {budget.weekly_h:.1f} GPU hours are left until {when(budget.refresh)}"
    return f"{text} ({budget.assumed})" if budget.assumed else text


def fits(need_h: float, budget: Budget) -> bool:
    """Whether a session that may last `need_h` hours stays within what is left. A minute of rounding is forgiven."""
    return need_h <= budget.left_h + 1 / 60


def when(moment: datetime) -> str:
    """A moment as people read it, in UTC."""
    return moment.astimezone(UTC).strftime("%a %d %b %H:%M UTC")
