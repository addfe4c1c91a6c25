"""Labels by an ensemble: who may give them, what the tables say, and that work goes on where it stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hubmap_kit.cli.registry import app
from hubmap_kit.competition import external, rle, slides
from hubmap_kit.competition.external import read_table
from hubmap_kit.competition.tables import TEST_COLUMNS, read_test, read_train
from hubmap_kit.errors import CheckpointError, TableError
from hubmap_kit.files import write_yaml
from hubmap_kit.inference.ensemble import load_ensemble, run_settings
from hubmap_kit.jobs.external import fold_numbers_of, merge
from hubmap_kit.jobs.labellers import Rules
from hubmap_kit.jobs.pseudo import pseudo, rules_from

FAST = ["inference.views=none", "inference.tune_speed=false"]
ALL = Rules(0, 0, 0, dict.fromkeys(("kidney", "prostate", "largeintestine", "spleen", "lung"), (0.0, 1.0)))
Row = dict[str, str]


def labelled(runs: Sequence[Path], data: Path, out: Path, rules: Rules = ALL, **more: object) -> dict[str, Row]:
    """Label without refusing anything; the train rows by id."""
    pseudo(runs, data, out, rules, overrides=FAST, device="cpu", **more)  # type: ignore[arg-type]
    return {row["id"]: row for row in read_table(out / "train.csv")}


@pytest.fixture
def run(tiny_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_run, tmp_path / "run")


@pytest.fixture
def foreign(sample_data: Path, tmp_path: Path) -> Path:
    """Unlabelled slides that no run has seen: the name of the table's slides, and the first two slides' pixels in
    them.
    """
    folder = tmp_path / "foreign"
    rows = read_table(sample_data / "test.csv", TEST_COLUMNS)[:2]
    (folder / "test_images").mkdir(parents=True)
    for row in rows:
        shutil.copy(sample_data / f"test_images/{row['id']}.tiff", folder / "test_images")
    external.write_table(folder / "test.csv", [{**row, "parent": "", "licence": "CC0"} for row in rows], ())
    return folder


def rename(folder: Path, parents: dict[str, str]) -> None:
    """Give the foreign slides other ids, and parents."""
    rows = read_table(folder / "test.csv", TEST_COLUMNS)
    for row, (name, parent) in zip(rows, parents.items(), strict=True):
        (folder / f"test_images/{row['id']}.tiff").rename(folder / f"test_images/{name}.tiff")
        row |= {"id": name, "parent": parent}
    external.write_table(folder / "test.csv", rows, ())


def spoil(run: Path, fold: int) -> None:
    """Other weights for one fold."""
    path = run / f"fold{fold}/model.safetensors"
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: tensor + torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and "var" not in name
        else tensor
        for name, tensor in load_file(path).items()
    }
    save_file(weights, path)


def test_a_training_slide_is_labelled_by_the_fold_that_held_it_out_alone(
    run: Path, sample_data: Path, tmp_path: Path
) -> None:
    folds, table = fold_numbers_of(run / "folds.csv"), sample_data / "train.csv"
    before = labelled([run], table, tmp_path / "before")
    for slide in read_train(table):
        row, fold = before[slide.id], folds[slide.id]
        ensemble = load_ensemble(run, torch.device("cpu"), [fold], FAST)
        plane = ensemble.probability(slides.read(slide.path), slide.um_per_px, organ=slide.organ)
        assert row["rle"] == rle.encode(plane >= np.float32(ensemble.thresholds[slide.organ]))
        assert row["fold"] == str(fold) and row["parent"] == slide.id
        assert row["provenance"].split()[0].startswith("pseudo:") and row["provenance"].split()[1:] == [
            f"run/fold{fold}"
        ]
    spoil(run, 1)
    after = labelled([run], table, tmp_path / "after")
    changed = {slide_id for slide_id in folds if after[slide_id]["rle"] != before[slide_id]["rle"]}
    assert changed and all(folds[slide_id] == 1 for slide_id in changed), (
        "a fold's weights reach only the slides that it held out"
    )


@pytest.mark.parametrize("kinship", ["child", "grandchild", "duplicate", "parent of a training slide"])
def test_relatives_of_a_training_slide_are_labelled_by_its_fold(
    kinship: str, run: Path, sample_data: Path, foreign: Path, tmp_path: Path
) -> None:
    folds = fold_numbers_of(run / "folds.csv")
    known = next(slide_id for slide_id, fold in folds.items() if fold == 1)
    names = {"crop": known, "stranger": ""}
    if kinship == "grandchild":
        names = {"crop": "middle", "middle": known}
    elif kinship == "duplicate":
        names = {"32741": "", "stranger": ""}
        (run / "folds.csv").write_text((run / "folds.csv").read_text() + "6730,prostate,HPA,1\n")
    elif kinship == "parent of a training slide":
        names = {"mother": "", "stranger": ""}
        data = shutil.copytree(sample_data, tmp_path / "data")
        rows = read_table(data / "train.csv")
        external.write_table(
            data / "train.csv", [{**row, "parent": "mother" if row["id"] == known else ""} for row in rows], ()
        )
        settings = run_settings(run, [], str(data))
        write_yaml(run / "config.yaml", settings.model_dump(mode="json"))
    rename(foreign, names)
    found = labelled([run], foreign, tmp_path / "out")
    for name, row in found.items():
        mine = name != "stranger"
        assert (row["fold"], row["provenance"].split()[1:]) == (
            ("1", ["run/fold1"]) if mine else ("", ["run/fold0", "run/fold1"])
        ), name


def test_descendants_stay_in_the_fold_of_their_tissue_when_tables_are_joined(
    run: Path, sample_data: Path, foreign: Path, tmp_path: Path
) -> None:
    folds = fold_numbers_of(run / "folds.csv")
    one, other = (next(slide_id for slide_id, fold in folds.items() if fold == number) for number in (0, 1))
    rename(foreign, {"x1": one, "x2": other})
    labelled([run], foreign, tmp_path / "pseudo")
    merge([sample_data, tmp_path / "pseudo"], tmp_path / "all", folds_csv=run / "folds.csv")
    assert fold_numbers_of(tmp_path / "all/folds.csv") == {**folds, "x1": 0, "x2": 1}
    labelled([run], sample_data / "train.csv", tmp_path / "anew", only=[one])
    done = merge([sample_data, tmp_path / "anew"], tmp_path / "replaced", replace=True, folds_csv=run / "folds.csv")
    assert (
        list(done.by_table.values()) == [len(folds) - 1, 1]
        and fold_numbers_of(tmp_path / "replaced/folds.csv") == folds
    )
    masks = {slide.id: slide.rle for slide in read_train(tmp_path / "replaced/train.csv")}
    assert masks[one] == read_train(tmp_path / "anew/train.csv")[0].rle


def test_without_the_fold_that_held_it_out_nobody_labels_a_slide(
    run: Path, sample_data: Path, foreign: Path, tmp_path: Path
) -> None:
    folds = fold_numbers_of(run / "folds.csv")
    (run / "fold1/model.safetensors").unlink()
    done = pseudo([run], sample_data / "train.csv", tmp_path / "out", ALL, overrides=FAST, device="cpu")
    assert done.refused == {
        slide_id: "no fold that is here has held it out" for slide_id, fold in folds.items() if fold == 1
    }
    assert set(done.kept) == {slide_id for slide_id, fold in folds.items() if fold == 0}
    found = labelled([run], foreign, tmp_path / "one", folds=[0])
    assert all(row["provenance"].endswith(" run/fold0") for row in found.values())
    with pytest.raises(CheckpointError, match=r"holds the folds \[0\], not \[1\]"):
        labelled([run], foreign, tmp_path / "two", folds=[1])


def test_runs_label_together_or_say_why_not(run: Path, foreign: Path, sample_data: Path, tmp_path: Path) -> None:
    second = shutil.copytree(run, tmp_path / "second")
    spoil(second, 0)
    found = labelled([run, second], foreign, tmp_path / "out")
    for slide in read_test(foreign / "test.csv"):
        pixels = slides.read(slide.path)
        ensembles = [load_ensemble(one, torch.device("cpu"), [fold], FAST) for one in (run, second) for fold in (0, 1)]
        planes = [
            ensemble.probability(pixels, slide.um_per_px, organ=slide.organ).astype(np.float64)
            for ensemble in ensembles
        ]
        threshold = ensembles[0].thresholds[slide.organ]
        expected, given = (
            np.mean(planes, axis=0) >= threshold,
            rle.decode(found[slide.id]["rle"], *pixels.shape[:2]) > 0,
        )
        assert (expected != given).sum() <= 2, "but for float32's last digit"
        row = next(row for row in read_table(tmp_path / "out/pseudo.csv", ("id",)) if row["id"] == slide.id)
        masks = [plane >= threshold for plane in planes]
        pairs = [
            2 * (a & b).sum() / max(1, a.sum() + b.sum()) if (a.any() or b.any()) else 1.0
            for i, a in enumerate(masks)
            for b in masks[:i]
        ]
        assert float(row["agreement"]) == pytest.approx(np.mean(pairs), abs=2e-3) and float(
            row["coverage"]
        ) == pytest.approx(expected.mean(), abs=1e-3)
    lines = (second / "folds.csv").read_text().splitlines()
    (second / "folds.csv").write_text(
        "\n".join([lines[0], *(line[:-1] + str(1 - int(line[-1])) for line in lines[1:])]) + "\n"
    )
    with pytest.raises(TableError, match="need runs of one split"):
        labelled([run, second], sample_data / "train.csv", tmp_path / "no")
    (second / "folds.csv").unlink()
    with pytest.raises(CheckpointError, match="nobody knows which slides its folds have seen"):
        labelled([second], foreign, tmp_path / "no")


def test_predictions_are_kept_and_a_cut_line_is_made_again(run: Path, foreign: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = labelled([run], foreign, out)
    one, other = first
    (kept,) = (out / "versions").glob("predictions-*.jsonl")
    lines = [line for line in kept.read_text().splitlines() if line]
    mark = json.loads(lines[0]) | {"rle": "5 2"}  # nobody would predict this
    assert mark["id"] == one and first[one]["rle"] != "5 2"
    kept.write_text(json.dumps(mark) + "\n" + lines[1][:60])
    second = labelled([run], foreign, out)
    assert second[one]["rle"] == "5 2" and second[other] == first[other]
    assert labelled([run], foreign, out) == second
    spoil(run, 0)
    assert labelled([run], foreign, out)[one]["rle"] != "5 2", "other weights predict anew"


def test_every_slide_is_told_and_versions_are_kept(run: Path, foreign: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    labelled([run], foreign, out)
    lax = json.loads((out / "pseudo.json").read_text())
    names = [slide.id for slide in read_test(foreign / "test.csv")]
    (foreign / f"test_images/{names[0]}.tiff").write_bytes(b"II*\0 and no more")
    strict = pseudo([run], foreign, out, Rules(0.5, 1, 1, ALL.coverage), overrides=FAST, device="cpu")
    assert strict.kept == [] and "damaged" in strict.refused[names[0]] and "below" in strict.refused[names[1]]
    rows = read_table(out / "pseudo.csv", ("id", "kept"))
    assert [(row["id"], row["kept"], row["reasons"]) for row in rows] == [
        (name, "0", strict.refused[name]) for name in names
    ]
    assert (
        read_table(out / "train.csv") == []
        and not (out / "kept.png").exists()
        and (out / "refused.png").stat().st_size > 1000
    )
    assert strict.version != lax["version"] and lax["kept"] == 2
    assert len(read_table(out / "versions" / lax["version"] / "train.csv")) == 2
    assert json.loads((out / "versions" / strict.version / "pseudo.json").read_text())["rules"]["inside"] == 1


def test_the_verb(run: Path, foreign: Path, tmp_path: Path) -> None:
    words = [
        "pseudo",
        str(run),
        "--data",
        str(foreign),
        "--out",
        str(tmp_path / "out"),
        "--device",
        "cpu",
        "--weight",
        "0.5",
        "--confidence",
        "0",
        "--inside",
        "0",
    ]
    words += ["--agreement", "0", *(word for setting in FAST for word in ("--set", setting))]
    words += [word for organ in ALL.coverage for word in ("--coverage", f"{organ}=0:1")]
    done = CliRunner().invoke(app, words, catch_exceptions=False)
    assert "2 slides kept, 0 refused" in done.output
    assert [row["weight"] for row in read_table(tmp_path / "out/train.csv")] == ["0.5", "0.5"]
    assert all(row["licence"] == "CC0" for row in read_table(tmp_path / "out/train.csv"))
    kept = read_train(tmp_path / "out/train.csv")
    assert all(slide.path.is_symlink() for slide in kept) and (tmp_path / "out/kept.png").is_file()


def test_what_cannot_be_is_one_sentence(run: Path, foreign: Path, tmp_path: Path) -> None:
    for words in (
        (0.6, 0.5, 0.8, []),
        (0.3, 2, 0.8, []),
        (0.3, 0.5, -1, []),
        (0.3, 0.5, 0.8, ["liver=0:1"]),
        (0.3, 0.5, 0.8, ["lung=0.5:0.1"]),
        (0.3, 0.5, 0.8, ["lung"]),
    ):
        with pytest.raises(TableError, match="^--"):
            rules_from(*words)
    assert rules_from(0.1, 0.2, 0.3, ["lung=0:0.5"]).plain()["coverage"]["lung"] == [0, 0.5]
    with pytest.raises(TableError, match="--weight is 0"):
        pseudo([run], foreign, tmp_path / "out", weight=0)
    with pytest.raises(TableError, match="has no slide nobody"):
        pseudo([run], foreign, tmp_path / "out", only=["nobody"])
