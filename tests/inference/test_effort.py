"""The ladder of efforts and what each effort costs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubmap_kit import experiment
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import InferenceConfig
from hubmap_kit.inference.ensemble import Effort, full_effort, ladder, network_passes, team_ladder, windows_along
from hubmap_kit.inference.windows import plan_axis


def slide_of(height: int, width: int, um: float = 0.4) -> Slide:
    return Slide("1", "kidney", "HPA", height, width, um, 4.0, Path("1.tiff"), None)


@given(length=st.integers(1, 3000), size=st.sampled_from([64, 256, 512]), overlap=st.floats(0, 0.89))
def test_windows_are_counted_as_they_are_placed(length: int, size: int, overlap: float) -> None:
    assert windows_along(length, size, overlap) == len(plan_axis(max(length, size), size, overlap).starts)


def test_the_ladder_gives_up_one_thing_more_at_each_step_in_the_config_s_order() -> None:
    config = InferenceConfig(overlap=0.25, views="d4", ladder=["views", "folds", "overlap", "reduce"])
    assert ladder(config, 5) == [
        Effort(0.25, "d4", 5),
        Effort(0.25, "flips", 5),
        Effort(0.25, "none", 5),
        Effort(0.25, "none", 2),
        Effort(0.25, "none", 1),
        Effort(0.125, "none", 1),
        Effort(0.0, "none", 1),
        Effort(0.0, "none", 1, 2),
        Effort(0.0, "none", 1, 4),
    ]
    assert ladder(InferenceConfig(ladder=[]), 3) == [full_effort(InferenceConfig(), 3)]


@given(
    side=st.integers(100, 5000),
    folds=st.integers(1, 6),
    views=st.sampled_from(["none", "flips", "d4"]),
    overlap=st.sampled_from([0, 0.3, 0.5, 0.8]),
)
def test_a_step_down_never_costs_more(side: int, folds: int, views: str, overlap: float) -> None:
    settings = experiment.load("baseline", [f"inference.views={views}", f"inference.overlap={overlap}"])
    costs = [network_passes(slide_of(side, side), settings, effort) for effort in ladder(settings.inference, folds)]
    assert costs == sorted(costs, reverse=True) and costs[-1] >= 1


def test_what_a_slide_costs() -> None:
    settings = experiment.load("baseline", ["scale.policy=reduce", "scale.reduce=1", "inference.window=512"])
    # 3000 px: steps of 384 at overlap .25, so 8 windows along each side; counted by hand.
    assert network_passes(slide_of(3000, 3000), settings, Effort(0.25, "flips", 5)) == 64 * 4 * 5
    assert network_passes(slide_of(3000, 3000), settings, Effort(0.0, "none", 1, 2)) == 9
    assert network_passes(slide_of(100, 1025), settings, Effort(0.0, "none", 1)) == 3
    whole = experiment.load(
        "baseline", ["scale.policy=reduce", "scale.reduce=2", "inference.window=512", "inference.whole_slide=1600"]
    )
    assert network_passes(slide_of(2048, 1024), whole, Effort(0.5, "d4", 1)) == pytest.approx(2 * 8)


def test_runs_of_different_depth_step_down_together() -> None:
    short, long = ladder(InferenceConfig(ladder=["views"]), 1), ladder(InferenceConfig(views="d4", ladder=["views"]), 2)
    assert team_ladder([short, long]) == [(short[0], long[0]), (short[1], long[1]), (short[1], long[2])]
