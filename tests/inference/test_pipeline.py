"""The pipeline gives what a plain loop gives, in order, side by side, in bounded memory; and it ends whatever
happens.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.inference import pipeline

PATIENCE_S = 20.0  # how long a test waits for what must come at once


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    yield
    end = time.monotonic() + PATIENCE_S
    while left := [thread.name for thread in threading.enumerate() if thread.name.startswith("hubmap ")]:
        assert time.monotonic() < end, left
        time.sleep(0.01)


def run(items, read=None, work=None, finish=None, done=None, devices=1):
    """All stages with harmless defaults; returns what `done` got."""
    got = []
    pipeline.run(
        items,
        read or (lambda item: item),
        [work or (lambda item, value: value)] * devices,
        finish or (lambda item, value: value),
        done or (lambda item, result: got.append((item, result))),
    )
    return got


@settings(deadline=None, max_examples=40)
@given(
    count=st.integers(0, 12),
    devices=st.integers(1, 4),
    faults=st.dictionaries(st.integers(0, 11), st.sampled_from(["read", "work", "finish"]), max_size=5),
)
def test_every_item_comes_out_in_order_with_its_result_or_its_fault(
    count: int, devices: int, faults: dict[int, str]
) -> None:
    def stage(name, change):
        def take(item, value=None):
            if faults.get(item) == name:
                raise ValueError(f"{name} {item}")
            return change(item, value)

        return take

    got = run(
        range(count),
        stage("read", lambda item, _: item * 10),
        stage("work", lambda item, value: value + 1),
        stage("finish", lambda item, value: (item, value)),
        devices=devices,
    )
    assert [item for item, _ in got] == list(range(count))
    for item, result in got:
        if item in faults:
            assert isinstance(result, ValueError) and str(result) == f"{faults[item]} {item}"
        else:
            assert result == (item, item * 10 + 1)


def test_the_next_item_is_read_and_the_former_one_finished_while_one_is_on_the_device() -> None:
    read, worked = [threading.Event() for _ in range(4)], [threading.Event() for _ in range(4)]
    seen = []

    def work(item, value):
        worked[item].set()
        seen.append(item == 3 or read[item + 1].wait(PATIENCE_S))
        return value

    def finish(item, value):
        seen.append(item == 3 or worked[item + 1].wait(PATIENCE_S))
        return value

    run(range(4), lambda item: read[item].set(), work, finish)
    assert seen == [True] * 8


def test_two_devices_work_at_once_and_rows_keep_their_order() -> None:
    second_done = threading.Event()
    order = []

    def work(item, value):
        if item == 0:
            assert second_done.wait(PATIENCE_S)
        order.append(item)
        if item == 1:
            second_done.set()
        return value

    assert [item for item, _ in run(range(6), work=work, devices=2)] == list(range(6))
    assert order.index(1) < order.index(0)


@pytest.mark.parametrize("devices", [1, 2])
def test_few_items_are_in_memory_however_slow_a_stage_is(devices: int) -> None:
    lock, alive, most = threading.Lock(), [0], [0]

    def read(item):
        with lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        return item

    def finish(item, value):
        if item < 5:
            threading.Event().wait(0.01)  # the slowest stage, so that everything before it piles up as far as it can
        with lock:
            alive[0] -= 1

    run(range(40), read, finish=finish, devices=devices)
    assert alive[0] == 0 and most[0] <= devices + 4  # one each: read, before, behind, finished; and one a device


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("stage", ["read", "work", "finish"])
def test_a_fault_that_counts_ends_the_run_after_the_rows_before_it(stage: str, devices: int) -> None:
    rows, begun = [], []

    def fail(item, value=None):
        begun.append(item)
        if item == 7:
            raise ValueError(f"no {stage}")
        return value

    def done(item, result):
        if isinstance(result, Exception):
            raise result
        rows.append(item)

    with pytest.raises(ValueError, match=f"no {stage}"):
        run(range(10**6), **{stage: fail}, done=done, devices=devices)
    assert rows == list(range(7)) and len(begun) < 10**6


@pytest.mark.parametrize("devices", [1, 2])
def test_ctrl_c_ends_every_thread(devices: int) -> None:
    def work(item, value):
        if item == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return value

    with pytest.raises(KeyboardInterrupt):
        run(range(10**6), work=work, devices=devices)


def test_what_is_no_fault_of_an_item_ends_the_run() -> None:
    def finish(item, value):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        run(range(10**6), finish=finish)
