"""A run judged on a labelled folder that it has never seen: the Dice of what 'hubmap predict' would hand in, and
refusals.
"""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from hubmap_kit.cli.registry import app
from hubmap_kit.competition import rle
from hubmap_kit.competition.metric import dice
from hubmap_kit.competition.tables import read_train
from hubmap_kit.errors import TableError
from hubmap_kit.jobs.evaluate import evaluate_on
from hubmap_kit.sample.generate import generate
from hubmap_kit.tiles.store import decode_for


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Slides of another seed, under ids that the run does not know."""
    folder = tmp_path_factory.mktemp("other") / "other"
    generate(folder, seed=7, slides_per_organ=1, size=512)
    rows = list(csv.DictReader((folder / "train.csv").open(newline="")))
    for row in rows:
        (folder / "train_images" / f"{row['id']}.tiff").rename(
            folder / "train_images" / f"{int(row['id']) + 50000}.tiff"
        )
        row["id"] = str(int(row["id"]) + 50000)
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return folder


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run, tmp_path / "run"))


def test_dice_is_that_of_the_submission_of_these_slides(run: Path, other: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app, ["evaluate", str(run), "--on", str(other), "--organs", "kidney,lung", "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    assert "elsewhere/other.png" in done.stdout
    table = pd.read_csv(run / "elsewhere" / "other.csv", dtype={"id": str}).set_index("id")
    slides = [slide for slide in read_train(other / "train.csv") if slide.organ in ("kidney", "lung")]
    assert sorted(table.index) == sorted(slide.id for slide in slides)

    test = tmp_path / "test"
    shutil.copytree(other / "train_images", test / "test_images")
    rows = list(csv.DictReader((other / "train.csv").open(newline="")))
    with (test / "test.csv").open("w", newline="") as file:
        columns = [name for name in rows[0] if name not in ("rle", "age", "sex")]
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    out = tmp_path / "submission.csv"
    done = CliRunner().invoke(
        app, ["predict", str(run), "--test", str(test / "test.csv"), "--out", str(out), "--device", "cpu"]
    )
    assert done.exit_code == 0, done.output
    handed_in = {row["id"]: row["rle"] for row in csv.DictReader(out.open(newline=""))}
    for slide in slides:
        truth = decode_for(slide, slide.height, slide.width)
        # A submission never holds the first pixel, which may cost one pixel of the mask.
        assert table["dice"][slide.id] == pytest.approx(
            dice(rle.decode(handed_in[slide.id], *truth.shape), truth), abs=1e-4
        )
        assert table["dice@best"][slide.id] >= 0


def test_slides_that_the_run_has_learnt_from_are_refused(
    run: Path, sample_data: Path, other: Path, tmp_path: Path
) -> None:
    with pytest.raises(TableError, match="has learnt from .* of these slides"):
        evaluate_on(run, sample_data, device="cpu")
    # A descendant of one is refused just so.
    known = next(csv.DictReader((run / "folds.csv").open(newline="")))
    folder = Path(shutil.copytree(other, tmp_path / "descendants"))
    rows = list(csv.DictReader((folder / "train.csv").open(newline="")))
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "parent"])
        writer.writeheader()
        writer.writerows({**row, "parent": known["id"] if row["organ"] == known["organ"] else ""} for row in rows)
    mine = next(row["id"] for row in rows if row["organ"] == known["organ"])
    with pytest.raises(TableError, match=f"learnt from 1 of these slides, or from their tissue .{mine}"):
        evaluate_on(run, folder, device="cpu")


def test_one_id_for_slides_of_two_organs_is_a_coincidence(run: Path, other: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(other, tmp_path / "same-ids"))
    lung = next(row["id"] for row in csv.DictReader((run / "folds.csv").open(newline="")) if row["organ"] == "lung")
    rows = [row for row in csv.DictReader((folder / "train.csv").open(newline="")) if row["organ"] == "kidney"]
    (folder / "train_images" / f"{rows[0]['id']}.tiff").rename(folder / "train_images" / f"{lung}.tiff")
    with (folder / "train.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerow({**rows[0], "id": lung})
    assert evaluate_on(run, folder, device="cpu").table["id"].tolist() == [lung]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--organs", "lung"], "--organs goes with --on"),
        (["--on", "{other}", "--organs", "heart"], "--organs has 'heart'; expected some of kidney"),
        (["--on", "{other}", "--shift", "hubmap"], "--on is an evaluation of its own"),
        (["--on", "nowhere"], "nowhere"),
    ],
)
def test_misuse_is_one_sentence(run: Path, other: Path, words: list[str], sentence: str) -> None:
    done = CliRunner().invoke(app, ["evaluate", str(run), *(word.format(other=other) for word in words)])
    assert done.exit_code != 0
    assert sentence in str(done.exception or done.output)
