"""The session clock."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from hubmap_kit.training.clock import SessionClock, process_start

SECONDS = st.floats(1e-3, 1e6)


@given(SECONDS, SECONDS)
def test_what_fits_is_what_is_left(limit: float, age: float) -> None:
    assume(not 0 < limit - age < 1)  # the limit would pass while the test runs
    before = time.monotonic()
    clock = SessionClock(limit, before - age)
    assert clock.margin_s == pytest.approx(min(300, limit / 20))
    # A process that is older than its session cannot be: its age is not believed.
    assert clock.started == before - age if age < limit else before <= clock.started <= time.monotonic()
    end = clock.started + limit - clock.margin_s
    early, left, late = time.monotonic(), clock.left(), time.monotonic()
    assert end - late - 1e-6 <= left <= end - early + 1e-6
    assert clock.fits(left - 3600) and not clock.fits(left + 1e-6)


@pytest.mark.parametrize(("age", "believed"), [(600.0, True), (3600.0, False), (-50.0, False)])
def test_a_process_that_would_be_very_old_is_not_believed(age: float, believed: bool, tmp_path: Path) -> None:
    """A container may tell the time of another machine; a training must not lose hours to it."""
    ticks = int((time.clock_gettime(time.CLOCK_BOOTTIME) - age) * os.sysconf("SC_CLK_TCK"))
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    (tmp_path / "stat").write_text("1 (odd name) " + " ".join([*fields[:19], str(ticks), *fields[20:]]))
    before = time.monotonic()
    start = process_start(tmp_path / "stat")
    assert start == pytest.approx(before - age, abs=5) if believed else before <= start <= time.monotonic()


def test_a_clock_is_the_same_in_another_process() -> None:
    clock = SessionClock(1000.0, time.monotonic() - 400, margin_s=100)
    code = "import pickle, sys; print(pickle.loads(sys.stdin.buffer.read()).left())"
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(clock), capture_output=True, check=True)
    assert clock.left() <= float(done.stdout) <= 500


def test_a_process_begins_before_it_can_ask() -> None:
    code = (
        "import time; time.sleep(0.3)\nfrom hubmap_kit.training.clock import process_start\nprint(process_start(),"
        " time.monotonic())"
    )
    before = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    start, asked = map(float, done.stdout.split())
    # The system counts in hundredths of a second.
    assert before - 0.05 <= start <= asked - 0.25
    assert process_start() <= time.monotonic()
