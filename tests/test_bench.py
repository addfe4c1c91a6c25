"""The benchmarks run, with the rivals that happen to be installed, and write down what they measured.

No time is judged here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The benchmark modules; what importing them does to the environment is undone."""
    for name in THREADS:
        monkeypatch.setenv(name, "1")
    monkeypatch.syspath_prepend(str(SCRIPTS))
    from benchmarks import document, measure

    return SimpleNamespace(document=document, measure=measure)


def run(*words: str) -> str:
    """`python -m benchmarks ...` in a process of its own; what it printed."""
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "COLUMNS": "200"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_windows_measures_ours_and_names_the_rivals_that_are_missing(tmp_path: Path) -> None:
    document = tmp_path / "figures.md"
    document.write_text("# Figures\n\n<!-- rle: begin -->\nas it was\n<!-- rle: end -->\n\nthe end\n", encoding="utf-8")
    run("windows", "--quick", "--write", str(document))
    text = document.read_text(encoding="utf-8")
    rivals = {"MONAI gaussian": "monai", "pytorch-toolbelt": "pytorch_toolbelt", "patchly": "patchly"}
    for rival, module in rivals.items():
        assert (f"|  | {rival} | " in text) == (find_spec(module) is not None)
        assert (f"- not installed, so not measured: {rival}\n" in text) == (find_spec(module) is None)
    assert "| ours | " in text
    assert "|  | notebook loop | " in text  # it needs nothing but what the kit needs
    assert text.startswith("# Figures\n\n<!-- rle: begin -->\nas it was\n<!-- rle: end -->\n\nthe end\n")


def test_rle_is_measured_or_left_out_with_the_reason() -> None:
    printed = run("rle", "--quick")
    assert ("targets met" in printed) == (find_spec("pycocotools") is not None)
    assert ("rle is left out: it needs pycocotools" in printed) == (find_spec("pycocotools") is None)


def test_ratios_say_who_was_slower(benchmarks: SimpleNamespace) -> None:
    slow, fast = (lambda: time.sleep(0.02)), (lambda: time.sleep(0.002))
    comparison = benchmarks.measure.compare("sleep", fast, {"slow": slow, "absent": None}, {"slow": 2.0}, repeats=3)
    ours, rival = comparison.rows
    # Asleep, a loaded machine makes both longer: the order stays.
    assert ours.ratio is None and rival.ratio > 1 and rival.median > ours.median
    assert rival.met == (rival.ratio >= 2.0)
    assert comparison.missing == ["absent"]
    with pytest.raises(ValueError, match="targets for \\['nobody'\\]"):
        benchmarks.measure.compare("sleep", fast, {"slow": slow}, {"nobody": 2.0})


def test_every_callable_runs_equally_often_and_not_always_first(benchmarks: SimpleNamespace) -> None:
    order: list[str] = []

    def call(name: str) -> None:
        order.append(name)
        time.sleep(0.003)  # longer than a round has to be, so that it is called once a round

    benchmarks.measure.compare(
        "order", lambda: call("a"), {name: lambda name=name: call(name) for name in "bc"}, repeats=3
    )
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"


def test_bounds_and_results(benchmarks: SimpleNamespace) -> None:
    measure = benchmarks.measure
    assert [measure.limit("memory", value, "MB", 8.0).rows[0].met for value in (7.9, 8.0, 8.1)] == [True, True, False]
    measure.check_equal("same", np.zeros((2, 3)), np.full((2, 3), 1e-6), 1e-5)
    for other in (np.full((2, 3), 1e-4), np.zeros((3, 2)), np.full((2, 3), np.nan)):
        with pytest.raises(ArithmeticError, match="other: results"):
            measure.check_equal("other", np.zeros((2, 3)), other, 1e-5)


def test_peak_memory_is_what_was_held_at_once(benchmarks: SimpleNamespace) -> None:
    megabyte = 2**20

    def two_megabytes_then_one() -> np.ndarray:
        first, second = np.ones(megabyte, np.uint8), np.ones(megabyte, np.uint8)
        del first, second
        return np.ones(megabyte, np.uint8)

    assert 2 * megabyte <= benchmarks.measure.peak_memory(two_megabytes_then_one) < 2.1 * megabyte


def test_a_section_is_replaced_and_a_new_one_added(benchmarks: SimpleNamespace, tmp_path: Path) -> None:
    document, path = benchmarks.document, tmp_path / "docs" / "figures.md"
    document.replace(path, "rle", "one\n")
    document.replace(path, "data", "two\n")
    document.replace(path, "rle", "three\n")
    text = path.read_text(encoding="utf-8")
    assert (
        "<!-- rle: begin -->\nthree\n<!-- rle: end -->\n" in text
        and "<!-- data: begin -->\ntwo\n<!-- data: end -->\n" in text
    )
    assert "one" not in text
    path.write_text(text.replace("<!-- rle: end -->\n", ""), encoding="utf-8")
    with pytest.raises(ValueError, match="only one of the lines"):
        document.replace(path, "rle", "four\n")
    assert list(path.parent.iterdir()) == [path]
