"""Kaggle as publishing needs it: the one door to the kaggle package (2.2.4 or 2.2.5), which is called in this process.

Answers are typed, every failure is a PublishError of one sentence, and what the package swallows or only prints is
looked at: files without an upload token, sources that were not attached, a title that leads to another address. Seen
against a stand-in server; the answers of Kaggle itself are known from its client's source and from reports.
"""

from __future__ import annotations

import io
import logging
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from hubmap_kit.errors import PublishError
from hubmap_kit.files import atomic_path
from hubmap_kit.progress import bar
from hubmap_kit.publish.answers import Answer, AnswerLost, KaggleRefusal, KaggleUnavailable, sentences
from hubmap_kit.publish.kernel_calls import KernelCalls, KernelFacts, KernelPush, KernelStatus, SessionsBusy
from hubmap_kit.publish.session import Session, one_line

# Datasets of the account: state, files, creation, versions.

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetState:
    """`status` in lower case, such as ready, failed or blobs_received; empty where Kaggle does not tell.

    `version` is the current version's number, 0 where Kaggle names none; `private` is None where it does not say.
    """

    status: str
    version: int
    private: bool | None = None


class DatasetCalls(Session):
    """What the kit asks of datasets. Slugs are those of the account's own."""

    def dataset(self, slug: str) -> DatasetState | None:
        """The state of one's own dataset; None where Kaggle shows nothing of it, as of an absent one and of one being
        created.
        """
        from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest, ApiGetDatasetStatusRequest

        requests = ApiGetDatasetStatusRequest(), ApiGetDatasetRequest()
        for request in requests:
            request.owner_slug, request.dataset_slug = self.owner, slug
        failures: list[PublishError] = []

        def ask(call: Callable[[Any], Any]) -> Answer:
            try:
                return self.ask(f"the state of {slug}", call)
            except PublishError as error:
                failures.append(error)
                return Answer()

        state = ask(lambda sdk: sdk.datasets.dataset_api_client.get_dataset_status(requests[0]))
        facts = ask(lambda sdk: sdk.datasets.dataset_api_client.get_dataset(requests[1]))
        # One of the two is enough; and only two refusals say that it is not there.
        if len(failures) == 2 and all(isinstance(error, KaggleRefusal) and error.status != 401 for error in failures):
            return None
        if len(failures) == 2:
            raise next(error for error in failures if not isinstance(error, KaggleRefusal) or error.status == 401)
        return DatasetState(
            state.word("status").lower(), facts.number("currentVersionNumber") or 0, facts.flag("isPrivate")
        )

    def create_dataset(self, folder: Path) -> None:
        """Create the private dataset that the folder's dataset-metadata.json describes, with the folder's files.

        Raises AnswerLost where that may have been done, and another PublishError where Kaggle says no.
        """
        with self._uploading(folder):
            answer = self.api.dataset_create_new(str(folder), public=False, quiet=True)
        _taken(answer, f"the dataset of {folder}")

    def new_version(self, folder: Path, notes: str) -> None:
        """Replace the files of an existing dataset by the folder's.

        A version is complete in itself. Raises as create_dataset.
        """
        with self._uploading(folder):
            answer = self.api.dataset_create_version(str(folder), notes, quiet=True)
        _taken(answer, f"the new version of {folder}")

    def files(self, slug: str) -> list[str]:
        """Names of the files in the current version, sorted; empty where Kaggle lists none."""
        from kagglesdk.datasets.types.dataset_api_service import ApiListDatasetFilesRequest

        def ask(sdk: Any, token: str) -> Any:
            request = ApiListDatasetFilesRequest()
            request.owner_slug, request.dataset_slug, request.page_token, request.page_size = (
                self.owner,
                slug,
                token,
                100,
            )
            return sdk.datasets.dataset_api_client.list_dataset_files(request)

        found = (
            file.text("name")
            for page in self.pages(f"the list of files of {slug}", ask)
            for file in page.parts("datasetFiles")
        )
        return sorted(set(filter(None, found)))

    def download_file(self, slug: str, name: str, into: Path) -> Path:
        """Download one small file of the current version into a folder. Raises KaggleRefusal where there is none."""
        from kagglesdk.datasets.types.dataset_api_service import ApiDownloadDatasetRequest

        request = ApiDownloadDatasetRequest()
        request.owner_slug, request.dataset_slug, request.file_name = self.owner, slug, name

        def fetch() -> bytes:
            with (
                self.api.build_kaggle_client() as sdk,
                sdk.datasets.dataset_api_client.download_dataset(request) as response,
            ):
                return _unwrapped(response.content)

        content = self.api.read(f"{name} of {slug}", fetch)
        with atomic_path(into / name) as temporary:
            temporary.write_bytes(content)
        return into / name

    @contextmanager
    def _uploading(self, folder: Path) -> Iterator[None]:
        """One bar over the bytes of a folder's files."""
        total = sum(path.stat().st_size for path in folder.iterdir() if path.name != self.api.DATASET_METADATA_FILE)
        with bar(total, f"uploading {folder.name}", "B") as progress:
            progress.unit_scale, progress.unit_divisor = True, 1024
            self.api.progress = progress
            try:
                with self.private_temp(), sentences(f"the upload of {folder}"):
                    yield
            finally:
                self.api.progress = None


def _taken(answer: Any, what: str) -> None:
    """Raise PublishError where Kaggle says that it took nothing.

    Whatever is no error was taken: the wait that follows finds out.
    """
    from hubmap_kit.publish.api import answer_of

    fields = answer_of(answer)
    said, status = one_line(fields.text("error")), fields.word("status")
    if status in ("ERROR", "FAILED") or (said and not status):
        raise PublishError(f"Kaggle did not take {what} ({said or status.lower()}); mend that, then run this again")
    if status != "OK":
        log.info("Kaggle answers '%s' to %s, which is neither yes nor no; what it shows decides", status.lower(), what)


def _unwrapped(content: bytes) -> bytes:
    """The file itself: Kaggle sends large ones zipped."""
    if not content.startswith(b"PK\x03\x04"):
        return content
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read(archive.namelist()[0])


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
        seconds = [spans.seconds(name) if spans.has(name) else 0.0 for name in ("timeUsed", "totalTimeAllowed")]
        used, total = (None if span is None else span / 3600 for span in seconds)
        return Quota(used, total, answer.moment("quotaRefreshTime"))

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
            for page in pages:
                for one in page.parts("submissions"):
                    yield Listed(
                        one.number("ref") or None,
                        one.text("description") if one.has("description") else None,
                        one.moment("date"),
                    )
                if page.odd_list("submissions"):
                    yield Listed(None, None, None)  # something that cannot be read

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
