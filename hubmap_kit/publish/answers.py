"""What Kaggle answers: failures as sentences, by the HTTP status and without addresses, which may be signed; and the
fields of an answer.

Only what the server is sure to send decides. A field that is missing, null or of another form reads as nothing, never
as an error.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from http.client import HTTPException
from io import StringIO
from typing import Any

import requests
import urllib3

from hubmap_kit.errors import HubmapError, PublishError, finding

log = logging.getLogger(__name__)
_ADDRESS = re.compile(r"https?://\S+|(?<=url: )\S+")
SIGNING_IN = "signing in"
TOKEN_HELP = (
    "make a token at https://www.kaggle.com/settings/api and set KAGGLE_API_TOKEN to it, or save it in"
    " ~/.kaggle/access_token (chmod 600), then run this again"
)
_ADVICE = {
    400: "mend what it names, then run this again",
    403: (
        "check that it belongs to this account, that the account's phone is verified and that it has accepted the"
        " competition's rules"
    ),
    404: "it does not exist or this account may not see it; check its name and owner",
    409: "something else has that name or is being changed right now; look at it on the site, then run this again",
}


class KaggleRefusal(PublishError):
    """Kaggle understood the request and said no; `status` is the HTTP status (4xx)."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class KaggleUnavailable(PublishError):
    """Nothing wrong with the request: no network, too many requests, a fault on Kaggle's side, or an answer that cannot
    be read.

    `wait_s` is what Kaggle asked to wait. `turned_away`: the request was not looked at (too many requests).
    """

    def __init__(self, sentence: str, wait_s: float | None = None, turned_away: bool = False) -> None:
        super().__init__(sentence)
        self.wait_s, self.turned_away = wait_s, turned_away


class AnswerLost(PublishError):
    """A request that changes something was sent, and no answer says what became of it: it may have been carried out."""


class Unreadable(Exception):
    """An answer with HTTP 200 that holds no JSON object; its text says what it holds."""


class Answer:
    """The JSON object of an answer, read field by field; names are those of the API (`currentVersionNumber`), in any
    spelling.
    """

    def __init__(self, values: Any = None) -> None:
        self._values = {_spelling(name): value for name, value in values.items()} if isinstance(values, dict) else {}

    def has(self, name: str) -> bool:
        """Whether a field is there and not null."""
        return self._values.get(_spelling(name)) is not None

    def text(self, name: str) -> str:
        """A text, or a number as text; empty where there is none."""
        value = self._values.get(_spelling(name))
        return printable(str(value)) if isinstance(value, str | int | float) and not isinstance(value, bool) else ""

    def word(self, name: str) -> str:
        """The value of an enumeration in upper case and without the name of its type: CANCEL_ACKNOWLEDGED; empty where
        there is none.
        """
        text = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", self.text(name).strip())
        return re.sub(r".*STATUS[._]", "", re.sub(r"[\s-]+", "_", text).upper())

    def number(self, name: str) -> int | None:
        """A whole number that is not negative. int64 travels as a text."""
        found = re.fullmatch(r"\+?(\d{1,19})(\.0*)?", self.text(name).strip())
        return int(found[1]) if found else None

    def decimal(self, name: str) -> float | None:
        """A finite number, such as a score, which travels as a text."""
        with suppress(ValueError, OverflowError):
            return value if math.isfinite(value := float(self.text(name))) else None
        return None

    def flag(self, name: str) -> bool | None:
        """True or false where the answer says so; None where it does not."""
        value = self._values.get(_spelling(name))
        return {"true": True, "false": False}.get(str(value).lower()) if isinstance(value, bool | str) else None

    def moment(self, name: str) -> datetime | None:
        """A time stamp, in UTC; one without a zone means UTC."""
        text = self.text(name).strip()
        for parse in (datetime.fromisoformat, parsedate_to_datetime):
            with suppress(ValueError, OverflowError, TypeError):
                found = parse(text)
                return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
        return None

    def seconds(self, name: str) -> float | None:
        """A duration: `3600s`, `3600.5s`, a number, or an object with seconds and nanos."""
        if self.part(name).has("seconds"):
            return self.part(name).seconds("seconds")
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*s?\s*", self.text(name))
        return float(found[1]) if found else None

    def part(self, name: str) -> Answer:
        """An object inside this one; without fields where there is none."""
        return Answer(self._values.get(_spelling(name)))

    def parts(self, name: str) -> list[Answer]:
        """The objects of a list."""
        return [Answer(item) for item in self._list(name) if isinstance(item, dict)]

    def texts(self, name: str) -> list[str]:
        """The texts of a list that are not empty."""
        return [printable(item) for item in self._list(name) if isinstance(item, str) and item]

    def odd_list(self, name: str) -> bool:
        """Whether a field that should be a list of objects holds anything else."""
        value = self._values.get(_spelling(name))
        return value is not None and not (isinstance(value, list) and len(self.parts(name)) == len(value))

    def same(self, other: Answer, but_for: str) -> bool:
        """Whether two answers hold the same, one field apart."""
        first, second = (dict(answer._values) for answer in (self, other))
        for values in (first, second):
            values.pop(_spelling(but_for), None)
        return first == second

    def _list(self, name: str) -> list[Any]:
        value = self._values.get(_spelling(name))
        return value if isinstance(value, list) else []


def printable(text: str) -> str:
    """A text that can be written as UTF-8: escaped halves of a character are joined, single ones replaced."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _spelling(name: Any) -> str:
    return str(name).replace("_", "").lower()


@contextmanager
def a_check(force: bool) -> Iterator[None]:
    """A check of the kit's own: what it finds, a PublishError, stops the command; with `force` it is only a warning."""
    try:
        yield
    except PublishError as error:
        if not force:
            raise
        log.warning("%s; going on all the same, as --force asks", finding(error))


def check_private(what: str, private: bool | None, page: str, public: str) -> None:
    """Raise PublishError with the sentence `public` where others can see `what`; a warning where Kaggle does not say,
    with the `page` that shows it.
    """
    if private is False:
        raise PublishError(public)
    if private is None:
        log.warning("whether %s is private could not be checked, as Kaggle does not say; %s shows it", what, page)


def content_of(response: requests.Response) -> Any:
    """The JSON object of a response. Raises Unreadable where it holds none."""
    content = response.content
    try:
        values = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        kind = response.headers.get("Content-Type", "no type")
        raise Unreadable(f"HTTP {response.status_code}, {kind}, {len(content)} bytes that are no JSON object")
    return values


@contextmanager
def sentences(what: str) -> Iterator[None]:
    """Run calls of the kaggle package: its prints go to the log, its failures and exits become PublishErrors that name
    `what`.

    What requests raised is not kept as their cause: a traceback would show its text, and with it a signed address.
    """
    printed = StringIO()
    try:
        with redirect_stdout(printed):
            yield
    except HubmapError:
        raise
    except requests.HTTPError as error:
        raise _answered(what, error) from None
    except Unreadable as error:
        raise KaggleUnavailable(
            f"Kaggle's answer about {what} cannot be read ({error}); wait some minutes, then run this again"
        ) from None
    except (
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        HTTPException,
        ConnectionError,
        TimeoutError,
    ) as error:
        raise unreachable(what, error) from None
    except SystemExit as error:
        raise PublishError(
            f"the kaggle package gave up at {what} (exit code {error.code}); the log with -v says what it printed"
        ) from error
    except OSError:
        raise  # a file of this machine: the path and the reason are in it
    except Exception as error:  # the package's own checks raise anything from ValueError to KeyError
        kind = type(error).__name__
        if what == SIGNING_IN:
            raise PublishError(
                f"the kaggle package failed at {what} ({kind}); {TOKEN_HELP}"
            ) from None  # its text may hold the token
        words = _ADDRESS.sub("an address", str(error))
        raise PublishError(
            f"the kaggle package failed at {what} ({kind}: {words}); mend what it names, then run this again"
        ) from None
    finally:
        for line in filter(None, map(str.strip, printed.getvalue().splitlines())):
            log.log(
                logging.WARNING if line.startswith("Warning") else logging.DEBUG,
                "kaggle: %s",
                _ADDRESS.sub("an address", line),
            )


def unreachable(what: str, error: BaseException) -> KaggleUnavailable:
    """A connection that could not be made, broke off or timed out.

    The error's own text may hold a signed address and is left out.
    """
    kind = type(error).__name__
    return KaggleUnavailable(
        f"Kaggle could not be reached for {what} ({kind}); check the network and any proxy, then run this again"
    )


def status_of(error: requests.HTTPError) -> int:
    """The HTTP status, or the code in the body of an error that came as a success."""
    response = error.response
    if response is None:
        return 0
    return (
        response.status_code if response.status_code >= 400 else _body(response).number("code") or response.status_code
    )


def answered(what: str, status: int, words: str, wait_s: float | None = None) -> PublishError:
    """The error for an HTTP status of 400 or more."""
    said = f"HTTP {status}" + (f": {words.rstrip('.')}" if words else "")
    if status == 401:
        return KaggleRefusal(f"Kaggle does not accept the credentials ({said}); {TOKEN_HELP}", status)
    if status == 429:
        pause = f"{wait_s:.0f} s" if wait_s else "some minutes"
        return KaggleUnavailable(
            f"Kaggle takes no more requests for now ({what}, {said}); wait {pause}, then run this again",
            wait_s,
            turned_away=True,
        )
    if status >= 500 or status == 408:
        return KaggleUnavailable(
            f"Kaggle failed at {what} ({said}); the fault is on its side, wait some minutes, then run this again",
            wait_s,
        )
    return KaggleRefusal(f"Kaggle refused {what} ({said}); {_ADVICE.get(status, _ADVICE[400])}", status)


def _answered(what: str, error: requests.HTTPError) -> PublishError:
    response = error.response
    if response is None:
        return unreachable(what, error)
    words = _body(response).text("message") or response.reason or ""
    return answered(
        what, status_of(error), " ".join(words.split())[:300], _seconds(response.headers.get("Retry-After"))
    )


def _body(response: requests.Response) -> Answer:
    try:
        return Answer(content_of(response))
    except Unreadable:
        return Answer()


def _seconds(text: str | None) -> float | None:
    # The header may hold a date as well; the advice then is to wait some minutes.
    try:
        return max(0.0, seconds) if text and math.isfinite(seconds := float(text)) else None
    except ValueError:
        return None
