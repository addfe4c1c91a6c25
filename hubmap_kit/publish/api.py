"""The kaggle package's KaggleApi with limits: every request has a time-out, an upload that fails says so instead of
going on without its file, and nothing odd in an answer is an error.

Known of 2.2.4 and 2.2.5: the package sends requests without a time-out, tries a broken upload for up to an hour without
a word, raises anything from KeyError to AttributeError where an answer is not as it expects, and 2.2.4 makes a dataset
without the files whose upload was refused.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from tqdm.utils import CallbackIOWrapper

from hubmap_kit.errors import PublishError, finding
from hubmap_kit.publish.answers import (
    Answer,
    AnswerLost,
    KaggleRefusal,
    KaggleUnavailable,
    answered,
    content_of,
    sentences,
    unreachable,
)


@contextmanager
def _no_requests() -> Iterator[None]:
    """Whatever would be sent is refused at once."""

    def refuse(*_: Any, **__: Any) -> requests.Response:
        raise requests.ConnectionError

    real = HTTPAdapter.send
    HTTPAdapter.send = refuse  # type: ignore[method-assign]
    try:
        yield
    finally:
        HTTPAdapter.send = real  # type: ignore[method-assign]


# Importing the package signs in: with a token it asks the server, without a time-out, and where it cannot it prints a
# page of help.
with _no_requests(), redirect_stdout(StringIO()):
    from kaggle.api.kaggle_api_extended import KaggleApi
    from kaggle.models.kaggle_models_extended import ResumableUploadResult
    from kagglesdk.kaggle_object import KaggleObject

log = logging.getLogger(__name__)
TIMEOUT = (20, 300)  # seconds to connect, and without a byte
TRIES = 4  # of a read or of one file's upload
DENIED_TRIES = 6  # of a write that is denied although it was allowed a moment ago: 4 minutes


class TimedAdapter(HTTPAdapter):
    """Requests that name no time-out get one: a laptop that loses its network would wait for ever."""

    def send(
        self, request: Any, stream: bool = False, timeout: Any = None, *rest: Any, **named: Any
    ) -> requests.Response:
        """The response to a prepared request; `timeout` in seconds, TIMEOUT where it is missing or zero."""
        return super().send(request, stream, timeout or TIMEOUT, *rest, **named)


def timed_session() -> requests.Session:
    """A session whose requests have a time-out."""
    session = requests.Session()
    _mount(session)
    return session


def _mount(session: requests.Session) -> None:
    session.mount("http://", TimedAdapter())
    session.mount("https://", TimedAdapter())


def read_answer(kind: Any, response: requests.Response) -> Any:
    """What the SDK is to make of a response: its own type, filled as far as it can read the fields, with the JSON
    object as `raw`.

    Raises requests.HTTPError for a failure, also for one that comes as HTTP 200 with a code, and Unreadable. A download
    stays the response.
    """
    response.raise_for_status()
    if kind is None or kind.prepare_from.__func__ is not KaggleObject.prepare_from.__func__:
        return None if kind is None else kind.prepare_from(response)
    values = content_of(response)
    if (Answer(values).number("code") or 0) >= 400:
        raise requests.HTTPError(response=response)
    found = kind.from_dict({name: value for name, value in values.items() if _fits(kind, name, value)})
    object.__setattr__(found, "raw", values)
    return found


def _fits(kind: Any, name: str, value: Any) -> bool:
    try:
        kind.from_dict({name: value})
    except Exception as error:  # enumerations, dates and lists fail in many ways
        log.debug(
            "%s.%s of an answer is not what the kaggle package knows (%s)", kind.__name__, name, type(error).__name__
        )
        return False
    return True


def answer_of(found: Any) -> Answer:
    """The fields of what the SDK or the package returned."""
    raw = getattr(found, "raw", None)
    return Answer(found.to_dict() if raw is None else raw)


class Api(KaggleApi):
    """One signed-in client. `pause_s` is the first wait before another try; each next is three times as long."""

    # VERBOSE in the environment would make the package print every request with its Authorization header.
    args: ClassVar[list[str]] = [word for word in KaggleApi.args if word != "--verbose"]

    def __init__(self, pause_s: float) -> None:
        super().__init__()
        self.pause_s = pause_s
        self.progress: tqdm | None = None
        self._failures: dict[str, int] = {}
        self._successes = 0  # answers that say neither no nor later

    def build_kaggle_client(self) -> Any:
        """The SDK's client, its HTTP session with time-outs."""
        client = super().build_kaggle_client()
        http = client.http_client()
        http.__enter__()  # makes the session, which the first request would make otherwise
        session = getattr(http, "_session", None)
        if session is not None:
            _mount(session)
        http._prepare_response = self._read_answer
        return client

    def _read_answer(self, kind: Any, response: requests.Response) -> Any:
        found = read_answer(kind, response)
        self._successes += 1
        return found

    def with_retry(self, func: Callable[..., Any], *_: Any, **__: Any) -> Callable[..., Any]:
        """What the package tries again: here only the start of an upload, and what was denied.

        A dataset whose creation broke off may be there.
        """
        if getattr(func, "__name__", "") == "start_blob_upload":
            return lambda request: self.read(f"the start of the upload of {request.name}", lambda: func(request))
        return lambda request: self._insist(func.__name__.replace("_", " "), lambda: func(request))

    def write(self, what: str, call: Callable[[], Any]) -> Any:
        """A request that must not be repeated.

        Raises AnswerLost where it may have been carried out, KaggleRefusal where it was not.
        """
        before = self._successes
        try:
            with sentences(what):
                return call()
        except PublishError as error:
            # The package may also stumble over an answer that says that the request was carried out.
            if self._successes == before and (not isinstance(error, KaggleUnavailable) or error.turned_away):
                raise
            raise AnswerLost(finding(error)) from error

    def _insist(self, what: str, call: Callable[[], Any]) -> Any:
        """A write that may be denied for some minutes to the account whose dataset it is; what was denied was not
        carried out.
        """
        for attempt in range(DENIED_TRIES):
            try:
                return self.write(what, call)
            except KaggleRefusal as error:
                if error.status not in (403, 404) or attempt == DENIED_TRIES - 1:
                    raise
                self._pause(attempt, str(error))
        raise AssertionError

    def read(self, what: str, call: Callable[[], Any]) -> Any:
        """A request that may be repeated, tried again with growing waits while Kaggle is unavailable."""
        for attempt in range(TRIES):
            try:
                with sentences(what):
                    return call()
            except KaggleUnavailable as error:
                # A wait of minutes that Kaggle asks for is the user's to decide on.
                if attempt == TRIES - 1 or (error.wait_s or 0.0) > 60:
                    raise
                self._pause(attempt, str(error), error.wait_s)
        raise AssertionError

    def upload_files(self, request: Any, resources: Any, folder: str, *rest: Any, **named: Any) -> None:
        """Upload the files of a folder; PublishError unless every one of them got its token."""
        super().upload_files(request, resources, folder, *rest, **named)
        expected = [name for name in os.listdir(folder) if name != self.DATASET_METADATA_FILE]
        tokens = [file.token for file in request.files if file.token]
        if len(tokens) != len(expected):
            raise PublishError(
                f"{folder}: only {len(tokens)} of {len(expected)} files were uploaded; nothing was published, run this"
                " again"
            )

    def upload_complete(self, path: str, url: str, quiet: bool, resume: bool = False) -> int:
        """Send a file to the address that Kaggle gave for it.

        A broken connection is taken up again; a refusal raises PublishError.
        """
        name, start = os.path.basename(path), 0
        if not str(url).startswith("http"):
            raise KaggleUnavailable(
                f"Kaggle gave no address for the upload of {name}; nothing was published, run this again"
            )
        try:
            response = self._probe(Path(path), url) if resume else self._put(Path(path), url, 0)
            if resume and response.status_code == 308:
                start = self._first_missing(response, name)
                response = self._put(Path(path), url, start)
        except requests.RequestException as error:
            return self._again(path, unreachable(f"the upload of {name}", error))
        if response.status_code in (200, 201):
            return int(ResumableUploadResult.COMPLETE)
        if resume and response.status_code == 404:
            raise KaggleUnavailable(
                f"the upload of {name} broke off and cannot be taken up again; nothing was published, run this again"
            )
        if response.status_code >= 500 or response.status_code == 429:
            return self._again(path, answered(f"the upload of {name}", response.status_code, response.reason or ""))
        raise PublishError(
            f"the upload of {name} was refused (HTTP {response.status_code} {response.reason}); nothing was published,"
            " run this again, and if it stays so, look at the clock of this machine and at any proxy"
        )

    @staticmethod
    def _probe(path: Path, url: str) -> requests.Response:
        """Ask how much of a file has come: 200 for all, 308 with a Range for a part, 404 where the upload has
        expired.
        """
        with timed_session() as session:
            # 308 is no redirect here.
            return session.put(
                url, data=b"", headers={"Content-Range": f"bytes */{path.stat().st_size}"}, allow_redirects=False
            )

    @staticmethod
    def _first_missing(response: requests.Response, name: str) -> int:
        found = response.headers.get("Range")
        try:
            return int(found.rpartition("-")[2]) + 1 if found else 0
        except ValueError:
            raise KaggleUnavailable(
                f"Kaggle does not say how much of {name} it has; nothing was published, run this again"
            ) from None

    def _put(self, path: Path, url: str, start: int) -> requests.Response:
        size = path.stat().st_size
        headers = {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
        sent = 0

        def count(number: int) -> None:
            nonlocal sent
            sent += number
            if self.progress is not None:
                self.progress.update(number)

        with timed_session() as session, path.open("rb") as file:
            file.seek(start)
            try:
                response = session.put(
                    url, data=CallbackIOWrapper(count, file, "read") if size else b"", headers=headers
                )
            except requests.RequestException:
                count(-sent)
                raise
        if not response.ok:
            count(-sent)
        return response

    def _again(self, path: str, error: PublishError) -> int:
        attempt = self._failures.get(path, 0)
        self._failures[path] = attempt + 1
        if attempt == TRIES - 1:
            raise error from None
        self._pause(attempt, str(error))
        return int(ResumableUploadResult.INCOMPLETE)

    def _pause(self, attempt: int, why: str, wait_s: float | None = None) -> None:
        seconds = self.pause_s * 3**attempt if wait_s is None else wait_s
        log.warning("%s (trying again in %.1f s)", finding(why), seconds)
        time.sleep(seconds)
