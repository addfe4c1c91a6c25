"""The kernels' own functions, on folders that look like Kaggle's but lie elsewhere."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import cv2
import pandas as pd
import pytest
import tifffile
from clocks import Countdown
from rle_oracle import coco_mask
from safetensors.torch import save_file
from tiny import TINY

from hubmap_kit import build_id, experiment
from hubmap_kit.competition.checker import check_submission
from hubmap_kit.competition.tables import read_train
from hubmap_kit.jobs.predict import predict
from hubmap_kit.jobs.train import train as train_job
from hubmap_kit.kernel import kernels, mounts
from hubmap_kit.kernel.kernels import infer, run_name, tiles, train
from hubmap_kit.kernel.mounts import COMPETITION
from hubmap_kit.models.build import build
from hubmap_kit.tiles.store import fingerprint
from hubmap_kit.training.clock import OutOfTime

TABLES = ("metrics.csv", "oof.csv", "thresholds.json")


@pytest.fixture
def kaggle(tmp_path: Path, sample_data: Path) -> dict[str, Path]:
    """Input with the competition attached, an empty working folder, and a scratch folder that the test can look
    into.
    """
    folders = {"root": tmp_path / "input", "working": tmp_path / "working", "scratch": tmp_path / "scratch"}
    for folder in folders.values():
        folder.mkdir()
    (folders["root"] / "competitions").mkdir()
    (folders["root"] / "competitions" / COMPETITION).symlink_to(sample_data)
    return folders


def attach(kaggle: dict[str, Path], source: Path, slug: str, name: str) -> Path:
    """Mount `source` as the folder `name` of another kernel's output, without leave to write."""
    target = kaggle["root"] / "notebooks" / "alice" / slug / name
    shutil.copytree(source, target)
    for path in [*target.rglob("*"), target]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    return target


def publish(kaggle: dict[str, Path], kind: str, **files: Path) -> None:
    folder = kaggle["root"] / "datasets" / "alice" / f"hubmap-kit-{kind}"
    folder.mkdir(parents=True)
    for flat, source in files.items():
        shutil.copyfile(source, folder / flat)
    build_id.write(folder, build_id.describe(kind, folder, {flat: flat.replace("__", "/") for flat in files}))


def publish_run(kaggle: dict[str, Path], run: Path, name: str) -> None:
    files = [run / "config.yaml", run / "thresholds.json", *run.glob("fold*/model.safetensors")]
    publish(kaggle, "weights", **{f"{name}__{path.relative_to(run)}".replace("/", "__"): path for path in files})


def test_tiles_are_cut_once_and_used_where_they_are_attached(
    kaggle: dict[str, Path], sample_data: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    cut = tiles("baseline", TINY, kaggle["root"], tmp_path / "elsewhere", kaggle["scratch"])
    settings = experiment.load("baseline", TINY, str(sample_data))
    mark = fingerprint(read_train(sample_data / "train.csv"), settings.scale)
    store = tmp_path / "elsewhere" / "stores" / mark
    assert cut.status == "complete" and str(store) in cut.sentence
    # Another grid than the one that was kept: its table has to be made beside the mount.
    mounted = attach(kaggle, tmp_path / "elsewhere" / "stores", "hubmap-make-tiles", "stores") / mark
    network = tmp_path / "start.safetensors"
    save_file(
        {key: value.contiguous() for key, value in build(settings.model).encoder.model.state_dict().items()}, network
    )
    publish(kaggle, "pretrained", **{"start.safetensors": network})
    changes = [*TINY, "training.epochs=1", "tiles.size=96", "model.encoder_weights=start.pth"]
    done = train("baseline", [1], changes, 11.5, "cpu", **kaggle)
    assert done.status == "complete", done.sentence
    used = kaggle["scratch"] / "stores" / mark
    assert (used / "images.u8").resolve() == mounted / "images.u8" and (used / "tiles-96-0.parquet").is_file()
    assert sorted(path.name for path in mounted.iterdir()) == sorted(path.name for path in store.iterdir())
    # Nothing but the run becomes output, and it remembers which weights it began with.
    assert [path.name for path in kaggle["working"].iterdir()] == ["baseline"]
    kept = experiment.read(kaggle["working"] / "baseline" / "config.yaml")
    assert kept.model.encoder_weights.endswith("start.safetensors") and Path(kept.model.encoder_weights).is_file()
    assert (kaggle["working"] / "baseline" / "fold1" / "model.safetensors").is_file()


def test_a_stopped_training_goes_on_in_the_next_session(
    kaggle: dict[str, Path], sample_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    settings = experiment.load("baseline", TINY, str(sample_data))
    with pytest.raises(OutOfTime):
        train_job(settings, tmp_path / "former" / "baseline", device="cpu", clock=Countdown(8))
    attach(kaggle, tmp_path / "former" / "baseline", "hubmap-train", "baseline")
    stopped = train("baseline", [], TINY, 1e-9, "cpu", **kaggle)
    assert stopped.status == "stopped" and "fold 0 after epoch 1 of 2" in stopped.sentence
    shutil.rmtree(kaggle["working"] / "baseline")
    done = train("baseline", [], TINY, 11.5, "cpu", **kaggle)
    assert done.status == "complete" and "2 folds done" in done.sentence
    for name in TABLES:
        assert (kaggle["working"] / "baseline" / name).read_bytes() == (tiny_run / name).read_bytes(), name


def test_a_complete_attached_run_is_kept_as_it_is(kaggle: dict[str, Path], tiny_run: Path) -> None:
    attach(kaggle, tiny_run, "hubmap-train", "baseline")
    assert train("baseline", [], TINY, 11.5, "cpu", **kaggle).status == "complete"
    for name in (*TABLES, "fold0/model.safetensors", "fold1/model.safetensors", "fold0/last.ckpt"):
        assert (kaggle["working"] / "baseline" / name).read_bytes() == (tiny_run / name).read_bytes(), name
    failed = train("baseline", [], [*TINY, "training.lr=0.5"], 11.5, "cpu", kaggle["root"], kaggle["scratch"])
    assert failed.status == "failed" and "training.lr" in failed.sentence


def test_infer_gives_what_predict_gives(
    kaggle: dict[str, Path], sample_data: Path, tiny_run: Path, tmp_path: Path
) -> None:
    publish_run(kaggle, tiny_run, "mini")
    attach(kaggle, tiny_run, "hubmap-train", "baseline")
    done = infer(["inference.views=none"], 8.5, "cpu", **kaggle)
    assert done.status == "complete", done.sentence
    predict(
        [tiny_run],
        sample_data / "test.csv",
        tmp_path / "expected.csv",
        overrides=["inference.views=none"],
        device="cpu",
    )
    assert (kaggle["working"] / "submission.csv").read_bytes() == (tmp_path / "expected.csv").read_bytes()
    assert (
        {"submission.csv"} <= {path.name for path in kaggle["working"].iterdir()} <= {"submission.csv", "governor.csv"}
    )


def test_infer_takes_the_weights_that_it_was_rendered_for_and_no_others(
    kaggle: dict[str, Path], sample_data: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mounts, "WAIT_S", 0.0)
    publish_run(kaggle, tiny_run, "mini")
    held = build_id.read(kaggle["root"] / "datasets" / "alice" / "hubmap-kit-weights").build_id
    stale = infer(["inference.views=none"], 8.5, "cpu", **kaggle, weights="weights-000000000000")
    assert (
        stale.status == "failed" and f"holds the weights {held}, expected build weights-000000000000" in stale.sentence
    )
    report = check_submission(kaggle["working"] / "submission.csv", sample_data / "test.csv")
    assert report.rows == report.empty
    done = infer(["inference.views=none"], 8.5, "cpu", **kaggle, weights=held)
    assert (done.status, done.facts) == ("complete", {"weights": [held], "slides": 10, "failed_slides": 0}), (
        done.sentence
    )


@pytest.mark.parametrize("fault", ["no run", "no time", "damaged run", "bad setting"])
def test_whatever_fails_there_is_a_complete_file(
    fault: str, kaggle: dict[str, Path], sample_data: Path, tiny_run: Path
) -> None:
    if fault != "no run":
        publish_run(kaggle, tiny_run, "mini")
    if fault == "damaged run":
        path = next((kaggle["root"] / "datasets").rglob("*fold0__model.safetensors"))
        path.write_bytes(path.read_bytes()[:-1])
    hours, overrides = (1e-9 if fault == "no time" else 8.5), (["inference.windw=1"] if fault == "bad setting" else [])
    outcome = infer(overrides, hours, "cpu", **kaggle)
    expected = {
        "no run": "no trained run",
        "no time": "no time left",
        "damaged run": "fold0__model",
        "bad setting": "windw",
    }
    assert outcome.status == "failed" and expected[fault] in outcome.sentence
    assert (outcome.facts["slides"], outcome.facts["failed_slides"]) == (10, 10)
    report = check_submission(kaggle["working"] / "submission.csv", sample_data / "test.csv")
    assert report.rows == report.empty == len((sample_data / "test.csv").read_text().splitlines()) - 1


# ---------------------------------------------------------------- the hidden table may look like anything

SIDE = 80
PLAIN = ["inference.views=none", "inference.tune_speed=false"]
HEADER = "id,organ,data_source,img_height,img_width,pixel_size,tissue_thickness"


@pytest.fixture(scope="module")
def hidden(sample_data: Path, tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three small slides (1, 2, 3) as the competition, and a run; each test writes its own test.csv."""
    top = tmp_path_factory.mktemp("hidden")
    folders = {"root": top / "input", "working": top / "working", "scratch": top / "scratch"}
    (folders["root"] / "competitions" / COMPETITION).mkdir(parents=True)
    for name in ("working", "scratch"):
        folders[name].mkdir()
    attach(folders, tiny_run, "hubmap-train", "baseline")
    return folders


def rows_of_sample(sample_data: Path) -> list[list[str]]:
    """The first three rows of the sample's test table under the ids 1, 2, 3."""
    rows = [line.split(",") for line in (sample_data / "test.csv").read_text().splitlines()[1:4]]
    return [[str(number), *row[1:3], str(SIDE), str(SIDE), *row[5:]] for number, row in enumerate(rows, start=1)]


def segmented(
    hidden: dict[str, Path], sample_data: Path, content: bytes | None, suffix: str = ".tiff"
) -> kernels.Outcome:
    """Infer on a table of these bytes (None: no table), with corners of the sample's slides in files of this suffix."""
    data = hidden["root"] / "competitions" / COMPETITION
    shutil.rmtree(data)
    (data / "test_images").mkdir(parents=True)
    for number, line in enumerate((sample_data / "test.csv").read_text().splitlines()[1:4], start=1):
        source, target = (
            sample_data / "test_images" / f"{line.split(',')[0]}.tiff",
            data / "test_images" / f"{number}{suffix}",
        )
        pixels = tifffile.imread(source)[:SIDE, :SIDE]
        if suffix == ".png":
            cv2.imwrite(str(target), pixels[..., ::-1])
        else:
            tifffile.imwrite(target, pixels, photometric="rgb", compression="zlib")
    if content is not None:
        (data / "test.csv").write_bytes(content)
    return infer(PLAIN, 8.5, "cpu", **hidden)


def handed_in(hidden: dict[str, Path]) -> dict[str, str]:
    """The submission as pandas reads it: id -> mask; every mask lies within its slide."""
    found = pd.read_csv(hidden["working"] / "submission.csv", dtype=str, keep_default_na=False)
    assert list(found.columns) == ["id", "rle"]
    for text in filter(None, found["rle"]):
        assert not text.startswith("0 ") and coco_mask(text, SIDE, SIDE).any()
    return dict(zip(found["id"], found["rle"], strict=True))


def written(rows: list[list[str]], header: str | None = HEADER, delimiter: str = ",", end: str = "\n") -> str:
    lines = [*([header.replace(",", delimiter)] if header else []), *(delimiter.join(row) for row in rows)]
    return end.join(lines) + end


# The rows of the good table -> the bytes of a table from which nothing is missing: every mask must be the one of the
# good table.
SAME = {
    "a mark of UTF-8": lambda rows: b"\xef\xbb\xbf" + written(rows).encode(),
    "UTF-16": lambda rows: written(rows).encode("utf-16"),
    "NULs": lambda rows: written(rows).replace("a", "a\0").encode() + bytes(99),
    "tabs": lambda rows: written(rows, delimiter="\t").encode(),
    "semicolons": lambda rows: written(rows, delimiter=";").encode(),
    "CR": lambda rows: written(rows, end="\r").encode(),
    "quotes": lambda rows: written([[f'"{cell}"' for cell in row] for row in rows], end="\r\n").encode(),
    "an open quote": lambda rows: written([[rows[0][0], '"' + rows[0][1], *rows[0][2:]], *rows[1:]]).encode(),
    "capitals": lambda rows: written(rows, HEADER.upper()).encode(),
    "another name of the id": lambda rows: written(rows, "image_" + HEADER).encode(),
    "no header": lambda rows: written(rows, None).encode(),
    "more cells": lambda rows: written([[*row, "9", "9"] for row in rows]).encode(),
    "another order": lambda rows: written([row[::-1] for row in rows], ",".join(HEADER.split(",")[::-1])).encode(),
    "repeated and blank ids": lambda rows: written([rows[0], ["", *rows[0][1:]], *rows, rows[0], [" "]]).encode(),
    "sizes that cannot be": lambda rows: written([[*row[:3], "1e30", "-5", *row[5:]] for row in rows]).encode(),
}


@pytest.fixture(scope="module")
def good(hidden: dict[str, Path], sample_data: Path) -> dict[str, str]:
    """The masks of the good table."""
    outcome = segmented(hidden, sample_data, written(rows_of_sample(sample_data)).encode())
    found = handed_in(hidden)
    assert outcome.status == "complete" and all(found.values())
    return found


def test_odd_tables_give_the_masks_of_the_good_one(
    hidden: dict[str, Path], sample_data: Path, good: dict[str, str]
) -> None:
    for name, change in SAME.items():
        outcome = segmented(hidden, sample_data, change(rows_of_sample(sample_data)))
        assert handed_in(hidden) == good, name
        assert (outcome.status, outcome.facts["slides"], outcome.facts["failed_slides"]) == ("complete", 3, 0), name
    for suffix in (".TIF", ".png"):
        segmented(hidden, sample_data, written(rows_of_sample(sample_data)).encode(), suffix)
        assert handed_in(hidden) == good, suffix


@pytest.mark.parametrize(
    "ids",
    [
        ("1.0", "2.00", "3.0"),
        ("01", "002", "0003"),
        ("a,b", "2", 'c"d'),
        ("caf\xe9", "2", "3"),
        (" 1", "2 ", "3"),
        ("../1", "x" * 300, "\u4e2d"),
        ("1", "2\n2", "3"),
    ],
)
def test_ids_are_handed_in_as_they_are_written(
    ids: tuple[str, ...], hidden: dict[str, Path], sample_data: Path, tmp_path: Path
) -> None:
    path = tmp_path / "test.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = [[name, *row[1:]] for name, row in zip(ids, rows_of_sample(sample_data), strict=True)]
        csv.writer(file).writerows([HEADER.split(","), *rows])
    segmented(hidden, sample_data, path.read_bytes())
    assert list(handed_in(hidden)) == list(pd.read_csv(path, dtype=str)["id"]) == list(ids)
    if "\xe9" in ids[0]:
        segmented(hidden, sample_data, path.read_text(encoding="utf-8").encode("latin-1"))
        assert list(handed_in(hidden)) == list(ids)


def test_a_pixel_size_that_cannot_be_is_the_organ_s(
    hidden: dict[str, Path], sample_data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [[row[0], "spleen", "Hubmap", *row[3:5], "0.4945", "4"] for row in rows_of_sample(sample_data)]
    segmented(hidden, sample_data, written(rows).encode())
    expected = handed_in(hidden)
    for cell in ("1e6", "-1", "inf", "wide"):
        capsys.readouterr()
        assert (
            segmented(hidden, sample_data, written([[*row[:5], cell, "4"] for row in rows]).encode()).status
            == "complete"
        )
        assert handed_in(hidden) == expected
        assert (
            f"3 pixel sizes are missing or none that tissue can have: {cell!r} of '1' becomes 0.4945 um"
            in capsys.readouterr().err
        )


@pytest.mark.parametrize(
    "content",
    [
        HEADER.encode(),
        f"{HEADER}\n".encode(),
        b"",
        b"\n \r\n\n",
        HEADER.encode("utf-16"),
        f"{HEADER}\n,lung\n".encode(),
    ],
)
def test_a_table_without_ids_gives_a_header_without_rows(
    content: bytes, hidden: dict[str, Path], sample_data: Path
) -> None:
    outcome = segmented(hidden, sample_data, content)
    assert (hidden["working"] / "submission.csv").read_bytes() == b"id,rle\n"
    assert (outcome.status, outcome.facts["slides"], outcome.facts["failed_slides"]) == ("complete", 0, 0), (
        outcome.sentence
    )


def test_without_a_table_the_sample_or_the_files_tell_the_ids(hidden: dict[str, Path], sample_data: Path) -> None:
    for content in (None, bytes(range(256))):
        assert segmented(hidden, sample_data, content).status == "complete"
        assert list(handed_in(hidden)) == ["1", "2", "3"]
    (hidden["root"] / "competitions" / COMPETITION / "sample_submission.csv").write_text("id,rle\n3,1 1\n1,\n")
    assert infer(PLAIN, 8.5, "cpu", **hidden).facts["slides"] == 2
    assert (hidden["working"] / "submission.csv").read_text().startswith("id,rle\n3,")
    # The same where nothing can be predicted; the file of the session before does not stay.
    outcome = infer(["inference.windw=1"], 8.5, "cpu", **hidden)
    assert outcome.status == "failed" and (hidden["working"] / "submission.csv").read_text() == "id,rle\n3,\n1,\n"


# ---------------------------------------------------------------- how many slides failed


def test_too_many_failures_make_the_end_degraded(kaggle: dict[str, Path], sample_data: Path, tiny_run: Path) -> None:
    attach(kaggle, tiny_run, "hubmap-train", "baseline")
    data = kaggle["root"] / "competitions" / COMPETITION
    data.unlink()
    (data / "test_images").mkdir(parents=True)
    shutil.copyfile(sample_data / "test.csv", data / "test.csv")
    ids = list(pd.read_csv(data / "test.csv", dtype=str)["id"])
    for name in ids:
        pixels = tifffile.imread(sample_data / "test_images" / f"{name}.tiff")[:SIDE, :SIDE]
        tifffile.imwrite(data / "test_images" / f"{name}.tiff", pixels, photometric="rgb")
    for count, status in ((2, "complete"), (3, "degraded")):
        for name in ids[:count]:
            (data / "test_images" / f"{name}.tiff").write_bytes(b"II*\0 and no more" + name.encode())
        outcome = infer(PLAIN, 8.5, "cpu", **kaggle)
        assert (outcome.status, outcome.facts["slides"], outcome.facts["failed_slides"]) == (status, 10, count), (
            outcome.sentence
        )
        masks = pd.read_csv(kaggle["working"] / "submission.csv", dtype=str, keep_default_na=False)
        assert list(masks["id"]) == ids and list(masks["rle"] == "") == [place < count for place in range(10)]
        json.dumps(dict(outcome.facts))  # they become kernel.json
    (data / "test_images" / f"{ids[9]}.tiff").unlink()
    outcome = infer(PLAIN, 8.5, "cpu", **kaggle)
    assert (
        "4 of 10 slides failed and have empty masks, more than the 20% of inference.tolerated_failures"
        in outcome.sentence
    )
    assert f"3 failed as slide {ids[0]} did: " in outcome.sentence and "truncated or damaged" in outcome.sentence
    assert infer([*PLAIN, "inference.tolerated_failures=0.4"], 8.5, "cpu", **kaggle).status == "complete"
    for name in ids:
        (data / "test_images" / f"{name}.tiff").unlink(missing_ok=True)
    outcome = infer([*PLAIN, "inference.tolerated_failures=1"], 8.5, "cpu", **kaggle)
    assert (outcome.status, outcome.facts["slides"], outcome.facts["failed_slides"]) == ("failed", 10, 10), (
        outcome.sentence
    )


def test_an_unexpected_fault_is_an_outcome_too(kaggle: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(kaggle["working"])
    kaggle["working"].write_text("a file where the folder should be")
    outcome = tiles("baseline", TINY, kaggle["root"], kaggle["working"], kaggle["scratch"])
    assert (
        outcome.status == "failed"
        and "Error" in outcome.sentence.split(":")[0]
        and "Traceback" in capsys.readouterr().err
    )
    assert train("nonesuch", [], (), 1, "cpu", kaggle["root"], kaggle["scratch"]).sentence.startswith(
        "no experiment 'nonesuch'"
    )


def test_a_resume_that_finds_nothing_does_not_begin_anew(kaggle: dict[str, Path]) -> None:
    outcome = train("baseline", [], TINY, 11.5, "cpu", **kaggle, resume=True)
    assert outcome.status == "failed" and "no attached output holds a begun run 'baseline'" in outcome.sentence
    assert not list(kaggle["working"].iterdir())


def test_inference_needs_no_training_table(kaggle: dict[str, Path], sample_data: Path, tiny_run: Path) -> None:
    publish_run(kaggle, tiny_run, "mini")
    mounted = kaggle["root"] / "competitions" / COMPETITION
    mounted.unlink()
    mounted.mkdir()
    for name in ("test.csv", "test_images"):
        (mounted / name).symlink_to(sample_data / name)
    assert infer(["inference.views=none"], 8.5, "cpu", **kaggle).status == "complete"


def test_runs_are_called_what_a_folder_can_be_called() -> None:
    assert run_name("baseline") == "baseline" and run_name("../a b/é") == "a-b" and run_name("...") == "run"
    assert Path("/kaggle/input") == kernels.INPUT and Path("/kaggle/working") == kernels.WORKING
