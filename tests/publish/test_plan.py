"""Plans of sessions and weeks: what must hold for every plan, and the verb with measured and with assumed speeds."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kaggle_double import Double
from kaggle_double.server import KEY

from hubmap_kit import experiment
from hubmap_kit.__main__ import main
from hubmap_kit.errors import PublishError
from hubmap_kit.files import write_json, write_yaml
from hubmap_kit.publish.plan import Budget, Job, Session, Terms, assumed_budget, gpu_hours, lay_out, session_fits

NOW = datetime(2026, 11, 23, 8, tzinfo=UTC)
REFRESH = datetime(2026, 11, 28, tzinfo=UTC)
FOLDS = st.sets(st.integers(0, 9), min_size=1, max_size=6).map(lambda some: tuple(sorted(some)))
JOBS = st.builds(Job, FOLDS, st.integers(1, 60), st.floats(0.01, 3), st.floats(0, 1))
BUDGETS = st.none() | st.builds(Budget, st.floats(0, 30), st.floats(12, 40), st.just(REFRESH))
TERMS = st.builds(Terms, st.floats(4.5, 11.9), st.floats(0, 0.4), st.sampled_from([1, 2]))
SLACK = 1e-6


def week(moment: datetime) -> int:
    return -1 if moment < REFRESH else (moment - REFRESH) // timedelta(days=7)


def end(sessions: list[Session]) -> datetime:
    return sessions[-1].starts + timedelta(hours=sessions[-1].hours)


@settings(deadline=None, max_examples=150)
@given(JOBS, BUDGETS, TERMS)
def test_a_plan_does_all_the_work_once_within_every_limit(job: Job, budget: Budget | None, terms: Terms) -> None:
    sessions = lay_out(job, budget, terms, NOW)
    epochs: dict[int, list[int]] = defaultdict(list)
    ends: dict[int, int] = {}
    for number, session in enumerate(sessions):
        clocks = [terms.overhead_h] * terms.gpus
        folds = [part.fold for part in session.parts]
        assert folds and len(set(folds)) == len(folds), "one fold cannot be on two devices, and no session is empty"
        for part in session.parts:
            assert part.fold not in ends, "nothing is left to do for a fold that has ended"
            epochs[part.fold] += range(part.first, part.last + 1)
            clocks[part.gpu] += (part.last - part.first + 1) * job.epoch_h + part.finishes * job.last_h
            if part.finishes:
                ends[part.fold] = number
                assert len(epochs[part.fold]) == job.epochs
        assert abs(max(clocks) - session.hours) < SLACK
        assert session.hours <= session.limit_h + SLACK and session.limit_h <= terms.limit_h + SLACK
    assert epochs == {fold: list(range(1, job.epochs + 1)) for fold in job.folds}
    assert set(ends) == set(job.folds)
    # One session at a time: each goes on from the output of the one before.
    for former, later in pairwise(sessions):
        assert later.starts >= former.starts + timedelta(hours=former.hours) - timedelta(seconds=1)
    if budget is not None:
        spent: dict[int, float] = defaultdict(float)
        for session in sessions:
            spent[week(session.starts)] += session.hours
        for number, hours in spent.items():
            assert hours <= (budget.left_h if number == -1 else budget.weekly_h) + SLACK


@settings(deadline=None, max_examples=150)
@given(JOBS, BUDGETS, TERMS, st.integers(1, 5))
def test_more_work_never_costs_less_and_never_ends_sooner(
    job: Job, budget: Budget | None, terms: Terms, more: int
) -> None:
    base = lay_out(job, budget, terms, NOW)
    larger = [
        Job(job.folds, job.epochs + more, job.epoch_h, job.last_h),
        Job((*job.folds, *range(10, 10 + more)), job.epochs, job.epoch_h, job.last_h),
        Job(job.folds, job.epochs, job.epoch_h * (1 + more / 20), job.last_h),
    ]
    for other in larger:
        found = lay_out(other, budget, terms, NOW)
        assert gpu_hours(found) >= gpu_hours(base) - SLACK
        # More work can make the rest of a week worth a session that was too short before, and then everything after it
        # comes sooner.
        if [session.waits for session in found[: len(base)]] == [session.waits for session in base]:
            assert end(found) >= end(base) - timedelta(seconds=1)
    if budget is not None:
        less = lay_out(job, Budget(max(0.0, budget.left_h - more), budget.weekly_h, budget.refresh), terms, NOW)
        assert end(less) >= end(base) - timedelta(seconds=1)


def test_two_folds_run_side_by_side_and_a_long_one_goes_on_in_the_next_session() -> None:
    sessions = lay_out(Job((0, 1, 2), 20, 0.5, 0.0), None, Terms(11.0, 0.0, 2), NOW)
    found = [
        [(part.fold, part.gpu, part.first, part.last, part.finishes) for part in session.parts] for session in sessions
    ]
    assert found == [[(0, 0, 1, 20, True), (2, 0, 1, 2, False), (1, 1, 1, 20, True)], [(2, 0, 3, 20, True)]]
    assert [session.hours for session in sessions] == [11.0, 9.0]


def test_what_does_not_fit_this_week_waits_for_the_next() -> None:
    sessions = lay_out(Job((0, 1, 2, 3), 10, 1.0, 0.0), Budget(12.0, 30.0, REFRESH), Terms(10.0, 0.0, 2), NOW)
    assert [(session.hours, session.waits) for session in sessions] == [(10.0, False), (2.0, False), (8.0, True)]
    assert sessions[-1].starts == REFRESH


def test_an_epoch_longer_than_a_session_cannot_be_planned() -> None:
    with pytest.raises(PublishError, match="samples_per_epoch"):
        lay_out(Job((0,), 2, 12.0, 0.0), Budget(30, 30, REFRESH), Terms(), NOW)


def test_the_usual_week_ends_on_saturday_and_fits_counts_hours() -> None:
    assert assumed_budget(NOW).refresh == REFRESH and assumed_budget(REFRESH).refresh == REFRESH + timedelta(days=7)
    budget = Budget(11.5, 30.0, REFRESH)
    assert session_fits(11.5, budget) and not session_fits(11.6, budget)


# The verb


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """A run like those of the train verb, as far as its speed goes: 100 s an epoch, 40 tiles a second, on a T4."""
    run = tmp_path / "run"
    write_yaml(run / "config.yaml", experiment.dump(experiment.load("baseline", ["training.samples_per_epoch=2000"])))
    write_json(
        run / "environment.json",
        [{"accelerator": {"type": "cuda", "name": "Tesla T4"}}, {"accelerator": {"type": "cpu"}}],
    )
    for fold in (0, 1):
        (run / f"fold{fold}").mkdir()
        rows = [
            {"fold": fold, "epoch": epoch, "seconds": 500 if epoch == 1 else 100, "tiles_per_second": 40}
            for epoch in (1, 2)
        ]
        with open(run / f"fold{fold}" / "timing.csv", "w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return run


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["plan", *words])
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


def test_measured_seconds_are_used_and_scaled_by_the_tiles_of_an_epoch(run_folder: Path, capsys) -> None:
    base = ("--config", "baseline", "--offline", "--run", str(run_folder))
    code, out, _ = plan(capsys, *base, "--set", "training.samples_per_epoch=2000")
    assert code == 0 and "epochs of 100 s" in out and "MEASURED" in out and "Tesla T4" in out and "computed" not in out
    # 4000 tiles more at 40 tiles a second.
    code, out, _ = plan(capsys, *base, "--set", "training.samples_per_epoch=6000")
    assert code == 0 and "epochs of 200 s" in out and "6000 tiles an epoch instead of 2000" in out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--accelerator", "cpu"], "machine Tesla T4, planned cpu"),
        (["--set", "tiles.size=256"], "tile size 512, planned 256"),
        (["--set", "model.encoder=tu-efficientnet_b4"], "planned unet/tu-efficientnet_b4"),
    ],
)
def test_a_timing_of_something_else_is_not_passed_off_as_measured(
    words: list[str], why: str, run_folder: Path, capsys
) -> None:
    code, out, _ = plan(capsys, "--config", "baseline", "--offline", "--run", str(run_folder), *words)
    assert code == 0 and "NOT USED" in out and why in out and "MEASURED" not in out and "not measured" in out


def test_without_a_run_every_figure_is_called_an_assumption(capsys) -> None:
    code, out, _ = plan(capsys, "--config", "baseline", "--offline", "--folds", "0,1", "--set", "training.epochs=7")
    assert code == 0 and "2 folds x 7 epochs" in out and "assumed, not read from Kaggle" in out
    assert "fold 0: 1-7 + oof" in out and "fold 1: 1-7 + oof" in out
    assert "hubmap kernels --run train --config baseline --folds 0,1 --set training.epochs=7" in out
    assert out.count("ASSUMPTION: ") >= 3


def spoil(run: Path, what: str) -> None:
    if what == "no timing":
        for path in run.glob("fold*/timing.csv"):
            path.unlink()
    elif what == "damaged timing":
        (run / "fold0" / "timing.csv").write_text("fold,epoch,seconds,tiles_per_second\n0,1,fast,9\n")
    elif what == "no machine":
        (run / "environment.json").write_text(json.dumps([]))


@pytest.mark.parametrize(
    ("what", "words", "said"),
    [
        ("no timing", [], "fold<k>/timing.csv"),
        ("damaged timing", [], "timing.csv, line 2"),
        ("no machine", [], "environment.json"),
        ("", ["--folds", "7"], "fold 7"),
        ("", ["--folds", "x"], "--folds"),
        ("", ["--accelerator", "v100"], "--accelerator"),
        ("", ["--set", "training.samples_per_epoch=9000000"], "samples_per_epoch"),
        ("", ["--config", "baselime"], "baseline"),
    ],
)
def test_a_plan_that_cannot_be_made_is_one_sentence(
    what: str, words: list[str], said: str, run_folder: Path, capsys, record_property
) -> None:
    spoil(run_folder, what)
    code, _, err = plan(capsys, "--config", "baseline", "--offline", "--run", str(run_folder), *words)
    last = err.strip().splitlines()[-1]
    record_property("exit code", code)
    record_property("sentence", last)
    assert code == 1 and last.startswith("error: ") and said in last and "Traceback" not in err


@pytest.fixture(scope="module")
def double() -> Iterator[Double]:
    with Double(gpu_used_h=27.5) as double:
        yield double
        assert not double.mistakes and not double.escapes


@pytest.mark.parametrize(
    ("faults", "left"), [((), "2.5 of 30.0 GPU hours are left"), (("no_credentials",), "assumed, not read from Kaggle")]
)
def test_the_quota_that_kaggle_tells_decides_what_waits(
    faults: tuple[str, ...], left: str, double: Double, tmp_path: Path
) -> None:
    double.faults = faults
    words = [sys.executable, "-m", "hubmap_kit", "plan", "--config", "baseline", "--set", "training.epochs=60"]
    done = subprocess.run(
        words, env=double.environment(tmp_path), cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert left in done.stdout and KEY not in done.stdout + done.stderr
    assert ("(new week)" in done.stdout) == (not faults) and ("wait until Sat" in done.stdout) == (not faults)
