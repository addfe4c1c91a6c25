"""Kaggle as publishing needs it: the one door to the kaggle package (2.2.4 or 2.2.5), which is called in this process.

Answers are typed, every failure is a PublishError of one sentence, and what the package swallows or only prints is looked at: files without
an upload token, sources that were not attached, a title that leads to another address. Seen against a stand-in server; the answers of Kaggle
itself are known from its client's source and from reports.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hubmap_kit.errors import PublishError
from hubmap_kit.publish.answers import KaggleRefusal, KaggleUnavailable, sentences
from hubmap_kit.publish.dataset_calls import DatasetCalls, DatasetState
from hubmap_kit.publish.kernel_calls import KernelCalls, KernelPush, KernelStatus
from hubmap_kit.publish.session import one_line

__all__ = ["DatasetState", "Kaggle", "KaggleRefusal", "KaggleUnavailable", "KernelPush", "KernelStatus", "Quota", "Submission"]


@dataclass(frozen=True)
class Quota:
    """GPU hours of this week; `gpu_total_h` is 0 where Kaggle names none. `refresh`: when the week starts anew."""

    gpu_used_h: float
    gpu_total_h: float
    refresh: datetime | None


@dataclass(frozen=True)
class Submission:
    """`status`: PENDING, COMPLETE or ERROR. Scores are None until there are any."""

    status: str
    public_score: float | None
    private_score: float | None
    error: str


class Kaggle(DatasetCalls, KernelCalls):
    """A signed-in account: `with Kaggle() as kaggle: kaggle.dataset("hubmap-kit-code")`."""

    def quota(self) -> Quota:
        """GPU hours used and allowed this week."""
        answer = self.api.read("the GPU quota", self.api.quota_view)
        used, total = ((span.total_seconds() / 3600 if span else 0.0) for span in _spans(answer.gpu_quota))
        return Quota(used, total, answer.quota_refresh_time)

    def submit_code(self, competition: str, kernel_ref: str, version: int, file: str, message: str) -> int:
        """Submit a kernel version's output file to a code competition; returns the submission's number."""
        with sentences(f"the submission of {kernel_ref} version {version}"):
            answer = self.api.competition_submit_code(file, message, competition, kernel_ref, version, quiet=True)
        if not answer.ref:
            said = one_line(answer.message) or "no reason given"
            raise PublishError(f"Kaggle did not take the submission of {kernel_ref} version {version} ({said}); mend that, then submit again")
        return int(answer.ref)

    def submission(self, ref: int) -> Submission:
        """The state of a submission."""
        from kagglesdk.competitions.types.competition_api_service import ApiGetSubmissionRequest

        request = ApiGetSubmissionRequest()
        request.ref = ref
        answer = self.sdk(f"submission {ref}", lambda sdk: sdk.competitions.competition_api_client.get_submission(request))
        return Submission(answer.status.name.upper(), _score(answer.public_score), _score(answer.private_score), one_line(answer.error_description))

    def submissions(self, competition: str) -> list[tuple[int, str]]:
        """The account's latest submissions: number and message. That later ones have higher numbers is assumed, not seen on Kaggle."""
        found = self.api.read("the list of submissions", lambda: self.api.competition_submissions(competition)) or []
        return [(int(one.ref), str(one.description or "")) for one in found if one is not None]

    def submission_limits(self, competition: str) -> dict[str, Any] | None:
        """num_today, num_total, num_allowed_now and limited_by_total; None where Kaggle tells this account nothing (403, 404)."""
        try:
            answer = self.api.read("the submission limits", lambda: self.api.competition_get_submission_limits(competition))
        except KaggleRefusal as error:
            if error.status in (403, 404):
                return None
            raise
        return {name: getattr(answer, name) for name in ("num_today", "num_total", "num_allowed_now", "limited_by_total")}


def _spans(quota: Any) -> tuple[Any, Any]:
    return (quota.time_used, quota.total_time_allowed) if quota is not None else (None, None)


def _score(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError):
        return None
