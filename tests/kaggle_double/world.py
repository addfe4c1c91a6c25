"""What the services of the double share: the state, the settings, the faults, and the ways to answer other than with
JSON.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from .state import State

COMPETITION = "hubmap-organ-segmentation"


class Refusal(Exception):
    """Answer with an HTTP error: `{"code": status, "message": message}`."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


class Silence(Exception):
    """Never answer: the client waits until it has enough."""


class Redirect(Exception):
    """Answer 302 to a path of the double, as Kaggle sends downloads to its storage."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass(frozen=True)
class Settings:
    """How long things take, in calls, and what the account has.

    hidden_calls: calls answered 403 after a dataset's creation. polls_until_ready: status calls of a new version before
    it is ready. polls_queued, polls_running: status calls that find a kernel so. polls_until_scored: status calls that
    find a submission pending. absent_status: the HTTP status for a dataset that does not exist (403 in new reports, 404
    in old ones). public_datasets: datasets of others that a kernel can attach.
    """

    hidden_calls: int = 1
    polls_until_ready: int = 1
    polls_queued: int = 1
    polls_running: int = 1
    polls_until_scored: int = 1
    absent_status: int = 403
    gpu_used_h: float = 1.0
    gpu_total_h: float = 30.0
    daily_limit: int = 5
    public_score: str = "0.61234"
    private_score: str = "0.59876"
    competitions: tuple[str, ...] = (COMPETITION,)
    public_datasets: tuple[str, ...] = ()


@dataclass
class World:
    """State, settings and faults of one running double."""

    owner: str
    state: State
    settings: Settings
    faults: frozenset[str]
    logs: dict[str, str] = field(default_factory=dict)
    outputs: dict[str, dict[str, bytes]] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def has(self, fault: str) -> bool:
        """Whether a fault is switched on."""
        return fault in self.faults

    def first(self, fault: str, times: int = 2) -> bool:
        """Whether a fault that passes is switched on and has still to strike; counts the strike."""
        if fault not in self.faults or self.counts.get(fault, 0) >= times:
            return False
        self.counts[fault] = self.counts.get(fault, 0) + 1
        return True

    def own(self, owner: str) -> None:
        """Refuse what belongs to another account."""
        if owner and owner != self.owner:
            raise Refusal(403, f"The account {self.owner} may not change what belongs to {owner}")


def now() -> str:
    """UTC in the form of Kaggle's JSON."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


Body = dict[str, Any]
