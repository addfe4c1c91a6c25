"""Tuning: slides scored as they would be submitted, choices that luck does not make, and what is left in a run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.metric import dice
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import InferenceConfig, PostprocessConfig
from hubmap_kit.errors import CheckpointError, ConfigError
from hubmap_kit.inference.ensemble import load_ensemble, read_thresholds
from hubmap_kit.inference.postprocess import choices_for, read_fitted, threshold_for, to_mask, with_fitted
from hubmap_kit.jobs.tune import tune_thresholds
from hubmap_kit.training.counts import THRESHOLDS, best_threshold
from hubmap_kit.training.tune import (
    CANDIDATES,
    LEVELS,
    Choice,
    Scores,
    SlideScores,
    band,
    fit_organ,
    grid_of,
    score_slide,
    tune,
)

STEPS = 3  # a candidate that does something


def picture(seed: int, shape: tuple[int, int] = (90, 70)) -> np.ndarray:
    field = ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 4)
    return ((field - field.min()) / np.ptp(field)).astype(np.float32)


@pytest.mark.parametrize("rescued", [False, True])
@pytest.mark.parametrize("top", [1.0, 0.3])
def test_a_slide_is_scored_as_it_would_be_submitted(rescued: bool, top: float) -> None:
    truth = (0.7 * picture(1) + 0.3 * picture(2) > 0.55).astype(np.uint8)
    plane = picture(1) * np.float32(top)
    found = score_slide(plane, truth, rle.encode(truth), rescued)
    for number, candidate in enumerate(CANDIDATES):
        config = InferenceConfig(postprocess=PostprocessConfig(**candidate.model_dump() | {"rescue": rescued}))
        picked = range(len(grid_of(number))) if number else range(0, 199, 7)
        wanted = [dice(to_mask(plane, float(grid_of(number)[index]), "lung", config), truth) for index in picked]
        np.testing.assert_allclose(found.final[number][list(picked)], wanted, atol=1e-12)
        config = InferenceConfig(postprocess=PostprocessConfig(**candidate.model_dump()))
        wanted = [dice(to_mask(plane, float(grid_of(number)[index]), "lung", config), truth) for index in picked]
        np.testing.assert_allclose(found.bare[number][list(picked)], wanted, atol=1e-12)
    again = score_slide(plane, truth, None, rescued)
    np.testing.assert_array_equal(np.concatenate(again.final), np.concatenate(found.final))


def test_levels_are_thresholds_and_the_first_candidate_does_nothing() -> None:
    assert all(np.isclose(THRESHOLDS, level).any() for level in LEVELS)
    assert CANDIDATES[0].model_dump() == PostprocessConfig().model_dump(exclude={"organs"})
    assert len({candidate.model_dump_json() for candidate in CANDIDATES}) == len(CANDIDATES)


def slide(centre: float, width: float = 0.25, height: float = 0.8, steps: float = 0.0) -> SlideScores:
    """Curves with a peak; `steps` is what the candidate STEPS adds to them."""

    def curve(number: int) -> np.ndarray:
        return height * np.exp(-(((grid_of(number) - centre) / width) ** 2)) + (steps if number == STEPS else 0.0)

    curves = tuple(curve(number) for number in range(len(CANDIDATES)))
    return SlideScores(curves, curves)


def scores_of(slides: dict[str, list[SlideScores]], sources: list[str] | None = None, folds: int = 3) -> Scores:
    organs = [organ for organ, mine in slides.items() for _ in mine]
    each = [one for mine in slides.values() for one in mine]
    return Scores(organs, sources or ["HPA"] * len(organs), [number % folds for number in range(len(organs))], each)


def everyone(scores: Scores) -> np.ndarray:
    return np.ones(len(scores), bool)


def test_a_few_lucky_slides_are_drawn_towards_the_other_organs_and_many_are_not() -> None:
    usual = {organ: [slide(0.5, width=0.5) for _ in range(10)] for organ in ("kidney", "prostate", "largeintestine")}
    few = fit_organ(scores_of(usual | {"spleen": [slide(0.04, width=0.5)] * 2}), "spleen", np.ones(32, bool))
    many = fit_organ(scores_of(usual | {"spleen": [slide(0.04, width=0.5)] * 40}), "spleen", np.ones(70, bool))
    assert 0.15 < few.threshold < 0.45
    assert many.threshold < 0.08


def test_a_clear_curve_stays_and_a_flat_one_follows() -> None:
    """Five slides each time; what they say clearly outweighs the others, what they hardly say does not."""
    usual = {organ: [slide(0.5) for _ in range(10)] for organ in ("kidney", "prostate")}
    clear = scores_of(usual | {"lung": [slide(0.1, width=0.05)] * 5})
    flat = scores_of(usual | {"lung": [slide(0.1, width=2.0)] * 5})
    assert fit_organ(clear, "lung", everyone(clear)).threshold == pytest.approx(0.1, abs=0.02)
    assert fit_organ(flat, "lung", everyone(flat)).threshold > 0.4


def test_an_organ_alone_has_its_own_best() -> None:
    scores = scores_of({"lung": [slide(0.3), slide(0.3)]})
    assert fit_organ(scores, "lung", everyone(scores)) == Choice(0, pytest.approx(0.3, abs=0.0051), {})
    assert fit_organ(scores, "lung", np.zeros(2, bool)).threshold == 0.5


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        ([0.05] * 8, STEPS),
        ([0.05, 0.06] * 4, STEPS),
        ([0.3, -0.25] * 4, 0),
        ([0.2] + [0.0] * 7, 0),
        ([-0.02] * 8, 0),
        ([0.05] * 4, 0),
    ],
    ids=["the same gain everywhere", "a gain everywhere", "luck", "one slide", "a loss", "too few slides"],
)
def test_steps_are_taken_for_sure_gains_only(gains: list[float], chosen: int) -> None:
    scores = scores_of({"lung": [slide(0.3, steps=gain) for gain in gains]})
    assert fit_organ(scores, "lung", everyone(scores)).candidate == chosen
    assert fit_organ(scores, "lung", everyone(scores), steps=False).candidate == 0


def test_of_equal_candidates_the_simplest() -> None:
    same = [slide(0.3)] * 8
    curves = [
        tuple(curve + (0.1 if number in (2, 5, 9) else 0) for number, curve in enumerate(one.bare)) for one in same
    ]
    scores = scores_of({"lung": [SlideScores(each, each) for each in curves]})
    assert fit_organ(scores, "lung", everyone(scores)).candidate == 2


@pytest.mark.parametrize(
    ("hpa", "hubmap", "count", "own"), [(0.2, 0.6, 10, True), (0.4, 0.4, 10, False), (0.2, 0.6, 4, False)]
)
def test_sources_part_where_both_are_there_and_differ(hpa: float, hubmap: float, count: int, own: bool) -> None:
    slides = [slide(hpa) for _ in range(count)] + [slide(hubmap) for _ in range(count)]
    scores = scores_of({"kidney": slides}, ["HPA"] * count + ["Hubmap"] * count)
    found = fit_organ(scores, "kidney", everyone(scores))
    assert set(found.sources) == ({"HPA", "Hubmap"} if own else set())
    if own:
        assert hpa <= found.sources["HPA"] < found.threshold < found.sources["Hubmap"] <= hubmap
        assert scores.at(0, found) > scores.at(0, Choice(found.candidate, found.threshold, {}))


@st.composite
def any_scores(draw: st.DrawFn) -> Scores:
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    count, folds = draw(st.integers(1, 14)), draw(st.integers(1, 4))
    slides = []
    for _ in range(count):
        bare = tuple(
            ndimage.gaussian_filter1d(random.random(len(grid_of(number))), 2) for number in range(len(CANDIDATES))
        )
        slides.append(SlideScores(bare, tuple(np.where(random.random(len(each)) < 0.1, 1.0, each) for each in bare)))
    organs = random.choice(["kidney", "lung", "spleen"], count).tolist()
    return Scores(
        organs, random.choice(["HPA", "Hubmap"], count).tolist(), random.integers(0, folds, count).tolist(), slides
    )


@given(any_scores())
@settings(deadline=None, max_examples=60)
def test_no_organ_is_worse_than_with_plain_thresholds(scores: Scores) -> None:
    """In cross-fitting; and what a plain threshold is worth there is worked out here once more, slide by slide."""
    results = {result.organ: result for result in tune(scores)}
    assert set(results) == set(scores.organs) and sum(result.slides for result in results.values()) == len(scores)
    plain = scores.bare[0]
    for organ, result in results.items():
        rows = np.flatnonzero(scores.organs == organ)
        assert result.crossed >= result.plain_crossed
        assert result.plain_threshold == best_threshold(plain[rows].mean(0))
        assert result.same == pytest.approx(np.mean([scores.at(row, result.choice) for row in rows]))
        alone = len(set(scores.folds[rows])) == 1
        worth = []
        for row in rows:
            kept = [
                other
                for other in range(len(scores))
                if (other != row if alone else scores.folds[other] != scores.folds[row])
            ]
            mine = [other for other in kept if scores.organs[other] == organ] or kept
            threshold = best_threshold(plain[mine].mean(0)) if mine else 0.5
            worth.append(plain[row, np.abs(THRESHOLDS - threshold).argmin()])
        assert result.plain_crossed == pytest.approx(np.mean(worth))


@given(any_scores())
@settings(deadline=None, max_examples=40)
def test_the_band_holds_the_peak_and_nothing_that_is_surely_lower(scores: Scores) -> None:
    low, high = band(THRESHOLDS, scores.bare[0])
    peak = scores.bare[0].mean(0).argmax()
    assert low <= THRESHOLDS[peak] <= high
    for at in np.flatnonzero((low <= THRESHOLDS) & (high >= THRESHOLDS)):
        behind = scores.bare[0][:, peak] - scores.bare[0][:, at]
        assert behind.mean() <= (behind.std(ddof=1) / np.sqrt(len(behind)) if len(behind) > 1 else 0) + 1e-12


@pytest.fixture(scope="module")
def tuned(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("tuned") / "run"
    shutil.copytree(tiny_run, run)
    tune_thresholds(run, device="cpu", stores=tiny_run.parent / "stores")
    return run


def test_what_is_left_in_the_run(tuned: Path, tiny_run: Path) -> None:
    assert (tuned / "thresholds.plain.json").read_bytes() == (tiny_run / "thresholds.json").read_bytes()
    written = json.loads((tuned / "postprocess.json").read_text())
    thresholds = read_thresholds(tuned)
    assert thresholds == written["thresholds"]
    choices = read_fitted(tuned, thresholds)
    assert set(choices) == set(written["organs"]) == {result["organ"] for result in written["results"]}
    assert all(each.rescue for each in choices.values()), "every slide of the sample has a unit"
    assert (tuned / "tune.png").stat().st_size > 10_000


def test_the_numbers_are_those_of_the_slides_themselves(tuned: Path, sample_data: Path) -> None:
    """Every held-out slide predicted from its file, thresholded and scored here: the mean is what was reported."""
    fold_of = dict(line.split(",")[::3] for line in (tuned / "folds.csv").read_text().splitlines()[1:])
    thresholds = read_thresholds(tuned)
    found: dict[str, list[float]] = {}
    for one in read_train(sample_data / "train.csv"):
        ensemble = load_ensemble(tuned, torch.device("cpu"), [int(fold_of[one.id])])
        config = with_fitted(ensemble.experiment.inference, read_fitted(tuned, thresholds))
        pixels = slide_files.read(one.path)
        plane = ensemble.probability(pixels, one.um_per_px)
        assert choices_for(one.organ, config).rescue
        mask = to_mask(plane, threshold_for(one.organ, one.source, thresholds, config), one.organ, config)
        found.setdefault(one.organ, []).append(rle.dice(rle.encode(mask), one.rle or ""))
    results = {result["organ"]: result for result in json.loads((tuned / "postprocess.json").read_text())["results"]}
    for organ, values in found.items():
        assert results[organ]["same"] == pytest.approx(
            np.mean(values), abs=0.01
        )  # a probability on the threshold itself may fall either way


def test_tuning_again_keeps_the_plain_thresholds_and_gives_the_same(
    tuned: Path, tiny_run: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    tune_thresholds(run, device="cpu", stores=tiny_run.parent / "stores")
    for name in ("thresholds.json", "thresholds.plain.json", "postprocess.json"):
        assert (run / name).read_bytes() == (tuned / name).read_bytes()


def test_thresholds_that_were_fitted_anew_put_the_steps_out_of_use(tuned: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tuned, run)
    shutil.copy(run / "thresholds.plain.json", run / "thresholds.json")
    plain = read_thresholds(run)
    if plain != read_thresholds(tuned):
        assert read_fitted(run, plain) == {}
    (run / "thresholds.json").write_text(json.dumps(plain | {"lung": 0.123}))
    assert read_fitted(run, read_thresholds(run)) == {}


@pytest.mark.parametrize(
    "key", ["threshold=0.3", "thresholds={lung: 0.1}", "source_thresholds={}", "postprocess.shrink=2"]
)
def test_what_is_fitted_cannot_be_given(tiny_run: Path, key: str) -> None:
    with pytest.raises(ConfigError, match="hubmap predict"):
        tune_thresholds(tiny_run, overrides=[f"inference.{key}"], device="cpu")


def test_a_run_without_its_split_or_without_weights_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run, ignore=shutil.ignore_patterns("model.safetensors", "last.ckpt"))
    with pytest.raises(CheckpointError, match="no trained fold"):
        tune_thresholds(run, device="cpu", stores=tiny_run.parent / "stores")
    (run / "folds.csv").unlink()
    with pytest.raises(CheckpointError, match=r"folds\.csv"):
        tune_thresholds(run, device="cpu", stores=tiny_run.parent / "stores")
