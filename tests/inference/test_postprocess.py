"""Thresholds: which one a slide gets, which pixels reach it, and what happens to the mask then."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hubmap_kit import experiment
from hubmap_kit.config import InferenceConfig, PostprocessChoices, PostprocessConfig
from hubmap_kit.errors import CheckpointError
from hubmap_kit.inference.postprocess import choices_for, read_fitted, threshold_for, to_mask, with_fitted

FITTED = {"lung/HPA": 0.23, "lung": 0.22, "kidney": 0.33, "kidney/Hubmap": 0.34}


@pytest.mark.parametrize(
    ("organ", "source", "expected"),
    [
        ("lung", "Hubmap", 0.12),
        ("lung", "HPA", 0.11),
        ("kidney", "Hubmap", 0.34),
        ("kidney", "HPA", 0.33),
        ("spleen", "HPA", 0.44),
        ("prostate", "Hubmap", 0.13),
        ("prostate", "HPA", 0.44),
    ],
    ids=[
        "own, source",
        "own, organ",
        "fitted, source",
        "fitted, organ",
        "default",
        "own, source only",
        "another source's own",
    ],
)
def test_order_of_thresholds(organ: str, source: str, expected: float) -> None:
    config = InferenceConfig(
        threshold=0.44, thresholds={"lung": 0.11}, source_thresholds={"Hubmap": {"lung": 0.12, "prostate": 0.13}}
    )
    assert threshold_for(organ, source, FITTED, config) == expected


def test_without_anything_fitted() -> None:
    assert threshold_for("lung", "HPA", {}, InferenceConfig()) == InferenceConfig().threshold


@given(threshold=st.floats(0.01, 0.99), seed=st.integers(0, 99))
@settings(deadline=None)
def test_by_default_a_mask_holds_exactly_the_pixels_that_reach_it(threshold: float, seed: int) -> None:
    plane = np.random.default_rng(seed).random((13, 17), np.float32)
    mask = to_mask(plane, threshold, "lung", InferenceConfig())
    assert mask.dtype == np.uint8 and mask.shape == plane.shape
    assert mask.tolist() == [[int(value >= np.float32(threshold)) for value in row] for row in plane]


def test_the_threshold_itself_is_inside() -> None:
    plane = np.float32([[0.5, np.nextafter(np.float32(0.5), np.float32(0))]])
    assert to_mask(plane, 0.5, "lung", InferenceConfig()).tolist() == [[1, 0]]


def smooth_plane(seed: int, shape: tuple[int, int] = (120, 90)) -> np.ndarray:
    plane = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 2.5)
    return ((plane - plane.min()) / np.ptp(plane)).astype(np.float32)


def by_scipy(plane: np.ndarray, threshold: float, choices: PostprocessChoices) -> np.ndarray:
    """The documented steps in the documented order."""
    mask = plane >= np.float32(threshold)
    if choices.fill_holes:
        mask = ndimage.binary_fill_holes(mask)
    for radius, last in ((choices.opening, ndimage.binary_dilation), (choices.shrink, None)):
        if last is None and choices.min_area:
            labels, count = ndimage.label(mask, np.ones((3, 3)))
            mask = np.isin(
                labels, [n for n in range(1, count + 1) if (labels == n).sum() >= choices.min_area * mask.size]
            )
        if radius:
            y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
            disk = y**2 + x**2 <= radius**2
            mask = ndimage.binary_erosion(mask, disk, border_value=1)
            mask = last(mask, disk) if last else mask
    return mask.astype(np.uint8)


AREAS = st.sampled_from([0.0, 0.002, 0.01, 0.05])
CHOICES = st.builds(
    PostprocessChoices, fill_holes=st.booleans(), opening=st.integers(0, 4), min_area=AREAS, shrink=st.integers(0, 3)
)


@given(seed=st.integers(0, 999), threshold=st.floats(0.2, 0.8), choices=CHOICES)
@settings(deadline=None, max_examples=80)
def test_all_steps_in_their_order(seed: int, threshold: float, choices: PostprocessChoices) -> None:
    plane = smooth_plane(seed)
    config = InferenceConfig(postprocess=PostprocessConfig(**choices.model_dump()))
    np.testing.assert_array_equal(to_mask(plane, threshold, "kidney", config), by_scipy(plane, threshold, choices))


def test_an_organ_with_choices_of_its_own_keeps_the_others_that_it_does_not_name() -> None:
    words = ["fill_holes=true", "organs.lung.shrink=2", "organs.kidney.fill_holes=false"]
    config = experiment.load("baseline", [f"inference.postprocess.{word}" for word in words]).inference
    assert choices_for("lung", config) == PostprocessChoices(fill_holes=True, shrink=2)
    ring = np.zeros((30, 30), np.float32)
    ring[5:25, 5:25], ring[10:20, 10:20] = 1, 0
    assert to_mask(ring, 0.5, "spleen", config).sum() == 400
    assert to_mask(ring, 0.5, "kidney", config).sum() == 300
    assert to_mask(ring, 0.5, "lung", config).sum() == 16**2


RESCUE = InferenceConfig(postprocess=PostprocessConfig(rescue=True))


def test_a_mask_that_is_not_empty_needs_no_rescue() -> None:
    plane = smooth_plane(3)
    np.testing.assert_array_equal(to_mask(plane, 0.6, "lung", RESCUE), plane >= np.float32(0.6))


@pytest.mark.parametrize(
    ("top", "threshold", "level"), [(0.3, 0.5, 0.25), (0.24, 0.5, 0.125), (0.02, 0.5, 0.015625), (0.49, 0.9, 0.45)]
)
def test_a_rescue_halves_the_threshold_until_something_is_left(top: float, threshold: float, level: float) -> None:
    plane = smooth_plane(4) * np.float32(top)
    assert not to_mask(plane, threshold, "lung", InferenceConfig()).any()
    np.testing.assert_array_equal(to_mask(plane, threshold, "lung", RESCUE), plane >= np.float32(level))


@pytest.mark.parametrize("top", [0.0099, 1e-3, 1e-30])
def test_at_last_the_part_around_the_highest_probability(top: float) -> None:
    plane = np.zeros((40, 50), np.float32)
    plane[5:9, 5:9], plane[20:30, 30:36], plane[24, 33] = 0.9, 0.7, 1.0
    plane[28:32, 36:39] = 0.4  # below half of the highest
    wanted = np.zeros(plane.shape, np.uint8)
    wanted[20:30, 30:36] = 1
    np.testing.assert_array_equal(to_mask(plane * np.float32(top), 0.5, "lung", RESCUE), wanted)


def test_steps_that_take_everything_do_not_take_the_rescued_part() -> None:
    config = InferenceConfig(postprocess=PostprocessConfig(rescue=True, min_area=0.5, shrink=3))
    plane = np.full((40, 40), 0.001, np.float32)
    plane[3:8, 3:8] = 0.8
    assert to_mask(plane, 0.5, "lung", config).sum() == 25


def test_a_rescue_takes_the_first_threshold_that_outlives_the_steps() -> None:
    plane = np.zeros((60, 60), np.float32)
    plane[10:50, 10:50] = 0.2
    plane[30:34, 30:34] = 0.9
    found = to_mask(plane, 0.5, "lung", InferenceConfig(postprocess=PostprocessConfig(rescue=True, opening=4)))
    assert found[12:48, 12:48].all() and not found[:10].any()  # at 0.125; at 0.5 and 0.25 the opening leaves nothing


@pytest.mark.parametrize("shape", [(7, 9), (1, 1)])
def test_a_plane_of_zeros_stays_empty(shape: tuple[int, int]) -> None:
    assert not to_mask(np.zeros(shape, np.float32), 0.5, "lung", RESCUE).any()


@given(seed=st.integers(0, 999), top=st.floats(1e-6, 1), threshold=st.floats(0.01, 0.99), choices=CHOICES)
@settings(deadline=None, max_examples=60)
def test_a_rescued_mask_is_never_empty(seed: int, top: float, threshold: float, choices: PostprocessChoices) -> None:
    config = InferenceConfig(postprocess=PostprocessConfig(**choices.model_dump() | {"rescue": True}))
    assert to_mask(smooth_plane(seed, (50, 40)) * np.float32(top), threshold, "lung", config).any()


def fitted_file(run: Path, **changes: object) -> Path:
    values = {
        "thresholds": {"lung": 0.1, "kidney/HPA": 0.3},
        "organs": {"lung": {"shrink": 4, "rescue": True}, "kidney": {}},
    } | changes
    (run / "postprocess.json").write_text(json.dumps(values))
    return run


def test_fitted_choices_are_read_back(tmp_path: Path) -> None:
    assert read_fitted(tmp_path, {"lung": 0.1}) == {}
    found = read_fitted(fitted_file(tmp_path), {"kidney/HPA": 0.3, "lung": 0.1})
    assert found == {"lung": PostprocessChoices(shrink=4, rescue=True), "kidney": PostprocessChoices()}


@pytest.mark.parametrize("thresholds", [{"lung": 0.1}, {"lung": 0.105, "kidney/HPA": 0.3}, {}])
def test_choices_for_other_thresholds_are_left_out_with_a_word(
    tmp_path: Path, thresholds: dict[str, float], caplog: pytest.LogCaptureFixture
) -> None:
    assert read_fitted(fitted_file(tmp_path), thresholds) == {}
    assert "other thresholds" in caplog.text and "tune-thresholds" in caplog.text


@pytest.mark.parametrize(
    "change",
    [
        {"organs": {"lung": {"shrink": -1}}},
        {"organs": {"lung": {"shrnk": 1}}},
        {"organs": [1]},
        {"thresholds": None},
        {"thresholds": {"a": "b"}},
    ],
)
def test_damaged_choices_are_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=r"postprocess\.json.*hubmap tune-thresholds"):
        read_fitted(fitted_file(tmp_path, **change), {"lung": 0.1, "kidney/HPA": 0.3})


@pytest.mark.parametrize("text", ["", "[]", "{", "3", "\x00"])
def test_a_file_of_something_else_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "postprocess.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"postprocess\.json"):
        read_fitted(tmp_path, {})


def test_the_config_goes_before_what_was_fitted() -> None:
    fitted = {"lung": PostprocessChoices(shrink=4), "kidney": PostprocessChoices(opening=2)}
    assert choices_for("lung", with_fitted(InferenceConfig(), fitted)).shrink == 4
    assert (
        choices_for("spleen", with_fitted(InferenceConfig(), fitted)).model_dump(exclude={"organs"})
        == PostprocessChoices().model_dump()
    )
    named = with_fitted(experiment.load("baseline", ["inference.postprocess.organs.lung={}"]).inference, fitted)
    assert choices_for("lung", named) == PostprocessChoices() and choices_for("kidney", named).opening == 2
    for_all = experiment.load("baseline", ["inference.postprocess.rescue=true"]).inference
    assert with_fitted(for_all, fitted) == for_all
    assert with_fitted(for_all, {}) == for_all
