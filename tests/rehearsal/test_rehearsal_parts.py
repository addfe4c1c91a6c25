"""The parts of a rehearsal: the hidden test set, the mounts, the verdicts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rle_oracle import coco_mask, dice, rows_of, text_of

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.errors import RehearsalError, SlideError
from hubmap_kit.rehearsal import hidden as hidden_sets
from hubmap_kit.rehearsal.hidden import HiddenSet, make_hidden, read_hidden
from hubmap_kit.rehearsal.image import KAGGLE_PYTHON
from hubmap_kit.rehearsal.inputs import Shelf, competition, mounts
from hubmap_kit.rehearsal.jobs import surprises
from hubmap_kit.rehearsal.judge import Expected, Verdict, judge, score
from hubmap_kit.rehearsal.reporting import table
from hubmap_kit.rehearsal.request import LEAST
from hubmap_kit.rehearsal.sandbox import CANARY, GIB, Limits, Outcome
from hubmap_kit.rehearsal.steps import Plan, Step, expected

BUILD = "0123456789ab-ba9876543210"


@pytest.fixture(scope="module")
def hidden(tmp_path_factory: pytest.TempPathFactory) -> HiddenSet:
    return make_hidden(tmp_path_factory.mktemp("hidden"), slides=12, largest=600)


# ---------------------------------------------------------------- the hidden test set


def test_the_planned_sizes_are_those_of_the_competition() -> None:
    sizes = [(organ, source, height, width) for organ, source, height, width, _ in hidden_sets.FIRST]
    assert ("prostate", "Hubmap", 160, 160) in sizes
    assert max(max(height, width) for *_, height, width in sizes) == 4500
    assert min(min(height, width) for *_, height, width in sizes) == 160
    assert any(height != width for *_, height, width in sizes)
    assert any(height % 2 and width % 2 for *_, height, width in sizes)
    assert {organ for organ, *_ in sizes} == set(ORGANS)
    from_hubmap = [source for _, source, *_ in sizes].count("Hubmap")
    assert len(sizes) / 2 < from_hubmap < len(sizes)
    first = hidden_sets.FIRST[:LEAST]
    assert {fault for *_, fault in first} == {"", "truncated", "missing", "lzw", "size", "pixel_size"}
    assert {organ for organ, *_, fault in first if fault not in hidden_sets.UNREADABLE} == set(ORGANS)


def test_every_fault_is_there_and_is_what_it_says(hidden: HiddenSet) -> None:
    table = {row["id"]: row for row in rows_of(hidden.folder / "test.csv")}
    assert list(table) == [slide.id for slide in hidden.slides]
    assert [row["id"] for row in rows_of(hidden.folder / "sample_submission.csv")] == list(table)
    seen = {}
    for slide in hidden.slides:
        row, path = table[slide.id], hidden.folder / "test_images" / f"{slide.id}.tiff"
        seen[slide.fault] = slide
        if slide.fault in hidden_sets.UNREADABLE:
            with pytest.raises(SlideError, match="truncated" if slide.fault == "truncated" else "no such file"):
                slide_files.read(path)
            continue
        pixels = slide_files.read(path)
        assert pixels.shape == (slide.height, slide.width, 3)
        assert (pixels.shape[:2] == (int(row["img_height"]), int(row["img_width"]))) == (slide.fault != "size")
        assert (row["pixel_size"] == "") == (slide.fault == "pixel_size")
        with tifffile.TiffFile(path) as file:
            assert (file.pages[0].compression.name == "LZW") == (slide.fault == "lzw")
        mask = coco_mask(hidden.truth[slide.id], slide.height, slide.width)
        assert mask[0, 0] == 0
        assert 0 < mask.mean() < 0.9
    assert set(seen) == {"", "truncated", "missing", "lzw", "size", "pixel_size"}


def test_masks_lie_on_the_tissue_that_they_name(hidden: HiddenSet) -> None:
    """White pulp is darker than the pulp around it, a lumen brighter: a mask that is shifted or turned would not tell
    them apart.
    """
    for slide in hidden.slides:
        if slide.organ == "spleen":
            pixels = slide_files.read(hidden.folder / "test_images" / f"{slide.id}.tiff").mean(axis=2)
            mask = coco_mask(hidden.truth[slide.id], slide.height, slide.width).astype(bool)
            assert pixels[mask].mean() < pixels[~mask].mean() - 10


def test_the_masks_are_not_where_the_kernel_looks(hidden: HiddenSet) -> None:
    inside = sorted(path.name for path in hidden.folder.iterdir())
    assert inside == ["sample_submission.csv", "test.csv", "test_images"]
    assert "rle" not in (hidden.folder / "test.csv").read_text().splitlines()[0].split(",")
    again = read_hidden(hidden.folder.parent)
    assert again.truth == hidden.truth
    assert [replace(slide, um_per_px=0) for slide in again.slides] == [
        replace(slide, um_per_px=0) for slide in hidden.slides
    ]


def test_the_same_seed_gives_the_same_set_and_another_one_does_not(tmp_path: Path) -> None:
    one, two, three = (
        make_hidden(tmp_path / str(n), slides=7, largest=300, seed=seed) for n, seed in enumerate((1, 1, 2))
    )
    assert (one.slides, one.truth) == (two.slides, two.truth)
    assert [path.read_bytes() for path in sorted(one.folder.rglob("*.*"))] == [
        path.read_bytes() for path in sorted(two.folder.rglob("*.*"))
    ]
    assert not {slide.id for slide in one.slides} & {slide.id for slide in three.slides}


def test_a_large_set_shares_its_pictures(tmp_path: Path) -> None:
    made = make_hidden(tmp_path, slides=80, largest=170)
    files = {path.stem: path.stat().st_ino for path in (made.folder / "test_images").iterdir()}
    assert len(made.slides) == len({slide.id for slide in made.slides}) == 80
    assert len(files) == 79
    assert len(set(files.values())) == hidden_sets.DISTINCT - 1
    for slide in made.slides[hidden_sets.DISTINCT :]:
        assert slide_files.size(made.folder / "test_images" / f"{slide.id}.tiff") == (slide.height, slide.width)
        assert slide.fault == ""
        coco_mask(made.truth[slide.id], slide.height, slide.width)


def test_without_faults_everything_can_be_read(tmp_path: Path) -> None:
    made = make_hidden(tmp_path, slides=7, faults=False, largest=200)
    for slide in made.slides:
        assert slide.fault == ""
        assert slide_files.size(made.folder / "test_images" / f"{slide.id}.tiff") == (slide.height, slide.width)


def test_too_few_slides_for_every_fault_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RehearsalError, match="--slides is 6, but a hidden test set with every fault needs 7"):
        make_hidden(tmp_path, slides=6)


def test_real_slides_keep_their_tissue_and_scale(shared_data: Path, tmp_path: Path) -> None:
    data = shared_data / "hubmap-mini"
    made = make_hidden(tmp_path, slides=7, largest=450, data=data)
    train = {(row["organ"], row["data_source"]): [] for row in rows_of(data / "train.csv")}
    for row in rows_of(data / "train.csv"):
        train[(row["organ"], row["data_source"])].append(row)
    for slide in made.slides:
        fits = [
            # Scaled until it covers the wanted size: the one zoom of both sides gives the pixel size.
            row
            for row in train[(slide.organ, slide.source)]
            if abs(
                float(row["pixel_size"])
                / max(slide.height / int(row["img_height"]), slide.width / int(row["img_width"]))
                - slide.um_per_px
            )
            < 1e-3
        ]
        assert fits, slide
        coco_mask(made.truth[slide.id], slide.height, slide.width)


# ---------------------------------------------------------------- mounts


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    for name in (
        "code/a.whl",
        "code/dataset-metadata.json",
        "out/run/config.yaml",
        "train/train.csv",
        "train/test.csv",
        "hidden/test.csv",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return Shelf(
        {"kit-code": tmp_path / "code"},
        {"kit-train": tmp_path / "out"},
        competition(tmp_path / "train", tmp_path / "hidden"),
    )


METADATA = {"dataset_sources": ["me/kit-code"], "kernel_sources": ["me/kit-train"], "competition_sources": ["organs"]}


def test_only_what_the_metadata_lists_is_mounted_in_either_layout(shelf: Shelf, tmp_path: Path) -> None:
    assert mounts(METADATA, shelf, "new") == (
        (tmp_path / "code/a.whl", "/kaggle/input/datasets/me/kit-code/a.whl"),
        (tmp_path / "out/run", "/kaggle/input/notebooks/me/kit-train/run"),
        (tmp_path / "train/train.csv", "/kaggle/input/competitions/organs/train.csv"),
        (tmp_path / "hidden/test.csv", "/kaggle/input/competitions/organs/test.csv"),
    )
    assert [target for _, target in mounts(METADATA, shelf, "flat")] == [
        "/kaggle/input/kit-code/a.whl",
        "/kaggle/input/kit-train/run",
        "/kaggle/input/organs/train.csv",
        "/kaggle/input/organs/test.csv",
    ]
    assert mounts({"dataset_sources": []}, shelf, "new") == ()


def test_a_source_that_is_not_here_is_named_with_the_way_to_get_it(shelf: Shelf) -> None:
    missing = (
        "the kernel attaches me/kit-weights, but nothing on this machine stands for it; stage it with 'hubmap push"
        " weights"
    )
    with pytest.raises(RehearsalError, match=missing):
        mounts({"dataset_sources": ["me/kit-weights"]}, shelf, "new")
    with pytest.raises(RehearsalError, match="the kernel attaches me/other-kernel.*--output other-kernel=FOLDER"):
        mounts({"kernel_sources": ["me/other-kernel"]}, shelf, "new")


# ---------------------------------------------------------------- verdicts


@pytest.fixture
def good(hidden: HiddenSet, tmp_path: Path) -> tuple[Outcome, Expected]:
    """A session that did everything right: the true masks handed in, empty ones where nothing can be read."""
    working = tmp_path / "working"
    working.mkdir()
    masks = {
        slide.id: "" if slide.fault in hidden_sets.UNREADABLE else hidden.truth[slide.id] for slide in hidden.slides
    }
    write_submission(working, masks)
    facts = {"kernel": "infer", "status": "complete", "build_id": BUILD, "seconds": 12.0, "sentence": "fine"}
    (working / "kernel.json").write_text(json.dumps(facts))
    log = tmp_path / "kernel.log"
    log.write_text(f"HUBMAP START\nfine\nHUBMAP END infer complete build_id={BUILD} utc=2026-11-23T00:00:00Z\n")
    files = ("submission.csv",)
    return Outcome(0, 12.0, GIB, 1 << 20, "", log, working), Expected(
        "infer", BUILD, ("complete",), files, (*files, "kernel.json"), hidden
    )


def write_submission(working: Path, masks: dict[str, str]) -> None:
    (working / "submission.csv").write_text("id,rle\n" + "".join(f"{key},{text}\n" for key, text in masks.items()))


def verdict_of(good: tuple[Outcome, Expected], **changes: object) -> Verdict:
    outcome, expected = good
    return judge(replace(outcome, **changes), Limits(), expected)  # type: ignore[arg-type]


def test_a_good_session_passes(good: tuple[Outcome, Expected], hidden: HiddenSet) -> None:
    verdict = verdict_of(good)
    assert verdict.problems == []
    assert verdict.status == "complete"
    assert [each.dice for each in verdict.scores if not each.unreadable] == [1.0] * (len(hidden.slides) - 2)
    assert [each.fault for each in verdict.scores if each.unreadable] == ["truncated", "missing"]


def test_a_degraded_session_fails_with_its_sentence_unless_it_is_expected(
    good: tuple[Outcome, Expected], hidden: HiddenSet
) -> None:
    outcome, expected = good
    facts = json.loads((outcome.working / "kernel.json").read_text())
    marker = f"HUBMAP END infer %s build_id={BUILD} utc=2026-11-23T00:00:00Z failed=%d/12\n"
    outcome.log.write_text("fine\n" + marker % ("complete", 2))
    assert verdict_of(good).problems == []
    outcome.log.write_text("degraded: 9 of 12 slides failed\n" + marker % ("degraded", 9))
    (outcome.working / "kernel.json").write_text(json.dumps(facts | {"status": "degraded"}))
    verdict = verdict_of(good)
    assert (verdict.status, verdict.problems) == (
        "degraded",
        ["the end marker says degraded, expected complete: 9 of 12 slides failed"],
    )
    # Where it is expected, the submission is judged as ever.
    good = outcome, replace(expected, statuses=("complete", "degraded"))
    assert verdict_of(good).problems == [] and len(verdict_of(good).scores) == len(hidden.slides)
    write_submission(outcome.working, {slide.id: "" for slide in hidden.slides[1:]})
    assert "is missing" in verdict_of(good).problems[0]


@pytest.mark.parametrize(
    ("slides", "overrides", "statuses"),
    [
        (12, [], ("complete",)),
        (7, [], ("complete", "degraded")),
        (7, ["inference.tolerated_failures=0.3"], ("complete",)),
        (12, ["inference.tolerated_failures=0.1"], ("complete", "degraded")),
    ],
)
def test_planted_faults_may_make_a_session_degraded(
    hidden: HiddenSet, slides: int, overrides: list[str], statuses: tuple[str, ...], tmp_path: Path
) -> None:
    """Two of the hidden slides cannot be read."""
    plan = Plan(tmp_path, Shelf({}, {}, {}), hidden=replace(hidden, slides=hidden.slides[:slides]))
    assert expected("infer", {"BUILD_ID": BUILD, "OVERRIDES": overrides}, plan).statuses == statuses


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dy=st.integers(-30, 30), dx=st.integers(-30, 30), seed=st.integers(0, 9))
def test_dice_is_that_of_pycocotools(
    good: tuple[Outcome, Expected], hidden: HiddenSet, dy: int, dx: int, seed: int
) -> None:
    rng, masks, wanted = np.random.default_rng(seed), {}, {}
    for slide in hidden.slides:
        truth = coco_mask(hidden.truth[slide.id], slide.height, slide.width)
        mask = np.roll(truth, (dy, dx), (0, 1)) * (rng.random(truth.shape) > 0.1).astype(np.uint8)
        mask[0, 0] = 0
        if slide.fault in hidden_sets.UNREADABLE:
            mask[:] = 0
        wanted[slide.id] = dice(truth, mask)
        masks[slide.id] = text_of(mask)
    write_submission(good[0].working, masks)
    verdict = verdict_of(good)
    assert verdict.problems == []
    assert {each.id: each.dice for each in verdict.scores} == pytest.approx(wanted)


def test_limits_and_crashes_are_named(good: tuple[Outcome, Expected]) -> None:
    memory = verdict_of(good, code=-9, stopped="memory", peak_bytes=30 * GIB).problems
    assert memory == [
        "out of memory: its processes held 30.00 GiB together, more than the session's 29 GiB, and were ended"
    ]
    assert verdict_of(good, code=-9, stopped="time").problems == [
        "out of time: it ran past the session's 540 minutes and was ended"
    ]
    assert verdict_of(good, disk_bytes=20 * GIB).problems == [
        "disk full: its output filled all 20.00 GiB of /kaggle/working"
    ]
    assert verdict_of(good, code=-11).problems[0].startswith("the kernel was killed by signal 11")
    good[0].log.write_text("a\nerror: no weights\n  \nHUBMAP END infer failed build_id=x utc=y\n")
    assert verdict_of(good, code=1).problems[0] == "the kernel ended with exit code 1: no weights"


def test_a_log_without_the_right_end_is_refused(good: tuple[Outcome, Expected]) -> None:
    log = good[0].log
    for text, sentence in (
        ("HUBMAP END infer complete build_id=x utc=y\nmore\n", "the log does not end with the kernel's end marker"),
        ("", "the log does not end with the kernel's end marker"),
        (
            "HUBMAP END train complete build_id=0123456789ab-ba9876543210 utc=y\n",
            "the end marker is that of the kernel train, expected infer",
        ),
        ("HUBMAP END infer complete build_id=old utc=y\n", f"the end marker names build old, expected {BUILD}"),
        (f"HUBMAP END infer stopped build_id={BUILD} utc=y\n", "the end marker says stopped, expected complete"),
    ):
        log.write_text(text)
        assert any(problem.startswith(sentence) for problem in verdict_of(good).problems), text


def test_kernel_json_must_agree_with_the_log(good: tuple[Outcome, Expected]) -> None:
    path = good[0].working / "kernel.json"
    path.write_text(json.dumps({"kernel": "infer", "status": "complete", "build_id": "other"}))
    assert verdict_of(good).problems == [f"kernel.json says infer complete other, the log infer complete {BUILD}"]
    path.write_text("{")
    assert verdict_of(good).problems == ["kernel.json is missing or no summary of the kernel (JSONDecodeError)"]


def test_a_secret_in_the_log_or_in_any_file_is_found(good: tuple[Outcome, Expected]) -> None:
    outcome, expected = good
    folder = outcome.working / "run"
    folder.mkdir()
    (folder / "environment.json").write_bytes(
        b"\0" * ((1 << 24) - 5) + CANARY.encode() + b"\0"
    )  # over the edge of a chunk
    verdict = judge(outcome, Limits(), replace(expected, files=("submission.csv", "run/**")))
    assert verdict.problems == ["environment.json holds the value of a secret variable of the session"]
    shutil.rmtree(folder)
    outcome.log.write_text(f"{CANARY}\n{outcome.log.read_text()}")
    assert verdict_of(good).problems == ["kernel.log holds the value of a secret variable of the session"]


def test_the_network_is_named_with_host_and_line(good: tuple[Outcome, Expected]) -> None:
    note = {"host": "pypi.org:443", "line": "/kaggle/src/script.py:7 in <module>", "event": "socket.connect"}
    assert verdict_of(good, network=(note, note), lost_packets=3).problems == [
        "used the network, which a code competition forbids: asked for pypi.org:443 at /kaggle/src/script.py:7 in"
        " <module>"
    ]
    packets = "used the network, which a code competition forbids: 3 packets of a program that is not Python"
    assert verdict_of(good, lost_packets=3).problems == [packets]


def test_odd_and_missing_files_are_named(good: tuple[Outcome, Expected]) -> None:
    working = good[0].working
    (working / "stores").mkdir()
    (working / "stores" / "images.bin").touch()
    (working / "data").symlink_to("/kaggle/input")
    assert verdict_of(good).problems == [
        "data lies in the output, where nothing expects it",
        "stores/images.bin lies in the output, where nothing expects it",
        "data is a link in the output, which Kaggle does not keep",
    ]
    shutil.rmtree(working / "stores")
    (working / "data").unlink()
    (working / "submission.csv").unlink()
    assert verdict_of(good).problems == ["submission.csv is missing from the output"]


def test_a_submission_that_the_scorer_refuses_fails(good: tuple[Outcome, Expected], hidden: HiddenSet) -> None:
    path = good[0].working / "submission.csv"
    lines = path.read_text().splitlines(keepends=True)
    first, second = hidden.slides[:2]
    for changed, sentence in (
        (lines[:-1], f"id {hidden.slides[-1].id} is missing"),
        ([lines[0], lines[2], lines[1], *lines[3:]], f"id {second.id} stands where {first.id} was expected"),
        ([lines[0], f"{first.id},0 5\n", *lines[2:]], "has start 0"),
        ([lines[0], f"{first.id},{first.height * first.width} 5\n", *lines[2:]], "ends at pixel"),
    ):
        path.write_text("".join(changed))
        problems = verdict_of(good).problems
        assert len(problems) == 1
        assert sentence in problems[0]


def test_a_mask_of_a_slide_that_nobody_can_read_is_suspicious(
    good: tuple[Outcome, Expected], hidden: HiddenSet
) -> None:
    write_submission(good[0].working, {slide.id: "5 2" for slide in hidden.slides})
    broken = next(slide for slide in hidden.slides if slide.fault == "truncated")
    assert verdict_of(good).problems == [f"slide {broken.id} cannot be read, but its row holds a mask"]


def test_empty_masks_of_readable_slides_are_noted(good: tuple[Outcome, Expected], hidden: HiddenSet) -> None:
    write_submission(
        good[0].working, {slide.id: hidden.truth[slide.id] if slide.fault in ODD else "" for slide in hidden.slides}
    )
    verdict = verdict_of(good)
    assert verdict.problems == []
    assert f"7 readable slides have an empty mask, the first is {hidden.slides[0].id}" in verdict.notes


ODD = {"lzw": "LZW-compressed", "size": "its size is not the table's", "pixel_size": "its pixel size is missing"}


@pytest.mark.parametrize("fault", ODD)
def test_an_odd_slide_that_can_be_read_must_have_a_mask(
    good: tuple[Outcome, Expected], hidden: HiddenSet, fault: str
) -> None:
    odd = next(slide for slide in hidden.slides if slide.fault == fault)
    lines = (good[0].working / "submission.csv").read_text().splitlines()
    (good[0].working / "submission.csv").write_text(
        "\n".join(f"{odd.id}," if line.startswith(f"{odd.id},") else line for line in lines) + "\n"
    )
    assert verdict_of(good).problems == [f"slide {odd.id} ({ODD[fault]}) can be read, but its row is empty"]
    log = good[0].log.read_text()
    good[0].log.write_text(f"slide {odd.id} gets an empty mask: imagecodecs is not here\n{log}")
    assert verdict_of(good).problems == [
        f"slide {odd.id} ({ODD[fault]}) can be read, but the kernel failed on it: imagecodecs is not here"
    ]


def test_a_kernel_that_fails_on_a_good_slide_or_runs_late_fails(
    good: tuple[Outcome, Expected], hidden: HiddenSet
) -> None:
    """The lines are those that the inference writes; `test_rehearsal` sees it write one of them."""
    log, first = good[0].log.read_text(), hidden.slides[0].id
    good[0].log.write_text(f"slide {first} gets an empty mask: out of memory\n{log}")
    assert verdict_of(good).problems == [f"slide {first} can be read, but the kernel failed on it: out of memory"]
    broken = next(slide.id for slide in hidden.slides if slide.fault == "truncated")
    good[0].log.write_text(f"slide {broken} gets an empty mask: the file is truncated\n{log}")
    assert verdict_of(good).problems == []
    for late in (first, broken):
        good[0].log.write_text(
            f"slide {late} gets an empty mask: there is no time for it; governor.csv tells which other slides do\n{log}"
        )
        assert verdict_of(good).problems == [
            f"the kernel had no time for slide {late}, and maybe for others, so their rows are empty"
        ]


def test_the_truth_never_was_a_run_length_string(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mistake that the kit makes in writing both truth and submission would cancel itself out; here it must cost
    Dice.
    """
    encode = rle.encode

    def a_row_off(mask: np.ndarray, origin: int = 0) -> str:
        moved = np.roll(mask, 1, axis=0)
        moved[0, 0] = 0
        return encode(moved, origin)

    monkeypatch.setattr(rle, "encode", a_row_off)
    made = make_hidden(tmp_path, slides=7, faults=False, largest=200)
    write_submission(tmp_path, made.truth)
    assert all(0.5 < each.dice < 1 for each in score(tmp_path / "submission.csv", made))


def test_the_table_says_where_python_is_not_kaggles(good: tuple[Outcome, Expected]) -> None:
    steps = [
        Step(version, "infer", "new", good[0], verdict_of(good), Limits(), version)
        for version in ("3.11", KAGGLE_PYTHON)
    ]
    _, _, other, same = table(steps).splitlines()
    assert "3.11, Kaggle has 3.13" in other
    assert same.split()[-3:] == ["3.13", "complete", "PASS"]


# ---------------------------------------------------------------- must fail


def test_a_second_fault_behind_the_planted_one_is_reported(good: tuple[Outcome, Expected]) -> None:
    def step(**changes: object) -> Step:
        return Step("disk", "infer", "new", good[0], verdict_of(good, **changes), Limits(), "3.13")

    assert surprises(step(), "disk full") == ["disk passed, but must fail"]
    assert surprises(step(disk_bytes=20 * GIB), "disk full") == []
    both = step(disk_bytes=20 * GIB, copy_error="the output could not be copied out")
    assert surprises(both, "disk full") == ["disk failed as it must, but besides: the output could not be copied out"]
    assert len(both.verdict.problems) == 2
    assert both.verdict.problems[0].startswith("disk full")
    assert surprises(step(copy_error="one", lost_packets=1), "disk full") == [
        (
            "disk failed for another reason: used the network, which a code competition forbids: 1 packets of a program"
            " that is not Python"
        ),
        "disk failed for another reason: one",
    ]
