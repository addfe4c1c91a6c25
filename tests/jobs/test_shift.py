"""The shifted validation on a trained run: what it counts, that it goes on after a kill, what makes it count anew, what
it leaves.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
import torch

from hubmap_kit.augment.shift import HUBMAP, PLAIN, shifted
from hubmap_kit.augment.stain import reinhard
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.metric import dice
from hubmap_kit.competition.tables import read_train
from hubmap_kit.errors import CheckpointError, ConfigError, TableError
from hubmap_kit.inference.ensemble import load_ensemble, read_thresholds
from hubmap_kit.inference.normalise import read_references
from hubmap_kit.jobs.evaluate import evaluate_shifted, looks_of, preview
from hubmap_kit.report.overlays import PREDICTION, TRUTH
from hubmap_kit.tiles.store import decode_for

SHIFTS = "he,hubmap"
SETTINGS = {"device": "cpu", "shifts": SHIFTS, "views": "none"}


@pytest.fixture(scope="module")
def evaluated(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was evaluated without a break."""
    run = tmp_path_factory.mktemp("shifted") / "run"
    shutil.copytree(tiny_run, run)
    evaluate_shifted(run, **SETTINGS)
    return run


@pytest.fixture
def run(evaluated: Path, tmp_path: Path) -> Path:
    """A copy of it for a test to change."""
    return Path(shutil.copytree(evaluated, tmp_path / "run"))


def results(run: Path) -> dict[str, int]:
    """Every kept result, and when it was written."""
    return {f"{path.parent.name}/{path.stem}": path.stat().st_mtime_ns for path in (run / "shift").glob("*/*.npz")}


def redone(before: dict[str, int], run: Path) -> set[str]:
    return {key for key, written in results(run).items() if before.get(key) != written}


def test_every_row_is_the_dice_of_the_shifted_slide_by_the_fold_that_never_saw_it(
    evaluated: Path, sample_data: Path
) -> None:
    table = pd.read_csv(evaluated / "shift.csv", dtype={"id": str})
    folds = pd.read_csv(evaluated / "folds.csv", dtype={"id": str}).set_index("id")["fold"]
    slides = {slide.id: slide for slide in read_train(sample_data / "train.csv")}
    assert list(table.columns[:7]) == ["id", "organ", "source", "fold", "shift", "dice", "dice@0.5"]
    assert sorted(zip(table["id"], table["shift"], strict=True)) == sorted(
        (i, shift) for i in slides for shift in (PLAIN, "he", HUBMAP)
    )
    looks, thresholds = looks_of("", [HUBMAP]), read_thresholds(evaluated)
    words = ["inference.views=none", "inference.tune_speed=false"]
    ensembles = {fold: load_ensemble(evaluated, torch.device("cpu"), [fold], words) for fold in (0, 1)}
    by_the_other = []
    for row in table[table["shift"] != "he"].to_dict("records"):
        slide = slides[row["id"]]
        assert row["fold"] == folds[slide.id] and (row["organ"], row["source"]) == (slide.organ, slide.source)
        pixels = slide_files.read(slide.path)
        made = shifted(
            row["shift"], pixels, decode_for(slide, *pixels.shape[:2]), slide.organ, slide.um_per_px, slide.id, looks
        )
        planes = {
            fold: ensemble.probability(made.image, made.um_per_px, organ=slide.organ)
            for fold, ensemble in ensembles.items()
        }
        found = {fold: dice(plane >= np.float32(thresholds[slide.organ]), made.mask) for fold, plane in planes.items()}
        assert row["dice"] == pytest.approx(found[row["fold"]], abs=2e-6)
        assert row["dice@0.5"] == pytest.approx(dice(planes[row["fold"]] >= 0.5, made.mask), abs=2e-6)
        assert (row["height"], row["width"], row["um_per_px"]) == (*made.mask.shape, pytest.approx(made.um_per_px))
        by_the_other.append(abs(row["dice"] - found[1 - row["fold"]]))
    assert max(by_the_other) > 0.01  # the folds differ, so the right one was asked


def test_plain_slides_have_their_out_of_fold_dice(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    table = evaluate_shifted(run, device="cpu", shifts="plain", pictures=False).table.set_index("id")
    oof = pd.read_csv(run / "oof.csv", dtype={"id": str}).set_index("id").loc[table.index]
    # The store keeps slides that OpenCV resized, here the slide itself is resized: the same but for rounding.
    np.testing.assert_allclose(table["dice@0.5"], oof["dice@0.5"], atol=0.02)
    np.testing.assert_allclose(table["dice"], oof["dice"], atol=0.02)


KILLED = (
    "from pathlib import Path; from hubmap_kit.jobs.evaluate import evaluate_shifted;"
    " evaluate_shifted(Path({run!r}), **{settings!r})"
)


def test_a_killed_evaluation_goes_on(tiny_run: Path, tmp_path: Path) -> None:
    settings = SETTINGS | {"shifts": "jpeg", "pictures": False}
    run, whole = (Path(shutil.copytree(tiny_run, tmp_path / name)) for name in ("run", "whole"))
    evaluate_shifted(whole, **settings)
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED.format(run=str(run), settings=settings)], stderr=subprocess.DEVNULL
    )
    while len(results(run)) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    before = results(run)
    assert 5 <= len(before) < 20
    assert not (run / "shift.csv").exists()
    evaluate_shifted(run, **settings)
    assert redone(before, run) == set(results(whole)) - set(before)
    assert (run / "shift.csv").read_bytes() == (whole / "shift.csv").read_bytes()


def test_what_results_depend_on_makes_them_anew_and_nothing_else_does(run: Path, tmp_path: Path) -> None:
    before = results(run)
    (run / "thresholds.json").write_text(
        json.dumps(dict.fromkeys(("kidney", "prostate", "largeintestine", "spleen", "lung"), 0.33))
    )
    table = evaluate_shifted(run, **SETTINGS, pictures=False).table
    assert not redone(before, run)  # thresholds come after the counts
    assert set(table["threshold"]) == {0.33}

    damaged = run / "shift" / HUBMAP / f"{table['id'][0]}.npz"
    damaged.write_bytes(damaged.read_bytes()[:200])
    evaluate_shifted(run, **SETTINGS, pictures=False)
    assert redone(before, run) == {f"{HUBMAP}/{damaged.stem}"}

    references = tmp_path / "references"
    references.mkdir()
    drawn = slide_files.read(next(Path(data_of(run)).glob("train_images/*")))
    cv2.imwrite(str(references / "one.png"), drawn)
    before = results(run)
    evaluate_shifted(run, **SETTINGS, references=str(references), pictures=False)
    assert {key.partition("/")[0] for key in redone(before, run)} == {"he", HUBMAP}  # plain slides need no reference

    before = results(run)
    shutil.copyfile(run / "fold0" / "model.safetensors", run / "fold1" / "model.safetensors")
    evaluate_shifted(run, **SETTINGS, references=str(references), pictures=False)
    assert {key.partition("/")[2] for key in redone(before, run)} == set(table.loc[table["fold"] == 1, "id"])


def test_what_normalisation_gains_is_measured_on_shifted_slides_alone(run: Path, sample_data: Path) -> None:
    before, plain = results(run), pd.read_csv(run / "shift.csv", dtype={"id": str})
    wish = ["inference.normalise=[reinhard]"]
    table = evaluate_shifted(run, **SETTINGS, overrides=wish, pictures=False).table
    assert {key.partition("/")[0] for key in redone(before, run)} == {"he", HUBMAP}  # plain slides are HPA's own
    both = table.merge(plain, on=["id", "shift"], suffixes=("", "_raw"))
    assert (
        np.abs(both["dice"] - both["dice_raw"])[both["shift"] == PLAIN].max()
        < 1e-6
        < np.abs(both["dice"] - both["dice_raw"]).max()
    )
    assert "(reinhard)" in (run / "shift.html").read_text(encoding="utf-8")

    row = table[table["shift"] == "he"].iloc[0]
    slide = next(slide for slide in read_train(sample_data / "train.csv") if slide.id == row["id"])
    pixels = slide_files.read(slide.path)
    made = shifted(
        "he",
        pixels,
        decode_for(slide, *pixels.shape[:2]),
        slide.organ,
        slide.um_per_px,
        slide.id,
        looks_of("", [HUBMAP]),
    )
    raw = load_ensemble(run, torch.device("cpu"), [row["fold"]], ["inference.views=none", "inference.tune_speed=false"])
    size = tuple(
        round(side * slide.um_per_px / 3.2) for side in made.mask.shape[::-1]
    )  # the run's scale is 3.2 um a pixel
    small = cv2.resize(made.image, size, interpolation=cv2.INTER_AREA)
    other = read_references(run, int(row["fold"]))[slide.organ]
    assert pd.read_csv(run / "folds.csv", dtype={"id": str}).set_index("id")["fold"][other.name] != row["fold"]
    planes = [raw.plane(image, organ=slide.organ) for image in (small, reinhard(small, other))]
    plane = cv2.resize(np.mean(planes, axis=0), made.mask.shape[::-1], interpolation=cv2.INTER_LINEAR)
    assert row["dice"] == pytest.approx(dice(plane >= np.float32(row["threshold"]), made.mask), abs=2e-4)

    done = results(run)
    evaluate_shifted(run, **SETTINGS, overrides=wish, pictures=False)
    assert not redone(done, run)
    (run / "stain_references.json").unlink()
    with pytest.raises(CheckpointError, match=r"stain_references\.json is missing"):
        evaluate_shifted(run, **SETTINGS, overrides=wish, pictures=False)


def data_of(run: Path) -> str:
    from hubmap_kit import experiment

    return experiment.read(run / "config.yaml").data.folder


def test_the_page_tells_the_figures_and_shows_the_worst_slides(run: Path) -> None:
    report = evaluate_shifted(run, **SETTINGS)
    page, table = (run / "shift.html").read_text(encoding="utf-8"), report.table
    means = table.pivot_table("dice", "organ", "shift")
    rows = [re.sub(r"<[^>]+>", " ", row).split() for row in re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)]
    for organ, row in means.iterrows():
        assert [organ, "2", f"{row[PLAIN]:.4f}", f"{row[HUBMAP]:.4f}", f"{row[PLAIN] - row[HUBMAP]:.4f}"] in [
            cells[:5] for cells in rows
        ]
        assert [
            organ,
            f"{row[PLAIN]:.4f}",
            f"{row['he'] - row[PLAIN]:+.4f}",
            f"{row[HUBMAP] - row[PLAIN]:+.4f}",
        ] in rows
        assert organ in report.summary and f"{row[HUBMAP]:.4f}" in report.summary
    assert not re.findall(r"""(?:src|href|srcset)=["'](?!data:|#)""", page)  # it needs nothing from elsewhere
    assert "Thresholds for both" not in page
    worst = table[table["shift"] == HUBMAP].nsmallest(5, "dice")
    pictures = sorted((run / "shift").glob("worst-*.png"))
    assert {path.stem.split("-")[2] for path in pictures} == set(worst["id"])
    assert page.count("data:image/jpeg") == 5
    sheets = [cv2.imread(str(path))[..., ::-1] for path in pictures]
    for colour in (TRUTH, PREDICTION):
        assert (
            max((sheet == colour).all(2).sum() for sheet in sheets) > 1000
        )  # an outline; the legend's square has some 170 pixels
    assert cv2.imread(str(run / "shift.png")).std() > 5


def test_thresholds_for_both_become_the_runs_and_the_plain_ones_are_kept(run: Path) -> None:
    plain = json.loads((run / "thresholds.json").read_text())
    report = evaluate_shifted(run, **SETTINGS, fit=True, pictures=False)
    assert report.fits is not None
    fitted = {fit.organ: fit.threshold for fit in report.fits}
    assert json.loads((run / "thresholds.plain.json").read_text()) == plain
    assert read_thresholds(run) == fitted
    assert {
        row["organ"]: row["threshold"] for row in report.table.to_dict("records")
    } == plain  # the figures are at the former ones
    assert "crossed" in report.summary and "Thresholds for both" in (run / "shift.html").read_text(encoding="utf-8")
    again = evaluate_shifted(run, **SETTINGS, fit=True, pictures=False)
    assert json.loads((run / "thresholds.plain.json").read_text()) == plain
    assert {row["organ"]: row["threshold"] for row in again.table.to_dict("records")} == fitted
    for fit in again.fits or ():
        mine = again.table[(again.table["organ"] == fit.organ) & again.table["shift"].isin([PLAIN, HUBMAP])]
        assert fit.dice_before == pytest.approx(mine["dice"].mean())


def test_bad_wishes_are_refused_in_a_sentence(run: Path, tmp_path: Path, sample_data: Path) -> None:
    for wish, said in (
        ({"battery": "hubmpa"}, "did you mean 'hubmap'"),
        ({"views": "flip"}, "did you mean 'flips'"),
        ({"shifts": "stain"}, "known are plain"),
        ({"shifts": "he", "fit": True}, "--fit needs the shift hubmap"),
        ({"references": str(tmp_path / "none")}, "name a folder"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            evaluate_shifted(run, **({"device": "cpu"} | wish))
    with pytest.raises(TableError, match="has no slide 12"):
        preview(tmp_path / "sheet.png", str(sample_data), "12")
    for folder in ("fold0", "fold1"):
        shutil.rmtree(run / folder)
    with pytest.raises(CheckpointError, match="no trained fold"):
        evaluate_shifted(run, device="cpu")
    (run / "folds.csv").unlink()
    with pytest.raises(CheckpointError, match=r"no folds\.csv"):
        evaluate_shifted(run, device="cpu")


def test_a_sheet_of_one_slide_under_all_shifts(sample_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    assert preview(out, str(sample_data)) == 8
    sheet = cv2.imread(str(out))[..., ::-1]
    assert sheet.shape[1] == 4 * 492 + 12
    assert (sheet == TRUTH).all(2).sum() > 8 * 300
