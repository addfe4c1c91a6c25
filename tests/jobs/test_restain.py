"""`hubmap external restain`: what copies are, that a killed job goes on, what is left out, and that copies are learnt
from, never judged.
"""

from __future__ import annotations

import logging
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
import tifffile
from external_cli import hubmap
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.augment import changes
from hubmap_kit.augment.stain import TRANSFERS, Reference, read_references
from hubmap_kit.competition import external, rle, slides
from hubmap_kit.competition.external import read_table
from hubmap_kit.competition.folds import assign_folds
from hubmap_kit.competition.tables import read_train
from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError, SlideError, TableError
from hubmap_kit.jobs.evaluate import evaluate_shifted
from hubmap_kit.jobs.restain import plain_name, prepare, restain
from hubmap_kit.jobs.train import train
from hubmap_kit.jobs.tune import tune_thresholds

CHANGED = ("id", "parent", "provenance", "licence", "file")


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def pictures(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reference of either stain, to be told by its name: two of the sample's test slides."""
    folder = tmp_path_factory.mktemp("references")
    test = sorted((sample_data / "test_images").iterdir())
    for name, path in (("kidney_pas_1", test[0]), ("target_HE", test[1])):
        shutil.copy(path, folder / f"{name}.tiff")
    return folder


@pytest.fixture(scope="module")
def copies(sample_data: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two copies of every slide of the sample, one of them like its test slides."""
    out = tmp_path_factory.mktemp("restained") / "copies"
    words = [
        "external",
        "restain",
        sample_data,
        "--out",
        out,
        "--copies",
        "2",
        "--looks",
        "pas,test",
        "--jobs",
        "2",
        "--references",
        pictures,
    ]
    told = hubmap(*words)
    assert (
        re.match(r"20 copies of 10 slides \(pas, test\), about [\d.]+ [kM]B in all\n", told)
        and "20 copies, 0 of them were there" in told
    )
    return out


def few_of(data: Path, folder: Path, rows: list[dict[str, str]]) -> Path:
    """A data folder of some slides of another one."""
    folder.mkdir()
    (folder / "train_images").symlink_to(data / "train_images")
    external.write_table(folder / "train.csv", rows, ())
    return folder


def test_a_copy_is_its_slide_in_the_colours_that_its_row_names(copies: Path, sample_data: Path, pictures: Path) -> None:
    originals, rows = (
        {row["id"]: row for row in read_table(sample_data / "train.csv")},
        read_table(copies / "train.csv"),
    )
    references = {
        plain_name(each.name): each
        for folder in (pictures, sample_data / "test_images")
        for each in read_references(folder)
    }
    assert {row["id"] for row in rows} == {f"{slide_id}_{look}1" for slide_id in originals for look in ("pas", "test")}
    assert {path.stem for path in (copies / "train_images").iterdir()} == {row["id"] for row in rows}, (
        "the originals are not among them"
    )
    for slide, row in zip(read_train(copies / "train.csv"), rows, strict=True):
        original = originals[row["parent"]]
        assert slide.parent == row["parent"] and row["id"].startswith(f"{row['parent']}_")
        assert {key: value for key, value in row.items() if key not in CHANGED} == {
            key: value for key, value in original.items() if key not in CHANGED
        }
        kind, look, name, method = row["provenance"].split(":")
        assert kind == "restained" and look == row["id"].rpartition("_")[2][:-1] and (look == "pas") == ("pas" in name)
        before = slides.read(sample_data / "train_images" / f"{row['parent']}.tiff")
        np.testing.assert_array_equal(slides.read(slide.path), TRANSFERS[method](before, references[name]))
        assert (slides.read(slide.path) != before).any()
        assert slides.stated_um_per_px(slide.path) == pytest.approx(slide.um_per_px, rel=1e-6)
        assert slide.path.stat().st_size < before.nbytes
    assert {row["provenance"].rpartition(":")[2] for row in rows} == set(TRANSFERS), "every method is drawn"
    assert (
        cv2.imread(str(copies / "copies.png")) is not None
        and read_table(copies / "left_out.csv", ("id", "reason")) == []
    )


def test_coarser_copies_have_coarser_masks(sample_data: Path, pictures: Path, tmp_path: Path) -> None:
    rows = [
        row for row in read_table(sample_data / "train.csv") if not (int(row["img_height"]) | int(row["img_width"])) & 1
    ][:3]
    few = few_of(sample_data, tmp_path / "few", [row | {"weight": "0.25", "pixel_size": ""} for row in rows])
    hubmap(
        "external",
        "restain",
        few,
        "--out",
        tmp_path / "out",
        "--looks",
        "he",
        "--reduce",
        "2",
        "--references",
        pictures,
    )
    full = {slide.id: slide for slide in read_train(few / "train.csv")}
    assert len(full) == 3
    for slide in read_train(tmp_path / "out/train.csv"):
        parent = full[slide.parent]
        assert (
            (slide.height, slide.width) == (parent.height // 2, parent.width // 2) == slides.read(slide.path).shape[:2]
        )
        assert slide.um_per_px == 2 * parent.um_per_px and slide.weight == 0.25 and slide.organ == parent.organ
        mask = rle.decode(parent.rle or "", parent.height, parent.width)
        means = mask.reshape(slide.height, 2, slide.width, 2).mean((1, 3))
        np.testing.assert_array_equal(rle.decode(slide.rle or "", slide.height, slide.width), means >= 0.5)


def test_drawn_references_stand_in(sample_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "EACH", 1)  # they are slow to draw
    few = few_of(sample_data, tmp_path / "few", read_table(sample_data / "train.csv")[:1])
    hubmap("external", "restain", few, "--out", tmp_path / "out", "--looks", "pas,he")
    names = [row["provenance"].split(":")[2] for row in read_table(tmp_path / "out/train.csv")]
    assert names == ["embedded-PAS", "embedded-eosin"]


def test_few_copies_take_the_looks_in_turn(sample_data: Path, pictures: Path, tmp_path: Path) -> None:
    plan = prepare(sample_data, tmp_path / "one", 1, "pas,test", pictures)
    looks = [look for each in plan.copies.values() for look in each.values()]
    assert set(looks) == {"pas", "test"} and all(len(each) == 1 for each in plan.copies.values())
    more = prepare(sample_data, tmp_path / "one", 5, "pas,test", pictures).copies
    assert all(
        set(each) < set(more[slide_id]) and len(more[slide_id]) == 5 for slide_id, each in plan.copies.items()
    ), "more copies keep the first"


def test_a_killed_job_goes_on_and_ends_alike(copies: Path, sample_data: Path, pictures: Path, tmp_path: Path) -> None:
    out, before = tmp_path / "out", snapshot(copies)
    words = [
        "external",
        "restain",
        sample_data,
        "--out",
        out,
        "--copies",
        "2",
        "--looks",
        "pas,test",
        "--references",
        pictures,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "hubmap_kit", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    give_up = time.monotonic() + 120
    while len(list(out.glob("train_images/[!.]*.tiff"))) < 3 and process.poll() is None and time.monotonic() < give_up:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    whole = sorted(out.glob("train_images/[!.]*.tiff"))
    assert len(whole) >= 3
    (out / "train.csv").unlink(missing_ok=True)
    whole[0].write_bytes(whole[0].read_bytes()[:-500])  # as a copy of a copy that was cut off
    times = {path: path.stat().st_mtime_ns for path in whole[1:]}
    assert f"20 copies, {len(whole) - 1} of them were there" in hubmap(*words)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert snapshot(out) == before
    assert "20 are there, 0 to make" in hubmap(*words)


def test_other_references_make_other_copies(sample_data: Path, shared_data: Path, tmp_path: Path) -> None:
    few = few_of(sample_data, tmp_path / "few", read_table(sample_data / "train.csv")[:2])
    pictures = shared_data / "stain-references"
    (tmp_path / "refs").mkdir()
    shutil.copy(pictures / "target_PAS.jpg", tmp_path / "refs/target_PAS.jpg")
    shutil.copy(pictures / "target_HE.jpg", tmp_path / "refs/target_HE.jpg")
    words = [
        "external",
        "restain",
        few,
        "--out",
        tmp_path / "out",
        "--references",
        tmp_path / "refs",
        "--looks",
        "pas,he",
    ]
    hubmap(*words)
    before = snapshot(tmp_path / "out/train_images")
    shutil.copy(pictures / "target_HE.jpg", tmp_path / "refs/target_PAS.jpg")
    assert "4 copies, 2 of them were there" in hubmap(*words)
    after = snapshot(tmp_path / "out/train_images")
    assert {name for name in before if before[name] != after[name]} == {name for name in before if "_pas1" in name}


def test_real_slides_come_near_to_the_look(shared_data: Path, tmp_path: Path) -> None:
    rows = [row for row in read_table(shared_data / "hubmap-mini/train.csv") if int(row["img_height"]) < 400][:3]
    few_of(shared_data / "hubmap-mini", tmp_path / "few", rows)
    target = shared_data / "hubmap-mini/test_images/10078.tiff"
    hubmap(
        "external",
        "restain",
        tmp_path / "few",
        "--out",
        tmp_path / "out",
        "--looks",
        "test",
        "--copies",
        "3",
        "--test",
        target,
    )
    goal = Reference.of(slides.read(target)).mean
    for slide in read_train(tmp_path / "out/train.csv"):
        before, after = (
            Reference.of(slides.read(folder / f"{name}.tiff")).mean
            for folder, name in (
                (tmp_path / "few/train_images", slide.parent),
                (tmp_path / "out/train_images", slide.id),
            )
        )
        assert np.linalg.norm(after - goal) < np.linalg.norm(before - goal) / 2, slide.id


def test_slides_without_tissue_are_left_out_with_a_reason(sample_data: Path, pictures: Path, tmp_path: Path) -> None:
    data, rows = tmp_path / "data", read_table(sample_data / "train.csv")[:3]
    (data / "train_images").mkdir(parents=True)
    for row in rows:
        shutil.copy(sample_data / f"train_images/{row['id']}.tiff", data / "train_images")
    external.write_table(data / "train.csv", rows, ())
    white, cut = (data / f"train_images/{row['id']}.tiff" for row in rows[:2])
    tifffile.imwrite(
        white, np.full((int(rows[0]["img_height"]), int(rows[0]["img_width"]), 3), 240, np.uint8), photometric="rgb"
    )
    cut.write_bytes(cut.read_bytes()[:2000])
    assert "2 slides are left out" in hubmap(
        "external", "restain", data, "--out", tmp_path / "out", "--looks", "he", "--references", pictures
    )
    reasons = {row["id"]: row["reason"] for row in read_table(tmp_path / "out/left_out.csv", ("id", "reason"))}
    assert (
        "too little tissue" in reasons[rows[0]["id"]]
        and "truncated or damaged" in reasons[rows[1]["id"]]
        and len(reasons) == 2
    )
    assert [slide.parent for slide in read_train(tmp_path / "out/train.csv")] == [rows[2]["id"]]
    external.write_table(data / "train.csv", rows[:2], ())
    with pytest.raises(SlideError, match="none of 2 slides could be restained"):
        restain(prepare(data, tmp_path / "none", looks="he", references=pictures))


def test_what_cannot_be_is_refused_before_anything_is_written(
    copies: Path, sample_data: Path, shared_data: Path, tmp_path: Path
) -> None:
    out, pas = tmp_path / "out", tmp_path / "pas"
    pas.mkdir()
    shutil.copy(shared_data / "stain-references/target_PAS.jpg", pas)
    row = read_table(sample_data / "train.csv")[0]
    bare = few_of(sample_data, tmp_path / "bare", [row | {"img_height": "900000000", "img_width": "900000000"}])
    for error, sentence, words in (
        (TableError, "the folder of the slides themselves", {"out": sample_data}),
        (TableError, "holds nothing but restained copies", {"data": copies}),
        (TableError, "holds other slides than restained copies", {"data": copies, "out": sample_data}),
        (ConfigError, "there is no look 'pass'; known are pas, he, test; did you mean 'pas'", {"looks": "pass"}),
        (
            ConfigError,
            "no picture in .*pas has he or h&e or hne or eosin as a word",
            {"looks": "he", "references": pas},
        ),
        (
            ConfigError,
            "holds no slide that could show the look test; name one with --test",
            {"data": bare, "looks": "test"},
        ),
        (ConfigError, "--reduce is 3", {"reduce": 3}),
        (
            HubmapError,
            r"GB free, but 1 copies need about \d+\.\d GB; make room",
            {"data": bare, "looks": "pas", "references": pas},
        ),
    ):
        with pytest.raises(error, match=sentence):
            prepare(**({"data": sample_data, "out": out} | words))
        assert not out.exists()


def test_a_large_job_says_so(sample_data: Path, pictures: Path, tmp_path: Path) -> None:
    rows = [row | {"img_height": "25000", "img_width": "25000"} for row in read_table(sample_data / "train.csv")]
    large = few_of(sample_data, tmp_path / "large", rows)
    if shutil.disk_usage(tmp_path).free < 40e9:
        pytest.skip("the disk is too small for the plan itself")
    told = prepare(large, tmp_path / "out", looks="he", references=pictures).told
    size, quarter = (float(number) for number in re.findall(r"about ([\d.]+) GB", told))
    assert (
        "a Kaggle notebook may write 20.0 GB, and --reduce 2" in told
        and 10 < size < 19
        and quarter == pytest.approx(size / 4, abs=0.1)
    )


def test_copies_are_learnt_from_and_never_judged(
    copies: Path, sample_data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = few_of(sample_data, tmp_path / "few", read_table(sample_data / "train.csv")[:4])
    originals = read_train(few / "train.csv")
    wanted = {slide.id for slide in originals}
    theirs = few_of(
        copies, tmp_path / "copies", [row for row in read_table(copies / "train.csv") if row["parent"] in wanted]
    )
    hubmap("external", "merge", few, theirs, "--out", tmp_path / "all", "--n-folds", "2")
    everyone = read_train(tmp_path / "all/train.csv")
    settings = experiment.load(
        "baseline", [*TINY, "training.epochs=1", "training.samples_per_epoch=4"], str(tmp_path / "all")
    )
    caplog.set_level("INFO")
    logger = logging.getLogger("hubmap_kit")
    logger.addHandler(caplog.handler)  # the command line above has replaced those of the root
    try:
        train(settings, tmp_path / "run", device="cpu")
    finally:
        logger.removeHandler(caplog.handler)
    folds = {row["id"]: int(row["fold"]) for row in read_table(tmp_path / "run/folds.csv", ("id", "fold"))}
    alone = assign_folds(originals, 2, settings.data.fold_seed)
    assert folds == {slide.id: alone[slide.parent or slide.id] for slide in everyone} and len(folds) == 12
    for fold in range(2):
        mine = list(alone.values()).count(fold)
        assert f"fold {fold}: {3 * (4 - mine)} slides to learn from, {mine} held out" in caplog.text
    assert sorted(pd.read_csv(tmp_path / "run/oof.csv", dtype={"id": str})["id"]) == sorted(wanted)
    assert sum(result.slides for result in tune_thresholds(tmp_path / "run", device="cpu").results) == len(wanted)
    assert set(evaluate_shifted(tmp_path / "run", shifts="jpeg", device="cpu", pictures=False).table["id"]) == wanted
    # Weights and parents that change between two sessions are told, not passed over.
    rows = read_table(tmp_path / "all/train.csv")
    copy = rows[-1]["id"]
    for change, sentence in (
        (
            {"weight": "0.5"},
            rf"was trained with weight 1 for slide {copy}, now train.csv gives it 0.5; give it the weights of before",
        ),
        ({"parent": ""}, rf"slide {copy} was not judged in the epochs of .*last\.ckpt, but the column parent"),
    ):
        external.write_table(tmp_path / "all/train.csv", [*rows[:-1], rows[-1] | change], ())
        with pytest.raises(CheckpointError, match=sentence):
            train(settings, tmp_path / "run", resume=True, device="cpu")
