"""The week's GPU hours: how many are left, when they come back, and whether a session fits.

Kaggle counts the wall clock of a GPU session, start-up included, and once for a machine with two GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hubmap_kit.publish.client import Kaggle

ASSUMED_HOURS = 30.0  # what accounts are reported to get a week
_SATURDAY = 5


@dataclass(frozen=True)
class Budget:
    """GPU hours left this week and allowed in a whole one, and when the next week begins (UTC). `known`: Kaggle said so, nobody guessed."""

    left_h: float
    weekly_h: float
    refresh: datetime
    known: bool = True


def read(kaggle: Kaggle, now: datetime | None = None) -> Budget:
    """The account's budget. Where Kaggle names no quota or no date, the usual one is assumed and `known` is False."""
    found, usual = kaggle.quota(), assumed(now)
    if found.gpu_total_h <= 0:
        return usual
    refresh = _utc(found.refresh) if found.refresh is not None else usual.refresh
    return Budget(max(0.0, found.gpu_total_h - found.gpu_used_h), found.gpu_total_h, refresh, found.refresh is not None)


def assumed(now: datetime | None = None) -> Budget:
    """A full week of the usual quota that ends on the next Saturday at 00:00 UTC, as accounts are reported to have."""
    today = (now or datetime.now(timezone.utc)).astimezone(timezone.utc).replace(hour=0, minute=0, second=0, microsecond=0)
    days = (_SATURDAY - today.weekday()) % 7 or 7
    return Budget(ASSUMED_HOURS, ASSUMED_HOURS, today + timedelta(days=days), known=False)


def sentence(budget: Budget) -> str:
    """One line about a budget."""
    text = f"{budget.left_h:.1f} of {budget.weekly_h:.1f} GPU hours are left until {when(budget.refresh)}"
    return text if budget.known else f"{text} (assumed, not read from Kaggle)"


def fits(need_h: float, budget: Budget) -> bool:
    """Whether a session that may last `need_h` hours stays within what is left. A minute of rounding is forgiven."""
    return need_h <= budget.left_h + 1 / 60


def when(moment: datetime) -> str:
    """A moment as people read it, in UTC."""
    return _utc(moment).strftime("%a %d %b %H:%M UTC")


def _utc(moment: datetime) -> datetime:
    # The client's time stamps come without a zone and mean UTC.
    return moment.replace(tzinfo=timezone.utc) if moment.tzinfo is None else moment.astimezone(timezone.utc)
