"""A signed-in session with Kaggle, on which the calls for datasets and kernels stand."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

from hubmap_kit.publish.credentials import sign_in


class Session:
    """A signed-in account, used as a context manager. `owner` is its name. `pause_s`: first wait before a failed read is tried again."""

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

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.scratch.cleanup()

    def sdk(self, what: str, call: Callable[[Any], Any]) -> Any:
        """Call the SDK beneath the package, where the package spoils the answer."""

        def ask() -> Any:
            with self.api.build_kaggle_client() as sdk:
                return call(sdk)

        return self.api.read(what, ask)

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


def one_line(text: Any) -> str:
    """Words of the server without line breaks and without their full stop, to stand inside a sentence."""
    return " ".join(str(text or "").split()).rstrip(".")
