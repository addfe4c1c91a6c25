"""What Kaggle answers, as sentences: by the HTTP status, never by the text, and without addresses, which may be signed."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO

import requests

from hubmap_kit.errors import HubmapError, PublishError

log = logging.getLogger(__name__)
_ADDRESS = re.compile(r"https?://\S+|(?<=url: )\S+")
SIGNING_IN = "signing in"
TOKEN_HELP = (
    "make a token at https://www.kaggle.com/settings/api and set KAGGLE_API_TOKEN to it, or save it in ~/.kaggle/access_token "
    "(chmod 600), then run this again"
)
_ADVICE = {
    400: "mend what it names, then run this again",
    403: "check that it belongs to this account, that the account's phone is verified and that it has accepted the competition's rules",
    404: "it does not exist or this account may not see it; check its name and owner",
    409: "something else has that name or is being changed right now; look at it on the site, then run this again",
}


class KaggleRefusal(PublishError):
    """Kaggle understood the request and said no; `status` is the HTTP status (4xx)."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class KaggleUnavailable(PublishError):
    """Nothing wrong with the request: no network, too many requests, or a fault on Kaggle's side. `wait_s`: what Kaggle asked to wait."""

    def __init__(self, sentence: str, wait_s: float | None = None) -> None:
        super().__init__(sentence)
        self.wait_s = wait_s


@contextmanager
def sentences(what: str) -> Iterator[None]:
    """Run calls of the kaggle package: its prints go to the log, its failures and exits become PublishErrors that name `what`.

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
    except (requests.RequestException, ConnectionError, TimeoutError) as error:
        raise unreachable(what, error) from None
    except SystemExit as error:
        raise PublishError(f"the kaggle package gave up at {what} (exit code {error.code}); the log with -v says what it printed") from error
    except OSError:
        raise  # a file of this machine: the path and the reason are in it
    except Exception as error:  # the package's own checks raise anything from ValueError to KeyError
        kind = type(error).__name__
        if what == SIGNING_IN:
            raise PublishError(f"the kaggle package failed at {what} ({kind}); {TOKEN_HELP}") from None  # its text may hold the token
        words = _ADDRESS.sub("an address", str(error))
        raise PublishError(f"the kaggle package failed at {what} ({kind}: {words}); mend what it names, then run this again") from None
    finally:
        for line in filter(None, map(str.strip, printed.getvalue().splitlines())):
            log.log(logging.WARNING if line.startswith("Warning") else logging.DEBUG, "kaggle: %s", _ADDRESS.sub("an address", line))


def unreachable(what: str, error: BaseException) -> KaggleUnavailable:
    """A connection that could not be made, broke off or timed out. The error's own text may hold a signed address and is left out."""
    kind = type(error).__name__
    return KaggleUnavailable(f"Kaggle could not be reached for {what} ({kind}); check the network and any proxy, then run this again")


def status_of(error: requests.HTTPError) -> int:
    """The HTTP status, or the code in the body of an error that came as a success."""
    response = error.response
    if response is None:
        return 0
    return response.status_code if response.status_code >= 400 else int(_body(response).get("code", response.status_code))


def answered(what: str, status: int, words: str, wait_s: float | None = None) -> PublishError:
    """The error for an HTTP status of 400 or more."""
    said = f"HTTP {status}" + (f": {words.rstrip('.')}" if words else "")
    if status == 401:
        return KaggleRefusal(f"Kaggle does not accept the credentials ({said}); {TOKEN_HELP}", status)
    if status == 429:
        pause = f"{wait_s:.0f} s" if wait_s else "some minutes"
        return KaggleUnavailable(f"Kaggle takes no more requests for now ({what}, {said}); wait {pause}, then run this again", wait_s)
    if status >= 500:
        return KaggleUnavailable(f"Kaggle failed at {what} ({said}); the fault is on its side, wait some minutes, then run this again", wait_s)
    return KaggleRefusal(f"Kaggle refused {what} ({said}); {_ADVICE.get(status, _ADVICE[400])}", status)


def _answered(what: str, error: requests.HTTPError) -> PublishError:
    response = error.response
    if response is None:
        return unreachable(what, error)
    words = str(_body(response).get("message") or response.reason or "")
    return answered(what, status_of(error), " ".join(words.split())[:300], _seconds(response.headers.get("Retry-After")))


def _body(response: requests.Response) -> dict[str, object]:
    try:
        body = response.json()
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}


def _seconds(text: str | None) -> float | None:
    # The header may hold a date as well; the advice then is to wait some minutes.
    try:
        return max(0.0, float(text)) if text else None
    except ValueError:
        return None
