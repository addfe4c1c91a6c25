"""Three stages side by side: while item n is on the device, n + 1 is read and n - 1 is finished.

One thread reads, one finishes, and each device has a loop: the caller's own thread where there is one device (so Ctrl-C
reaches the network), a thread each where there are several. Between the stages is room for one item, so memory does not
depend on the number of items. Reading and finishing spend their time in OpenCV, numpy and zlib, which let go of
Python's lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
W = TypeVar("W")
F = TypeVar("F")
GRACE_S = 10.0  # how long a run that fails waits for its threads; a device may be in the middle of a long slide


class _Closed(Exception):
    """Nothing more will come, or nothing more is wanted."""


@dataclass(frozen=True)
class _Fault:
    """What a stage raised instead of a value; it travels on in the item's place."""

    error: Exception


class _Room(Generic[T]):
    """Room for one thing on its way from one thread to another.

    `queue.Queue` can be shut down from Python 3.13 on only.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._things: list[T] = []
        self._ended = self._stopped = False

    def wait_until_free(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._things)
            if self._stopped:
                raise _Closed

    def put(self, thing: T) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._things)
            if self._stopped:
                raise _Closed
            self._things.append(thing)
            self._changed.notify_all()

    def get(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._ended or self._things)
            if self._stopped or not self._things:
                raise _Closed
            self._changed.notify_all()
            return self._things.pop()

    def end(self) -> None:
        """Nothing will be put any more; what is there can still be taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Whoever waits, or comes, goes home."""
        with self._changed:
            self._stopped = True
            self._things.clear()
            self._changed.notify_all()


def run(
    items: Sequence[T],
    read: Callable[[T], R],
    work: Sequence[Callable[[T, R], W]],
    finish: Callable[[T, W], F],
    done: Callable[[T, F | Exception], None],
) -> None:
    """Take every item through `read`, one of `work` (one a device) and `finish`; hand `done` its result, or what it
    raised, in order.

    `done` decides what a fault means: when it raises, that ends the run, at the latest when each device is through with
    the item it has begun. So does any exception that is no `Exception`, such as Ctrl-C.
    """
    _Line(items, read, work, finish, done).run()


class _Line(Generic[T, R, W, F]):
    def __init__(
        self,
        items: Sequence[T],
        read: Callable[[T], R],
        work: Sequence[Callable[[T, R], W]],
        finish: Callable[[T, W], F],
        done: Callable[[T, F | Exception], None],
    ) -> None:
        self._items, self._read, self._work, self._finish, self._done = items, read, work, finish, done
        self._before: _Room[tuple[int, Any]] = _Room()
        self._behind: _Room[tuple[int, Any]] = _Room()
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def run(self) -> None:
        try:
            self._begin("read", self._read_all)
            self._begin("finish", self._finish_all)
            if len(self._work) == 1:
                self._work_all(self._work[0])
            else:
                for place, work in enumerate(self._work):
                    self._begin(f"device {place}", self._work_all, work)
            reader, writer, *devices = self._threads
            for thread in (reader, *devices):
                thread.join()
            self._behind.end()
            writer.join()
        except BaseException as error:
            self._stop(error)
        if self._error is not None:
            deadline = time.monotonic() + GRACE_S
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            raise self._error

    def _begin(self, name: str, target: Callable[..., None], *arguments: Any) -> None:
        def guarded() -> None:
            try:
                target(*arguments)
            except BaseException as error:
                self._stop(error)

        # A daemon: a thread deep in a network must not keep a process alive that has failed.
        thread = threading.Thread(target=guarded, name=f"hubmap {name}", daemon=True)
        thread.start()
        self._threads.append(thread)

    def _stop(self, error: BaseException) -> None:
        self._error = self._error or error
        self._before.stop()
        self._behind.stop()

    def _read_all(self) -> None:
        try:
            for place, item in enumerate(self._items):
                self._before.wait_until_free()  # before reading, so that no more than one item is ahead
                self._before.put((place, _tried(self._read, item)))
            self._before.end()
        except _Closed:
            return

    def _work_all(self, work: Callable[[T, R], W]) -> None:
        try:
            while True:
                self._behind.put(self._worked(work))
        except _Closed:
            return

    def _worked(self, work: Callable[[T, R], W]) -> tuple[int, Any]:
        # A function of its own: what was read is let go when it returns, before the loop waits.
        place, value = self._before.get()
        return place, value if isinstance(value, _Fault) else _tried(work, self._items[place], value)

    def _finish_all(self) -> None:
        early: dict[int, Any] = {}  # finished before its turn; only with several devices
        turn = 0
        try:
            while True:
                place, result = self._finished()
                early[place] = result
                while turn in early:
                    result = early.pop(turn)
                    self._done(self._items[turn], result.error if isinstance(result, _Fault) else result)
                    turn += 1
        except _Closed:
            return

    def _finished(self) -> tuple[int, Any]:
        place, value = self._behind.get()
        return place, value if isinstance(value, _Fault) else _tried(self._finish, self._items[place], value)


def _tried(function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return function(*arguments)
    except Exception as error:
        return _Fault(error)
