"""Writing submission.csv as the slides come, so that hours of work survive a crash."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TextIO

from hubmap_kit.errors import SubmissionError

logger = logging.getLogger(__name__)

_CELL = re.compile(r"[0-9 ]*")
_NEEDS_QUOTES = re.compile(r"[,\"\r\n]")


class SubmissionWriter:
    """Writes `id,rle` rows in the order of `ids`, each exactly once, into `<name>.partial` beside `path`.

    Use it as a context manager. Every row is flushed at once. When the block ends well and every id came, the partial
    file is renamed to `path` in one step; otherwise it stays (its place is in the error or in the log) and `path` is
    left as it was. A new writer of the same path starts the partial file afresh. `check`, if given, is called with the
    complete partial file before it is renamed, and may raise.

    Raises SubmissionError for repeated ids, a row that is unknown, late or repeated, text that is no run-length string,
    and ids that never came.
    """

    def __init__(self, path: str | Path, ids: Sequence[str], check: Callable[[Path], object] | None = None) -> None:
        self.path = Path(path)
        self.partial = self.path.with_name(self.path.name + ".partial")
        self._ids, self._check = list(ids), check
        self._done = 0
        self._file: TextIO | None = None
        if len(set(self._ids)) != len(self._ids):
            twice = next(id for id in self._ids if self._ids.count(id) > 1)
            raise SubmissionError(
                f"{self.path} would hold the id {twice} twice, but every slide has one row; drop the repeats"
            )

    def __enter__(self) -> SubmissionWriter:
        if self.path.is_dir():
            raise SubmissionError(
                f"{self.path} is a folder, but the submission is a file; give a name such as"
                f" {self.path / 'submission.csv'}"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self.partial, "w", encoding="utf-8", newline="\n")
        self._done = 0
        self._write("id,rle\n")
        return self

    def add(self, id: str, rle: str) -> None:
        """Write the row of slide `id`; `rle` is column-major and 0-based, "" for an empty mask.

        The scorer wants starts above 0, so pixel (0, 0) is left out of the mask here.
        """
        if self._file is None:
            raise SubmissionError(
                f"{self.path} is not open, but a row for {id} came; add rows inside the writer's `with` block"
            )
        expected = self._ids[self._done] if self._done < len(self._ids) else None
        if id != expected:
            raise SubmissionError(
                f"{self.path} got a row for {id}, but {'no more rows were' if expected is None else f'{expected} was'}"
                " expected; add every id of the test table once and in its order"
            )
        if not isinstance(rle, str) or not _CELL.fullmatch(rle):
            raise SubmissionError(
                f"{self.path} got {str(rle)[:40]!r} as the mask of {id}, but a run-length string of digits and blanks"
                " was expected; encode the mask, and give an empty string for an empty one"
            )
        self._write(f"{_quoted(id)},{_without_first_pixel(rle)}\n")
        self._done += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._file is not None
        os.fsync(self._file.fileno())
        self._file.close()
        self._file = None
        if error is not None:
            rows = f"{self._done} of {len(self._ids)}"
            logger.warning("%s was not written; the %s rows so far are kept in %s", self.path, rows, self.partial)
            return
        missing = self._ids[self._done :]
        if missing:
            raise SubmissionError(
                f"{self.path} lacks {len(missing)} of {len(self._ids)} rows, the first is {missing[0]}; the rows so far"
                f" are kept in {self.partial}, add an empty mask for slides that fail"
            )
        if self._check is not None:
            self._check(self.partial)
        os.replace(self.partial, self.path)

    def _write(self, text: str) -> None:
        assert self._file is not None
        self._file.write(text)
        self._file.flush()


def _quoted(id: str) -> str:
    # By hand: with "\n" as its line end, the csv module of Python 3.11 leaves a "\r" without quotes.
    return '"' + id.replace('"', '""') + '"' if _NEEDS_QUOTES.search(id) else id


def _without_first_pixel(rle: str) -> str:
    words = rle.split(maxsplit=2)
    if len(words) < 2 or int(words[0]) != 0:
        return rle
    rest = words[2:]
    length = int(words[1]) - 1
    return " ".join([f"1 {length}", *rest] if length > 0 else rest)
