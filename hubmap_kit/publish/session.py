"""A signed-in session with Kaggle, on which the calls for datasets and kernels stand."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from hubmap_kit.publish.answers import Answer, KaggleRefusal
from hubmap_kit.publish.credentials import sign_in

log = logging.getLogger(__name__)
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
            page = self.ask(what, lambda sdk, at=token: call(sdk, at))
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
