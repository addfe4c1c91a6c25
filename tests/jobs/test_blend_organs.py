"""A separate lung model: it learns from lungs alone, in the folds of a run on all organs, and is blended with that on
lungs only.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import TINY, overrides

from hubmap_kit import experiment
from hubmap_kit.__main__ import main
from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import read_test, read_train
from hubmap_kit.errors import CheckpointError, ConfigError, TableError
from hubmap_kit.inference.blend import read_blend, runs_at
from hubmap_kit.inference.ensemble import load_ensemble
from hubmap_kit.jobs.blend import blend
from hubmap_kit.kernel.kernels import infer
from hubmap_kit.kernel.mounts import COMPETITION
from hubmap_kit.training.run import plan

CPU = torch.device("cpu")
PLAIN = ["inference.views=none", "inference.tune_speed=false"]


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def lungs(sample_data: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on lungs, trained by the command line."""
    out = tmp_path_factory.mktemp("lungs") / "lungs"
    settings = overrides(*TINY, "data.organs=[lung]", "training.epochs=1", "training.seed=5")
    code = command(
        "train",
        "--config",
        "baseline",
        "--data",
        sample_data,
        "--out",
        out,
        "--stores",
        tiny_run.parent / "stores",
        "--device",
        "cpu",
        *settings,
    )
    assert code == 0
    return out


@pytest.fixture(scope="module")
def fitted(tiny_run: Path, lungs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The blend of both, the lung run named first."""
    out = tmp_path_factory.mktemp("both") / "blend"
    words = [word for setting in PLAIN for word in ("--set", setting)]
    assert (
        command(
            "blend",
            lungs,
            tiny_run,
            "--out",
            out,
            "--stores",
            tiny_run.parent / "stores",
            "--side",
            "100",
            "--device",
            "cpu",
            *words,
        )
        == 0
    )
    return out


def test_a_lung_run_has_the_folds_of_all_slides_and_judges_lungs_alone(
    lungs: Path, tiny_run: Path, sample_data: Path, tmp_path: Path
) -> None:
    assert (lungs / "folds.csv").read_text() == (tiny_run / "folds.csv").read_text()
    judged = rows(lungs / "oof.csv")
    organ_of = {slide.id: slide.organ for slide in read_train(sample_data / "train.csv")}
    assert {row["id"] for row in judged} == {name for name, organ in organ_of.items() if organ == "lung"} and len(
        judged
    ) == 2
    fold_of = {row["id"]: row["fold"] for row in rows(tiny_run / "folds.csv")}
    assert all(row["fold"] == fold_of[row["id"]] for row in judged)
    assert set(json.loads((lungs / "thresholds.json").read_text())) == {"lung"}
    # What it learns from: the rows of its store that are of other folds.
    settings = experiment.read(lungs / "config.yaml")
    planned = plan(settings, read_train(sample_data / "train.csv"), tmp_path / "again", tiny_run.parent / "stores")
    assert set(planned.store.slides["organ"]) == {"lung"} and planned.numbers == [0, 1] and len(planned.store) == 2


def test_evaluating_it_again_changes_nothing(lungs: Path, tiny_run: Path) -> None:
    before = (lungs / "oof.csv").read_text()
    assert command("evaluate", lungs, "--stores", tiny_run.parent / "stores", "--device", "cpu") == 0
    assert [row["id"] for row in rows(lungs / "oof.csv")] == [line.split(",")[0] for line in before.splitlines()[1:]]


def test_organs_and_folds_that_are_not_there_are_named(sample_data: Path, tmp_path: Path) -> None:
    slides = read_train(sample_data / "train.csv")
    lung = experiment.load("baseline", [*TINY, "data.organs=[lung]"])
    with pytest.raises(TableError, match="data.organs is lung, but none of the 8 training slides"):
        plan(lung, [slide for slide in slides if slide.organ != "lung"], tmp_path / "none", tmp_path / "stores")
    table = tmp_path / "folds.csv"
    lines = [f"{slide.id},{0 if slide.organ == 'lung' else 1}" for slide in slides]
    table.write_text("\n".join(["id,fold", *lines]) + "\n")
    held = lung.model_copy(update={"data": lung.data.model_copy(update={"folds_csv": str(table)})})
    with pytest.raises(ConfigError, match=r"fold 1 was asked for, but the split has the folds \[0\]"):
        plan(held, slides, tmp_path / "run", tmp_path / "stores", [1])


def test_a_run_has_no_weight_for_organs_that_it_does_not_know(fitted: Path, lungs: Path, tiny_run: Path) -> None:
    values = json.loads((fitted / "blend.json").read_text())
    assert [path.resolve() for path in runs_at(fitted)] == [lungs.resolve(), tiny_run.resolve()]
    for organ, each in values["organs"].items():
        assert sum(each["weights"]) == pytest.approx(1)
        if organ != "lung":
            assert each["weights"] == [0, 1] and set(each["dice"]) == {"run", "equal", "blend"}
            assert each["dice"]["run"] == each["dice"]["equal"] == each["dice"]["blend"]
    assert set(values["organs"]) == {"kidney", "prostate", "largeintestine", "spleen", "lung"}
    assert set(values["organs"]["lung"]["dice"]) == {"lungs", "run", "equal", "blend"}
    kept = {path.stem for path in (fitted / "planes" / "lungs").rglob("*.npy")}
    assert kept == {row["id"] for row in rows(lungs / "oof.csv")}
    table = rows(fitted / "blend.csv")
    assert len(table) == 10 and all((row["dice lungs"] == "") == (row["organ"] != "lung") for row in table)
    assert np.allclose(np.diag(values["correlation"]), 1) and sorted(step["run"] for step in values["greedy"]) == [
        "lungs",
        "run",
    ]
    assert values["greedy"][0]["run"] == "run"  # a run that leaves four organs empty does not come first


def test_the_order_of_the_runs_does_not_matter(fitted: Path, lungs: Path, tiny_run: Path, tmp_path: Path) -> None:
    blend([tiny_run, lungs], tmp_path / "out", "", PLAIN, "cpu", tiny_run.parent / "stores", 100)
    ours, theirs = read_blend(tmp_path / "out"), read_blend(fitted)
    assert ours.thresholds == theirs.thresholds
    for organ, weights in theirs.weights.items():
        assert ours.weights[organ][::-1] == pytest.approx(weights, abs=1e-6)


def test_one_dataset_holds_both_and_one_pass_asks_each_for_its_organs(
    fitted: Path, lungs: Path, tiny_run: Path, sample_data: Path, tmp_path: Path
) -> None:
    """As in Kaggle's kernel: the runs are named as arguments and have been moved since the blend was fitted."""
    values = json.loads((fitted / "blend.json").read_text())
    values["organs"]["lung"]["weights"] = [0.25, 0.75]
    for each in values["organs"].values():
        each["threshold"] = 0.47
    for run in values["runs"]:
        run["path"] = "moved"
    (tmp_path / "blend.json").write_text(json.dumps(values))
    root = tmp_path / "kaggle"
    for folder in ("competitions", "datasets/alice", "working", "scratch"):
        (root / folder).mkdir(parents=True)
    (root / "competitions" / COMPETITION).symlink_to(sample_data)
    from hubmap_kit.cli.push import _stage_blend

    _stage_blend(tmp_path / "blend.json", root / "datasets/alice/hubmap-kit-weights", False, [tiny_run, lungs])
    outcome = infer(PLAIN, 8.5, "cpu", root, root / "working", root / "scratch")
    assert outcome.status == "complete" and outcome.facts["blend"] == ["lungs", "run"], outcome.sentence
    found = {row["id"]: row["rle"] for row in rows(root / "working" / "submission.csv")}
    one, all_organs = (load_ensemble(run, CPU, None, PLAIN) for run in (lungs, tiny_run))
    for slide in read_test(sample_data / "test.csv"):
        pixels = slide_files.read(slide.path)
        plane = all_organs.probability(pixels, slide.um_per_px, None, slide.organ)
        if slide.organ == "lung":
            plane = (
                np.float32(0.25) * one.probability(pixels, slide.um_per_px, None, slide.organ)
                + np.float32(0.75) * plane
            )
        mask = plane >= np.float32(0.47)
        mask[0, 0] = False  # no submission holds the start 0
        assert mask.any()  # else it would be rescued
        assert found[slide.id] == rle.encode(mask)


def test_runs_are_pushed_by_name(
    tiny_run: Path, lungs: Path, fitted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the staging, which is what the arguments decide; what is wrong with them is one sentence."""
    from hubmap_kit.cli.push import _stage_blend

    for words, said in (
        (("code", lungs), "code is that of the checkout"),
        (("weights", lungs, "--staged", tmp_path), "--staged names the folder"),
        (("weights",), "needs --run, at least once"),
        (("weights", lungs, lungs), "would both be 'lungs'"),
        (("weights", lungs, "--blend", fitted), "needs the weights of run"),
        (("weights", lungs, tiny_run, tmp_path, "--blend", fitted), "does not weigh"),
        (("tiles", lungs), "not a finished tile store"),
    ):
        capsys.readouterr()
        assert command("push", *words) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and said in error, error
    with pytest.raises(CheckpointError):
        _stage_blend(fitted, tmp_path / "out", False, [tiny_run])
