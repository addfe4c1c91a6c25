"""Progress bars that redraw in a terminal and print a line now and then in a log file (Kaggle keeps the log of a
kernel).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")
LOG_SECONDS = 10.0  # at most one progress line per bar in this time, so that a 9-hour log stays readable


class _LineBar(tqdm):
    """A tqdm bar for files: every refresh is a line of its own instead of a carriage return."""

    disable: bool
    _decr_instances: Any  # of tqdm, whose stubs lack it

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        def print_status(text: str) -> None:
            if text:
                file.write(text + "\n")
                file.flush()

        return print_status

    def close(self) -> None:
        # tqdm would repeat the last line and add an empty one.
        if not self.disable:
            self.disable = True
            self._decr_instances(self)


def bar(total: int | None, description: str, unit: str = "it", file: TextIO | None = None) -> tqdm:
    """A progress bar on standard error; call `update(n)` and `set_postfix_str`, and use it as a context manager."""
    file = file or sys.stderr
    common: dict[str, Any] = {"total": total, "desc": description, "unit": unit, "file": file}
    if file.isatty():
        return tqdm(**common, dynamic_ncols=True, leave=False)
    return _LineBar(
        **common,
        ncols=100,
        ascii=True,
        mininterval=LOG_SECONDS,
        maxinterval=LOG_SECONDS * 6,
        miniters=1,
        delay=LOG_SECONDS,
    )


def track(items: Iterable[T], description: str, unit: str = "it", total: int | None = None) -> Iterator[T]:
    """Iterate over `items` under a progress bar."""
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    with bar(total, description, unit) as progress:
        for item in items:
            yield item
            progress.update(1)
