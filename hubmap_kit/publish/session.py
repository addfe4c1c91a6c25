"""A signed-in session with Kaggle, on which the calls for datasets and kernels stand."""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from hubmap_kit.errors import PublishError
from hubmap_kit.publish.answers import SIGNING_IN, TOKEN_HELP, Answer, KaggleRefusal, sentences
from hubmap_kit.publish.root import PROD, place

# Signing in to Kaggle with what the user has: a token, a kaggle.json, or `kaggle auth login`.

log = logging.getLogger(__name__)
TOKEN_PREFIX = "KGAT_"
INSTALL_HELP = "run scripts/push.sh, which installs it, or: pip install -e '.[push]'"


def sign_in(pause_s: float) -> Any:  # the class comes with the lazy import
    """A signed-in client.

    Raises PublishError without credentials, on refused ones, and where the package is not installed.
    """
    if place() not in (PROD, "LOCALHOST"):
        # The package knows two places only, and sends what is meant for any other to the real Kaggle.
        raise PublishError(
            f"KAGGLE_API_ENVIRONMENT is '{place()}'; the kaggle package knows PROD and LOCALHOST only, unset it or"
            " correct it"
        )
    try:
        from hubmap_kit.publish.api import Api
    except ImportError as error:
        raise PublishError(f"the kaggle package cannot be imported ({error}); {INSTALL_HELP}") from error
    from kagglesdk.kaggle_env import get_access_token_from_env

    api, misplaced = Api(pause_s), False
    token, source = get_access_token_from_env()
    if not token:
        token, source = _token_as_key(api)
        misplaced = token is not None
    if token and (not token.isprintable() or " " in token):
        # An HTTP header cannot hold it, and the refusal of the header would show it.
        raise PublishError(
            f"{_named(source)} holds a blank or a line break; store the token alone, without a line break after it"
        )
    try:
        with _token_in_environment(token if misplaced else None):
            api.read(SIGNING_IN, api.authenticate)
    except KaggleRefusal as error:
        raise PublishError(f"Kaggle does not accept {_named(source)} (HTTP {error.status}); {TOKEN_HELP}") from error
    except PublishError as error:
        if not isinstance(error.__cause__, SystemExit):
            raise
        if token:
            raise PublishError(f"Kaggle does not accept {_named(source)}; {TOKEN_HELP}") from error
        if os.path.isfile(api.config):
            raise PublishError(f"{api.config} holds no username and key that can be read; {TOKEN_HELP}") from error
        raise PublishError(
            f"no Kaggle credentials were found (KAGGLE_API_TOKEN, ~/.kaggle/access_token, kaggle.json); {TOKEN_HELP}"
        ) from error
    # The package goes on with kaggle.json when a token is refused, which may be another account's.
    if token and api.config_values.get(api.CONFIG_NAME_TOKEN) != token:
        instead = "" if misplaced else ", or unset it to use kaggle.json"
        raise PublishError(f"Kaggle does not accept {_named(source)}; {TOKEN_HELP}{instead}")
    if not api.config_values.get(api.CONFIG_NAME_USER):
        raise PublishError(f"the Kaggle credentials name no account; {TOKEN_HELP}")
    return api


def _token_as_key(api: Any) -> tuple[str | None, str | None]:
    """An access token that stands where the old key of name and key belongs, and where that is.

    Kaggle refuses it as a key.
    """
    with sentences(SIGNING_IN):
        values = api.read_config_environment(api.read_config_file(quiet=True))
        key = str(values.get(api.CONFIG_NAME_KEY) or "").strip()
    if not key.startswith(TOKEN_PREFIX):
        return None, None
    source = "KAGGLE_KEY" if "KAGGLE_KEY" in os.environ else api.config
    log.info(
        "the key in %s is an access token and is used as one; KAGGLE_API_TOKEN or ~/.kaggle/access_token is the place"
        " for it",
        source,
    )
    return key, source


@contextmanager
def _token_in_environment(token: str | None) -> Iterator[None]:
    """The package takes a token from the environment or from a file of its own only.

    It is there no longer than the signing in takes.
    """
    if token:
        os.environ["KAGGLE_API_TOKEN"] = token
    try:
        yield
    finally:
        if token:
            del os.environ["KAGGLE_API_TOKEN"]


def _named(source: str | None) -> str:
    if source == "KAGGLE_API_TOKEN" and os.path.exists(os.environ.get(source, "")):
        return "the token in the file that KAGGLE_API_TOKEN names"
    return {None: "the credentials", "access_token": "the token in ~/.kaggle/access_token"}.get(
        source, f"the token in {source}"
    )


MOST_PAGES = 100  # of a list: thousands of files


class Session:
    """A signed-in account, used as a context manager.

    `owner` is its name. `pause_s`: first wait before a failed read is tried again.
    """

    owner: str

    def __init__(self, pause_s: float = 2.0) -> None:
        self._pause_s = pause_s

    def __enter__(self) -> Self:
        # Also keeps one push from "resuming" the half-sent files of another.
        self.scratch = tempfile.TemporaryDirectory(prefix="hubmap-kaggle-")
        try:
            self.api = sign_in(self._pause_s)
        except BaseException:
            self.scratch.cleanup()
            raise
        self.owner = str(self.api.config_values[self.api.CONFIG_NAME_USER])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.scratch.cleanup()

    def ask(self, what: str, call: Callable[[Any], Any]) -> Answer:
        """The answer to one call of the SDK beneath the package, which spoils some answers.

        Raises KaggleRefusal and KaggleUnavailable.
        """
        from hubmap_kit.publish.api import answer_of

        def asked() -> Answer:
            with self.api.build_kaggle_client() as sdk:
                return answer_of(call(sdk))

        return self.api.read(what, asked)

    def ask_if_shown(self, what: str, call: Callable[[Any], Any]) -> Answer | None:
        """The answer to a call; None where Kaggle refuses it, as it does, with 400, 403 or 404, for what is absent or
        still being made.
        """
        try:
            return self.ask(what, call)
        except KaggleRefusal as error:
            if error.status == 401:
                raise
            log.debug("%s", error)
            return None

    def pages(self, what: str, call: Callable[[Any, str], Any]) -> Iterator[Answer]:
        """The pages of a list, each asked for with the token of the one before. A list that never ends is cut."""
        before, token = Answer(), ""
        for number in range(1, MOST_PAGES + 1):
            page = self.ask(what, lambda sdk, at=token: call(sdk, at))  # type: ignore[misc]  # a default in a lambda
            if number > 1 and page.same(before, but_for="nextPageToken"):
                break
            yield page
            before, token = page, page.text("nextPageToken")
            if not token:
                return
        log.warning("%s does not end; what came in %d pages is taken for all of it", what, number)

    @contextmanager
    def private_temp(self) -> Iterator[None]:
        """Temporary files of the package go where this session ends."""
        # The package keeps the state of uploads, signed addresses among it, in the shared temporary folder.
        before = tempfile.tempdir
        tempfile.tempdir = self.scratch.name
        try:
            yield
        finally:
            tempfile.tempdir = before


def kernel_page(ref: str) -> str:
    """A kernel's address on the site; `ref` is owner/slug."""
    return f"https://www.kaggle.com/code/{ref}"


def dataset_page(ref: str) -> str:
    """A dataset's address on the site; `ref` is owner/slug."""
    return f"https://www.kaggle.com/datasets/{ref}"


def submissions_page(competition: str) -> str:
    """The address of the account's submissions to a competition."""
    return f"https://www.kaggle.com/competitions/{competition}/submissions"


def one_line(text: Any) -> str:
    """Words of the server without line breaks and without their full stop, to stand inside a sentence."""
    return " ".join(str(text or "").split()).rstrip(".")
