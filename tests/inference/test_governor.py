"""The governor on a virtual clock, on every speed of machine: never late, never wasteful, never below what it must."""

from __future__ import annotations

import csv
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st

from hubmap_kit import experiment
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import ConfigError
from hubmap_kit.inference.ensemble import Effort, ladder, network_passes
from hubmap_kit.inference.governor import CostModel, Governor, parse_deadline
from hubmap_kit.inference.simulation import HPA_SIDE, PRIVATE, Machine, Simulated, best_possible, real_mix, simulate

SETTINGS = experiment.load(
    "baseline", ["scale.policy=reduce", "scale.reduce=1", "inference.views=d4", "inference.overlap=0.5"]
)
LADDER = ladder(SETTINGS.inference, 5)
WORTH = [1 - 0.02 * step for step in range(len(LADDER))]  # what a mask is worth at each step; without one 0
DEADLINE_S = 8.5 * 3600
# How long the whole test would take as configured, in deadlines: ten machines from far too fast to far too slow.
SPEEDS = (0.02, 0.3, 0.9, 1.05, 1.5, 3, 8, 30, 200, 2000)
KINDS = {
    "steady": {},
    "three times slower half-way": {"changes": 3.0},
    "faster half-way": {"changes": 0.4},
    "noisy": {"noise": 0.4},
}


def passes(slide: Slide, effort: Effort) -> float:
    return network_passes(slide, SETTINGS, effort)


SLIDES = real_mix()
FULL = sum(passes(slide, LADDER[0]) for slide in SLIDES)


def rerun(speed: float, devices: int = 1, **kind: float) -> tuple[Simulated, Machine]:
    machine = Machine(speed * DEADLINE_S * devices / FULL, **kind)
    return simulate(SLIDES, LADDER, passes, machine, DEADLINE_S, devices), machine


def worth(steps: list[int | None]) -> float:
    return sum(WORTH[step] for step in steps if step is not None)


def test_the_mix_is_the_hidden_test_s_as_far_as_it_is_known() -> None:
    assert len(SLIDES) == 529 and len({slide.id for slide in SLIDES}) == 529
    hubmap = [slide for slide in SLIDES if slide.source == "Hubmap"]
    assert {organ: sum(slide.organ == organ for slide in hubmap) for organ in PRIVATE} == PRIVATE and len(hubmap) == 239
    assert min(slide.height for slide in hubmap) in range(160, 166) and max(slide.height for slide in hubmap) in range(
        4400, 4525
    )
    assert {slide.height for slide in SLIDES if slide.source == "HPA"} == {HPA_SIDE}


@pytest.mark.parametrize(("kind", "devices"), [*((kind, 1) for kind in KINDS), ("steady", 2)])
@pytest.mark.parametrize("speed", SPEEDS)
def test_no_machine_is_late(speed: float, kind: str, devices: int) -> None:
    done, machine = rerun(speed, devices, **KINDS[kind])
    assert done.ended_s <= DEADLINE_S and len(done.steps) == 529
    if speed <= 0.3:
        assert set(done.steps) == {0}  # a fast machine loses nothing
    if speed <= 200:
        assert None not in done.steps  # and no mask is missing where the cheapest effort fits for all
    if kind == "steady":
        bound = best_possible(SLIDES, LADDER, passes, machine, DEADLINE_S, WORTH, devices)
        assert worth(done.steps) >= bound - 0.015 * 529
        large = [step for step, slide in zip(done.steps, SLIDES, strict=True) if slide.source == "HPA"]
        assert sum(a != b for a, b in pairwise(large)) <= 8  # it does not flap


def test_no_slides_need_no_time() -> None:
    governor: Governor[Effort] = Governor([], LADDER, lambda: 1.0, passes)
    assert governor.report() == []


def test_the_report_tells_why_slides_have_no_mask() -> None:
    left = iter([9.0, 9.0, 0.0, 0.0])
    governor: Governor[Effort] = Governor(SLIDES[:4], LADDER, lambda: next(left), passes)
    for slide in SLIDES[:2]:
        governor.skip(slide, "it could not be read")
    for slide in SLIDES[2:4]:
        assert governor.effort_for(slide) is None
    assert governor.report() == [
        "2 slides without a mask: it could not be read",
        "2 slides without a mask: the time is up",
    ]


def test_the_bound_of_the_perfect_planner_is_one() -> None:
    """Against the best of all plans, tried one by one, for few slides."""
    slides, steps = SLIDES[:5], LADDER[::3]
    machine = Machine(0.01, 0.3)
    cost = np.array([[0.0, *(0.3 + 0.01 * passes(slide, effort) for effort in steps)] for slide in slides])
    value = np.array([0.0, *WORTH[::3]])
    plans = np.stack(np.meshgrid(*[range(len(value))] * 5), -1).reshape(-1, 5)
    for deadline in (1.0, 10.0, 40.0, 150.0):
        in_time = cost[np.arange(5), plans].sum(axis=1) <= deadline
        best = value[plans].sum(axis=1)[in_time].max()
        bound = best_possible(slides, steps, passes, machine, deadline, WORTH[::3])
        assert best <= bound + 1e-9 <= best + 1.0 + 1e-6  # a linear relaxation differs by one slide at most


@hypothesis(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 40),
    speed=st.floats(-2, 3).map(lambda power: 10**power),
    slide_s=st.floats(0, 1),
    seed=st.integers(0, 99),
    devices=st.integers(1, 3),
    deadline=st.floats(60, 40_000),
)
def test_few_slides_and_short_deadlines_are_kept_too(
    count: int, speed: float, slide_s: float, seed: int, devices: int, deadline: float
) -> None:
    slides = [replace(slide, id=str(place)) for place, slide in enumerate(real_mix(seed)[:count])]
    full = sum(passes(slide, LADDER[0]) for slide in slides)
    machine = Machine(speed * deadline * devices / full, slide_s * deadline / 1000)
    done = simulate(slides, LADDER, passes, machine, deadline, devices)
    assert done.ended_s <= deadline
    assert set(done.governor.records) == {slide.id for slide in slides} and len(done.steps) == count
    if (
        speed < 0.05 and slide_s * count < 100
    ):  # a device's first slide may have less, when a probe says little about it
        assert set(done.steps[devices:]) <= {0}


def test_one_enormous_slide_steps_down_alone() -> None:
    """Everything fits but the last one: it is predicted too dear before it begins."""
    slides = [replace(SLIDES[0], id=str(place), height=600, width=600) for place in range(30)]
    slides.append(replace(SLIDES[0], id="huge", height=20_000, width=20_000))
    small, huge = passes(slides[0], LADDER[0]), passes(slides[-1], LADDER[0])
    machine = Machine(1.0, 0.0)
    deadline = 30 * small + 0.6 * huge
    done = simulate(slides, LADDER, passes, machine, deadline)
    assert done.ended_s <= deadline and set(done.steps[:30]) == {0} and 0 < done.steps[30] <= 3


def test_what_is_too_slow_for_all_does_the_cheapest_first() -> None:
    done, _ = rerun(2000)
    left_out = [slide.height for step, slide in zip(done.steps, SLIDES, strict=True) if step is None]
    kept = [slide.height for step, slide in zip(done.steps, SLIDES, strict=True) if step is not None]
    assert left_out and np.mean(kept) < np.mean(left_out)
    assert all(
        record.effort == "" and "time" in record.reason
        for record in done.governor.records.values()
        if record.step is None
    )


def test_a_plan_goes_up_again_but_never_past_the_config() -> None:
    done, _ = rerun(1.05, changes=0.1)
    large = [step for step, slide in zip(done.steps, SLIDES, strict=True) if slide.source == "HPA"]
    assert max(large[: len(large) // 2]) > 0 and set(large[-50:]) == {0} and min(large) == 0


def test_a_stopped_clock_gives_nothing_and_an_empty_ladder_gives_all() -> None:
    governor = Governor(SLIDES[:3], LADDER, lambda: 0.0, passes)
    assert governor.hopeless() and governor.effort_for(SLIDES[0]) is None
    governor = Governor(SLIDES[:3], LADDER[:1], lambda: 100.0, passes)
    assert governor.probe_effort is None and governor.effort_for(SLIDES[0]) == LADDER[0]
    governor.observe(SLIDES[0], LADDER[0], 99.0)
    assert governor.effort_for(SLIDES[1]) is None or SLIDES[1].height < SLIDES[0].height


def test_faults_and_another_device_are_taken_into_account() -> None:
    governor = Governor(SLIDES[:4], LADDER, lambda: 1e6, passes)
    governor.skip(SLIDES[0], "it could not be read")
    governor.observe_probe(SLIDES[1], 1.0)
    governor.effort_for(SLIDES[1])
    governor.observe(SLIDES[1], LADDER[0], 5.0, worked=False)
    assert governor.effort_for(SLIDES[1]) == LADDER[0]  # tried again
    governor.observe(SLIDES[1], LADDER[0], 5.0, worked=False)
    governor.forget_speed()
    assert governor.effort_for(SLIDES[2]) == LADDER[0]
    assert [record.reason for record in governor.records.values()] == [
        "it could not be read",
        "as configured, after a probe",
        "nothing measured yet",
    ]


def test_what_it_did_is_written(tmp_path: Path) -> None:
    done, _ = rerun(3)
    done.governor.write(tmp_path / "governor.csv")
    with (tmp_path / "governor.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide"] for row in rows] == [slide.id for slide in SLIDES]
    for row, step in zip(rows[:-1], done.steps[:-1], strict=True):
        assert row["effort"] == str(LADDER[step]) and float(row["measured_s"]) > 0 and row["reason"]
    accurate = [abs(float(row["measured_s"]) / float(row["predicted_s"]) - 1) for row in rows[10:-1]]
    assert np.median(accurate) < 0.05
    lines = done.governor.report()
    assert sum(int(line.split()[0]) for line in lines) == 529 and "all that is configured" in lines[0]


@given(fixed=st.floats(0, 50), rate=st.floats(1e-4, 10), seed=st.integers(0, 50))
@hypothesis(deadline=None, max_examples=30)
def test_the_cost_model_finds_both_parts(fixed: float, rate: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    model = CostModel()
    for x in random.choice([4.0, 36.0, 64.0, 320.0], 40):
        model.observe(x, rate * (fixed + x))
    asked = np.array([1.0, 50.0, 1000.0])
    assert model.seconds(asked) == pytest.approx(rate * (fixed + asked), rel=0.3)
    assert model.seconds(asked[1:]) == pytest.approx(rate * (fixed + asked[1:]), rel=0.1)


def test_one_stall_does_not_change_the_plan_and_a_slower_machine_does() -> None:
    model = CostModel()
    for _ in range(30):
        model.observe(100.0, 1.0)
    model.observe(100.0, 300.0)
    assert model.seconds(np.array([100.0]))[0] < 1.5 and model.spread > 3
    for _ in range(12):
        model.observe(100.0, 4.0)
    assert model.seconds(np.array([100.0]))[0] == pytest.approx(4.0, rel=0.5)


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:10:00", 600), ("8:30:00", 30_600), ("00:00:01", 1), (" 100:00:00 ", 360_000)]
)
def test_a_deadline_is_a_clock(text: str, seconds: float) -> None:
    assert parse_deadline(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "10", "10:00", "00:60:00", "0:0:5", "00:00:00", "-1:00:00", "1h", "00:10:00.5", "٠٠:١٠:٠٠"]
)
def test_what_is_no_deadline_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="write ten minutes as 00:10:00"):
        parse_deadline(text)
