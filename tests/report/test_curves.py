"""Curves: valid PNG files for every shape of a metrics table, with every fold's colour in them, and no global state."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import PostprocessChoices
from hubmap_kit.errors import TableError
from hubmap_kit.report import curves
from hubmap_kit.report.tables import tune_summary
from hubmap_kit.training.tune import CANDIDATES, Choice, OrganResult, Scores, SlideScores, grid_of


def table(folds: int, epochs: int) -> pd.DataFrame:
    random, rows = np.random.default_rng(folds * 1000 + epochs), []
    for fold in range(folds):
        for epoch in range(epochs):
            done = 1 - np.exp(-epoch / (epochs / 3 + 1)) + 0.02 * fold
            row = {"fold": fold, "epoch": epoch, "train_loss": 1 - done, "val_loss": 1.1 - done, "dice": 0.8 * done}
            row |= {"lr": 1e-3 / (epoch + 1)} | {f"dice_{organ}": random.random() * done for organ in ORGANS}
            rows.append(row)
    return pd.DataFrame(rows)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return np.array(picture.convert("RGB")).astype(int)


def count(picture: np.ndarray, colour: str) -> int:
    """Pixels of nearly this colour; anti-aliasing leaves few that are exact."""
    return int((np.abs(picture - np.round(np.array(to_rgb(colour)) * 255)).max(axis=2) < 12).sum())


@pytest.mark.parametrize(("folds", "epochs"), [(1, 200), (3, 2), (5, 1)])
def test_every_fold_is_drawn_in_its_colour(tmp_path: Path, folds: int, epochs: int) -> None:
    curves.save_curves(tmp_path / "curves.png", table(folds, epochs), "five folds")
    picture = pixels(tmp_path / "curves.png")
    assert picture.shape[0] > 600 and picture.shape[1] > 1200
    for position, colour in enumerate(curves.COLOURS[:5]):
        assert (count(picture, colour) > 20) == (position < folds), colour


def test_more_folds_than_colours(tmp_path: Path) -> None:
    curves.save_curves(tmp_path / "curves.png", table(9, 4))
    assert pixels(tmp_path / "curves.png").size


def test_organs_get_panels_of_their_own(tmp_path: Path) -> None:
    metrics = table(2, 10)
    curves.save_curves(tmp_path / "with.png", metrics)
    curves.save_curves(tmp_path / "without.png", metrics.drop(columns=[f"dice_{organ}" for organ in ORGANS]))
    assert pixels(tmp_path / "with.png").shape[0] > pixels(tmp_path / "without.png").shape[0] + 200


COLUMNS, HOLES = (
    ("train_loss", "val_loss", "dice", "lr", "dice_lung"),
    ("absent", "all NaN", "some NaN", "infinite", "None"),
)


@pytest.mark.parametrize("shift", range(len(HOLES)))
@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
def test_holes_in_the_table_are_left_out(tmp_path: Path, shift: int) -> None:
    """Each column has a hole of another kind; over all shifts, every column has had every kind."""
    metrics = table(2, 6)
    for number, column in enumerate(COLUMNS):
        how = HOLES[(number + shift) % len(HOLES)]
        if how == "absent":
            metrics = metrics.drop(columns=column)
        elif how == "None":
            metrics[column] = metrics[column].astype(object)
            metrics.loc[1, column] = None
        else:
            rows = slice(None) if how == "all NaN" else slice(2, 4)
            metrics.loc[rows, column] = np.inf if how == "infinite" else np.nan
    before = metrics.copy()
    curves.save_curves(tmp_path / "curves.png", metrics)
    pd.testing.assert_frame_equal(metrics, before)
    assert count(pixels(tmp_path / "curves.png"), curves.COLOURS[1]) > 20


def test_only_fold_and_epoch_still_make_a_picture(tmp_path: Path) -> None:
    curves.save_curves(tmp_path / "curves.png", table(1, 3)[["fold", "epoch"]])
    assert pixels(tmp_path / "curves.png").min() < 200


def test_the_order_of_the_rows_does_not_matter(tmp_path: Path) -> None:
    metrics = table(3, 8)
    curves.save_curves(tmp_path / "a.png", metrics)
    curves.save_curves(tmp_path / "b.png", metrics.sample(frac=1, random_state=0))
    assert np.array_equal(pixels(tmp_path / "a.png"), pixels(tmp_path / "b.png"))


def test_the_best_epoch_moves_the_star(tmp_path: Path) -> None:
    metrics, columns = table(1, 20)[["fold", "epoch", "dice"]], []
    metrics["val_loss"] = 0.5  # a flat line in the left panel, on which only the star can move
    for best in (3, 16):
        metrics["dice"] = 0.5
        metrics.loc[best, "dice"] = 0.6
        curves.save_curves(tmp_path / "curves.png", metrics)
        panel = pixels(tmp_path / "curves.png")[:, :500]
        blue = np.abs(panel - np.round(np.array(to_rgb(curves.COLOURS[0])) * 255)).max(axis=2) < 12
        columns.append(int(blue.sum(axis=0).argmax()))
    assert columns[1] - columns[0] > 100


@pytest.mark.parametrize("metrics", [pd.DataFrame(), table(1, 2).drop(columns="fold"), table(1, 2).iloc[:0]])
def test_a_table_without_rows_or_keys_is_refused(tmp_path: Path, metrics: pd.DataFrame) -> None:
    with pytest.raises(TableError, match=r"curves\.png"):
        curves.save_curves(tmp_path / "curves.png", metrics)
    assert not list(tmp_path.iterdir())


def threshold_curves() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    thresholds = np.linspace(0.05, 0.95, 19)
    return thresholds, {organ: 0.9 - (thresholds - 0.2 - 0.1 * index) ** 2 for index, organ in enumerate(ORGANS)}


def test_threshold_curves_mark_the_chosen_point(tmp_path: Path) -> None:
    thresholds, values = threshold_curves()
    chosen = {organ: float(thresholds[curve.argmax()]) for organ, curve in values.items()}
    curves.save_threshold_curves(tmp_path / "with.png", thresholds, values, chosen)
    curves.save_threshold_curves(tmp_path / "without.png", thresholds, values, {})
    marked, plain = pixels(tmp_path / "with.png"), pixels(tmp_path / "without.png")
    assert marked.shape == plain.shape
    for colour in curves.COLOURS[:5]:
        assert count(plain, colour) > 100
        assert count(marked, colour) > count(plain, colour)


@pytest.mark.filterwarnings("error::RuntimeWarning", "error::UserWarning")
def test_threshold_curves_with_holes(tmp_path: Path) -> None:
    thresholds, values = threshold_curves()
    values["lung"][:] = np.nan
    values["spleen"][3:6] = np.nan
    curves.save_threshold_curves(tmp_path / "curves.png", thresholds, values, {"lung": 0.1, "spleen": 0.22})
    curves.save_threshold_curves(tmp_path / "one.png", thresholds[:1], {"lung": np.array([0.3])}, {"lung": 0.05})
    curves.save_threshold_curves(tmp_path / "none.png", thresholds, {}, {})
    assert all(pixels(path).size for path in tmp_path.iterdir())


def test_threshold_curves_of_another_length_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="curve of lung"):
        curves.save_threshold_curves(tmp_path / "curves.png", np.linspace(0, 1, 5), {"lung": np.zeros(4)}, {})
    assert not list(tmp_path.iterdir())


def test_pyplot_is_never_loaded() -> None:
    """A report that is drawn in a kernel or a thread must not touch pyplot's global figures."""
    code = (
        "import sys, hubmap_kit.report.curves, hubmap_kit.report.overlays; sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# The picture and the table of a tuning.


def result_of(
    organ: str, slides: int = 3, candidate: int = 0, dice: float = 0.5, sources: dict[str, float] | None = None
) -> OrganResult:
    choice = Choice(candidate, 0.4, sources or {})
    return OrganResult(organ, slides, "steps", choice, 0.04, dice, dice - 0.1, dice + 0.1, dice + 0.05, (0.2, 0.6))


def scores_of(organs: list[str]) -> Scores:
    curves = tuple(np.sqrt(grid_of(number)) for number in range(len(CANDIDATES)))
    return Scores(organs, ["HPA"] * len(organs), [0] * len(organs), [SlideScores(curves, curves)] * len(organs))


@pytest.mark.parametrize("organs", [["lung"], ["lung", "kidney"], [*ORGANS]])
def test_every_organ_has_a_panel_in_its_colour(tmp_path: Path, organs: list[str]) -> None:
    results = [result_of(organ) for organ in organs]
    curves.save_tuning(tmp_path / "tune.png", scores_of(organs), results, True, "a title")
    picture = pixels(tmp_path / "tune.png")
    for organ, colour in zip(ORGANS, curves.COLOURS, strict=False):
        assert (count(picture, colour) > 100) == (organ in organs), organ


def test_sources_and_steps_are_drawn(tmp_path: Path) -> None:
    curves.save_tuning(tmp_path / "one.png", scores_of(["lung"]), [result_of("lung", candidate=3)], False)
    curves.save_tuning(
        tmp_path / "two.png",
        scores_of(["lung"]),
        [result_of("lung", candidate=3, sources={"HPA": 0.3, "Hubmap": 0.8})],
        False,
    )
    colour = curves.COLOURS[ORGANS.index("lung")]
    one, two = pixels(tmp_path / "one.png"), pixels(tmp_path / "two.png")
    assert count(two, colour) > count(one, colour) + 50


def test_the_table_weighs_organs_by_their_slides() -> None:
    results = [
        result_of("lung", 1, dice=0.2),
        result_of("kidney", 3, candidate=3, dice=0.6, sources={"HPA": 0.35, "Hubmap": 0.45}),
    ]
    lines = tune_summary(results, rescue=True).splitlines()
    assert [line.split()[0] for line in lines[2:]] == ["kidney", "HPA", "Hubmap", "lung", "all"]
    assert lines[2].split()[1:8] == ["3", "0.040", "0.400", "0.6000", "0.7000", "0.5000", "0.6500"]
    assert lines[2].endswith("fill, drop < 0.05 %, rescue") and lines[5].endswith(" rescue")
    assert lines[-1].split() == ["all", "4", "0.5000", "0.6000", "0.4000", "0.5500"]


def test_steps_in_words() -> None:
    assert curves.words_of(PostprocessChoices()) == "nothing"
    choices = PostprocessChoices(fill_holes=True, opening=3, min_area=0.002, shrink=4, rescue=True)
    assert curves.words_of(choices) == "fill, open 3, drop < 0.2 %, shrink 4, rescue"
