"""Kaggle as publishing needs it: the one door to the kaggle package (2.2.4 or 2.2.5), which is called in this process.

Answers are typed, every failure is a PublishError of one sentence, and what the package swallows or only prints is
looked at: files without an upload token, sources that were not attached, a title that leads to another address. Seen
against a stand-in server; the answers of Kaggle itself are known from its client's source and from reports.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from hubmap_kit.publish.answers import Answer, AnswerLost, KaggleRefusal, KaggleUnavailable
from hubmap_kit.publish.dataset_calls import DatasetCalls, DatasetState
from hubmap_kit.publish.kernel_calls import KernelCalls, KernelFacts, KernelPush, KernelStatus, SessionsBusy
from hubmap_kit.publish.session import one_line

__all__ = [
    "AnswerLost",
    "DatasetState",
    "Kaggle",
    "KaggleRefusal",
    "KaggleUnavailable",
    "KernelFacts",
    "KernelPush",
    "KernelStatus",
    "Listed",
    "Quota",
    "SessionsBusy",
    "Submission",
]


@dataclass(frozen=True)
class Quota:
    """GPU hours of this week, and when the week starts anew; None for what Kaggle does not tell in a form that can be
    read.
    """

    gpu_used_h: float | None
    gpu_total_h: float | None
    refresh: datetime | None


@dataclass(frozen=True)
class Submission:
    """`status`: PENDING, COMPLETE or ERROR.

    Scores are None until there are any. `said` is Kaggle's own word for the status.
    """

    status: str
    public_score: float | None
    private_score: float | None
    error: str
    said: str = ""


@dataclass(frozen=True)
class Listed:
    """A submission in Kaggle's list: its number and message, and when it was made; None for what cannot be read."""

    ref: int | None
    message: str | None
    date: datetime | None


class Kaggle(DatasetCalls, KernelCalls):
    """A signed-in account: `with Kaggle() as kaggle: kaggle.dataset("hubmap-kit-code")`."""

    def quota(self) -> Quota:
        """GPU hours used and allowed this week."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetAcceleratorQuotaStatisticsRequest

        request = ApiGetAcceleratorQuotaStatisticsRequest()
        answer = self.ask(
            "the GPU quota", lambda sdk: sdk.kernels.kernels_api_client.get_accelerator_quota_statistics(request)
        )
        spans = answer.part("gpuQuota")
        # A duration of zero may be left out.
        used, total = (spans.seconds(name) if spans.has(name) else 0.0 for name in ("timeUsed", "totalTimeAllowed"))
        return Quota(
            *(None if span is None else span / 3600 for span in (used, total)), answer.moment("quotaRefreshTime")
        )

    def submit_code(self, competition: str, kernel_ref: str, version: int, file: str, message: str) -> int:
        """Submit a kernel version's output file to a code competition; returns the submission's number.

        Raises AnswerLost where the submission may have been taken, KaggleRefusal where it was not.
        """
        what = f"the submission of {kernel_ref} version {version}"
        answer = self._fields(
            what, lambda: self.api.competition_submit_code(file, message, competition, kernel_ref, version, quiet=True)
        )
        number = answer.number("ref")
        if not number:
            said = one_line(answer.text("message")) or "no message"
            raise AnswerLost(f"Kaggle's answer to {what} has no number ({said})")
        return number

    def submission(self, ref: int) -> Submission:
        """The state of a submission. One whose status is none that is known is pending, unless it has a score."""
        from kagglesdk.competitions.types.competition_api_service import ApiGetSubmissionRequest

        request = ApiGetSubmissionRequest()
        request.ref = ref
        answer = self.ask(
            f"submission {ref}", lambda sdk: sdk.competitions.competition_api_client.get_submission(request)
        )
        said, public, private = answer.word("status"), answer.decimal("publicScore"), answer.decimal("privateScore")
        scored = "PENDING" if public is None else "COMPLETE"
        status = said if said in ("PENDING", "COMPLETE", "ERROR") else scored
        return Submission(status, public, private, one_line(answer.text("errorDescription")), said)

    def submissions(self, competition: str) -> list[Listed]:
        """The account's submissions. That later ones have higher numbers is assumed, not seen on Kaggle."""
        from kagglesdk.competitions.types.competition_api_service import ApiListSubmissionsRequest

        def ask(sdk: Any, token: str) -> Any:
            request = ApiListSubmissionsRequest()
            request.competition_name, request.page_token, request.page_size = competition, token, 100
            return sdk.competitions.competition_api_client.list_submissions(request)

        def read(pages: Iterator[Answer]) -> Iterator[Listed]:
            for one in (one for page in pages for one in page.parts("submissions")):
                yield Listed(
                    one.number("ref") or None,
                    one.text("description") if one.has("description") else None,
                    one.moment("date"),
                )

        return list(read(self.pages("the list of submissions", ask)))

    def submission_limits(self, competition: str) -> dict[str, int]:
        """Submissions made today (today), in all (total), and left today (left).

        Raises KaggleRefusal and KaggleUnavailable.
        """
        from kagglesdk.competitions.types.competition_api_service import ApiGetSubmissionLimitsRequest

        request = ApiGetSubmissionLimitsRequest()
        request.competition_name = competition
        answer = self.ask(
            "the submission limits", lambda sdk: sdk.competitions.competition_api_client.get_submission_limits(request)
        )
        names = {"today": "numToday", "total": "numTotal", "left": "numAllowedNow"}
        return {key: answer.number(name) or 0 for key, name in names.items()}
