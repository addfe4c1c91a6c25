"""The whole journey through the real command line, on small synthetic slides and on real ones."""

from __future__ import annotations

import csv
import json
import os
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
import torch
import yaml
from pycocotools import mask as coco
from tiny import TINY, overrides

from hubmap_kit.__main__ import main
from hubmap_kit.competition.organs import ORGANS


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(argument) for argument in arguments])
    return int(stop.value.code or 0)


def rows_of(path: Path) -> list[dict[str, str]]:
    csv.field_size_limit(2**31 - 1)
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))


def coco_mask(text: str, height: int, width: int) -> np.ndarray:
    """Decode a 0-based column-major string with pycocotools, which wants alternating run lengths."""
    counts, position = [], 0
    numbers = [int(word) for word in text.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        counts += [start - position, length]
        position = start + length
    counts.append(height * width - position)
    return coco.decode(coco.frPyObjects({"counts": counts, "size": [height, width]}, height, width))


def test_a_run_folder_describes_itself(tiny_run: Path, sample_data: Path) -> None:
    settings = yaml.safe_load((tiny_run / "config.yaml").read_text())
    assert settings["training"]["epochs"] == 2
    assert settings["model"]["mean"] == [0.485, 0.456, 0.406]
    environment = json.loads((tiny_run / "environment.json").read_text())[0]
    assert environment["packages"]["torch"]
    assert environment["accelerator"]["type"] == "cpu"
    metrics = pd.read_csv(tiny_run / "metrics.csv")
    assert sorted(zip(metrics["fold"], metrics["epoch"], strict=True)) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert {f"dice_{organ}" for organ in ORGANS} <= set(metrics.columns)
    oof = pd.read_csv(tiny_run / "oof.csv", dtype={"id": str})
    assert sorted(oof["id"]) == sorted(row["id"] for row in rows_of(sample_data / "train.csv"))
    assert set(json.loads((tiny_run / "thresholds.json").read_text())) == set(ORGANS)
    for name in ("curves.png", "thresholds.png"):
        assert cv2.imread(str(tiny_run / name)) is not None


def test_out_of_fold_slides_are_those_of_their_fold(tiny_run: Path) -> None:
    folds = {row["id"]: row["fold"] for row in rows_of(tiny_run / "folds.csv")}
    assert {row["id"]: row["fold"] for row in rows_of(tiny_run / "oof.csv")} == folds
    assert set(folds.values()) == {"0", "1"}


def test_predict_writes_a_submission_for_exactly_the_test_table(
    tiny_run: Path, sample_data: Path, tmp_path: Path
) -> None:
    out = tmp_path / "submission.csv"
    assert (
        run(
            "predict",
            tiny_run,
            "--test",
            sample_data / "test.csv",
            "--out",
            out,
            "--device",
            "cpu",
            "--overlays",
            tmp_path / "o",
        )
        == 0
    )
    test = rows_of(sample_data / "test.csv")
    rows = rows_of(out)
    assert [row["id"] for row in rows] == [row["id"] for row in test]
    for row, slide in zip(rows, test, strict=True):
        mask = coco_mask(row["rle"], int(slide["img_height"]), int(slide["img_width"]))
        assert mask[0, 0] == 0
        assert (tmp_path / "o" / f"{row['id']}.png").is_file()
    assert run("check-submission", out, "--test", sample_data / "test.csv") == 0
    assert not list(tmp_path.glob("*.partial"))


def test_a_run_folder_is_all_that_prediction_needs(tiny_run: Path, sample_data: Path, tmp_path: Path) -> None:
    """The weights, config and thresholds alone, moved elsewhere, give the same file."""
    small = tmp_path / "published"
    for name in ("config.yaml", "thresholds.json", "fold0/model.safetensors", "fold1/model.safetensors"):
        (small / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny_run / name, small / name)
    for source, out in ((tiny_run, "a.csv"), (small, "b.csv")):
        assert (
            run("predict", source, "--test", sample_data / "test.csv", "--out", tmp_path / out, "--device", "cpu") == 0
        )
    assert (tmp_path / "a.csv").read_bytes() == (tmp_path / "b.csv").read_bytes()


def test_an_unreadable_slide_costs_that_slide_only(
    tiny_run: Path, sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(sample_data, data)
    ids = [row["id"] for row in rows_of(data / "test.csv")]
    broken, missing = data / "test_images" / f"{ids[0]}.tiff", data / "test_images" / f"{ids[1]}.tiff"
    broken.write_bytes(broken.read_bytes()[:2000])
    missing.unlink()
    assert (
        run("predict", tiny_run, "--test", data / "test.csv", "--out", tmp_path / "strict.csv", "--device", "cpu") == 1
    )
    assert not (tmp_path / "strict.csv").exists()
    assert (
        run(
            "predict",
            tiny_run,
            "--test",
            data / "test.csv",
            "--out",
            tmp_path / "kernel.csv",
            "--device",
            "cpu",
            "--on-error",
            "degrade",
        )
        == 0
    )
    assert ids[0] in capsys.readouterr().out
    assert (
        run("predict", tiny_run, "--test", sample_data / "test.csv", "--out", tmp_path / "whole.csv", "--device", "cpu")
        == 0
    )
    kernel, whole = rows_of(tmp_path / "kernel.csv"), rows_of(tmp_path / "whole.csv")
    assert [row["rle"] for row in kernel[:2]] == ["", ""]
    assert kernel[2:] == whole[2:]


def test_evaluate_repeats_the_trainings_own_table(tiny_run: Path, tmp_path: Path) -> None:
    run_folder = tmp_path / "run"
    shutil.copytree(tiny_run, run_folder)
    (run_folder / "oof.csv").unlink()
    assert run("evaluate", run_folder, "--device", "cpu", "--stores", tiny_run.parent / "stores") == 0
    assert (run_folder / "oof.csv").read_bytes() == (tiny_run / "oof.csv").read_bytes()
    assert sorted(path.stem for path in (run_folder / "overlays").glob("*.png")) == sorted(ORGANS)


def test_out_of_fold_dice_is_the_dice_of_a_prediction_by_that_fold(
    tiny_run: Path, sample_data: Path, tmp_path: Path
) -> None:
    """Predict the held-out slides through the test path, decode with pycocotools, and compare with oof.csv."""
    data = tmp_path / "data"
    (data / "test_images").mkdir(parents=True)
    held_out = [row for row in rows_of(tiny_run / "oof.csv") if row["fold"] == "0"]
    train = {row["id"]: row for row in rows_of(sample_data / "train.csv")}
    columns = ["id", "organ", "data_source", "img_height", "img_width", "pixel_size", "tissue_thickness"]
    with open(data / "test.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(train[row["id"]] for row in held_out)
    for row in held_out:
        shutil.copy(sample_data / "train_images" / f"{row['id']}.tiff", data / "test_images")
    assert (
        run(
            "predict",
            tiny_run,
            "--folds",
            "0",
            "--test",
            data / "test.csv",
            "--out",
            tmp_path / "s.csv",
            "--device",
            "cpu",
        )
        == 0
    )
    for row, predicted in zip(held_out, rows_of(tmp_path / "s.csv"), strict=True):
        size = int(train[row["id"]]["img_height"]), int(train[row["id"]]["img_width"])
        ours, truth = coco_mask(predicted["rle"], *size), coco_mask(train[row["id"]]["rle"], *size)
        dice = 2 * np.count_nonzero(ours & truth) / max(np.count_nonzero(ours) + np.count_nonzero(truth), 1)
        # The submission leaves out pixel (0, 0), and thresholds compare floats: a pixel more or less.
        assert abs(dice - float(row["dice"])) < 2e-3


def test_real_slides_go_through_the_journey(shared_data: Path, tmp_path: Path) -> None:
    mini = shared_data / "hubmap-mini"
    settings = overrides(*TINY, "training.epochs=1", "scale.um_per_px=4.0")
    assert (
        run("train", "--config", "mini", "--data", mini, "--out", tmp_path / "run", "--device", "cpu", *settings) == 0
    )
    oof = rows_of(tmp_path / "run" / "oof.csv")
    assert len(oof) == 26
    assert (
        run(
            "predict",
            tmp_path / "run",
            "--test",
            mini / "test.csv",
            "--out",
            tmp_path / "submission.csv",
            "--device",
            "cpu",
        )
        == 0
    )
    assert [row["id"] for row in rows_of(tmp_path / "submission.csv")] == ["10078"]


def test_the_sample_verb_writes_nothing_over_other_files(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    assert run("sample", tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_an_error_is_one_line_and_v_shows_where_it_came_from() -> None:
    command = [sys.executable, "-m", "hubmap_kit", "train", "--config", "nope", "--out", "x"]
    plain = subprocess.run(command, capture_output=True, text=True, check=False)
    assert plain.returncode == 1
    assert plain.stderr.startswith("error: ") and plain.stderr.count("\n") == 1
    verbose = subprocess.run([*command[:3], "-v", *command[3:]], capture_output=True, text=True, check=False)
    assert "Traceback" in verbose.stderr and verbose.stderr.rstrip().splitlines()[-1] == plain.stderr.strip()


def test_v_works_behind_the_verb_too() -> None:
    command = [sys.executable, "-m", "hubmap_kit", "train", "-v", "--config", "nope", "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" in done.stderr


def test_a_run_that_never_finished_an_epoch_may_be_started_again(sample_data: Path, tmp_path: Path) -> None:
    base = [
        "train",
        "--config",
        "baseline",
        "--data",
        sample_data,
        "--out",
        tmp_path / "run",
        "--device",
        "cpu",
        *overrides(*TINY),
    ]
    assert run(*base, "--folds", "9") == 1
    assert run(*base, *overrides("training.epochs=1", "data.n_folds=3"), "--folds", "2") == 0
    assert {row["fold"] for row in rows_of(tmp_path / "run" / "folds.csv")} == {"0", "1", "2"}


def test_a_data_folder_is_a_path_not_yaml(sample_data: Path, tmp_path: Path) -> None:
    odd = tmp_path / "my data #2: new"
    shutil.copytree(sample_data, odd)
    settings = overrides(*TINY, "training.epochs=1")
    assert (
        run(
            "train",
            "--config",
            "baseline",
            "--data",
            odd,
            "--out",
            tmp_path / "run",
            "--device",
            "cpu",
            "--folds",
            "0",
            *settings,
        )
        == 0
    )
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data"]["folder"] == str(odd)


def test_when_every_slide_fails_it_says_so(
    tiny_run: Path, sample_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(sample_data / "test.csv", data)
    assert (
        run(
            "predict",
            tiny_run,
            "--test",
            data / "test.csv",
            "--out",
            tmp_path / "s.csv",
            "--device",
            "cpu",
            "--on-error",
            "degrade",
        )
        == 1
    )
    assert "nothing but empty masks" in capsys.readouterr().err
    # The rows are there all the same: a kernel's submission is complete, if worthless.
    assert len(rows_of(tmp_path / "s.csv")) == len(rows_of(data / "test.csv"))


def test_a_refused_submission_does_not_replace_a_good_one(tmp_path: Path) -> None:
    from hubmap_kit.competition.submission import SubmissionWriter
    from hubmap_kit.errors import SubmissionError

    def refuse(partial: Path) -> None:
        assert partial.read_text() == "id,rle\n7,1 2\n"
        raise SubmissionError("no")

    good = tmp_path / "submission.csv"
    good.write_text("good")
    with pytest.raises(SubmissionError), SubmissionWriter(good, ["7"], refuse) as writer:
        writer.add("7", "1 2")
    assert good.read_text() == "good"


def test_ctrl_c_ends_with_a_hint(sample_data: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "hubmap_kit",
        "train",
        "--config",
        "baseline",
        "--data",
        str(sample_data),
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        [*command, "--device", "cpu", *overrides(*TINY, "training.epochs=500")], stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "run" / "fold0" / "metrics.csv").is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert errors.rstrip().splitlines()[-1].startswith("error: stopped") and "Traceback" not in errors


@pytest.mark.parametrize("device", ["cpu", "cpu,cpu"])
def test_sigterm_to_all_processes_ends_like_the_clock(device: str, sample_data: Path, tmp_path: Path) -> None:
    """A batch system's request to end: saved, exit code 0, and a line that says how to go on; whoever cuts tiles gets
    the signal too.
    """
    out = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "hubmap_kit",
        "train",
        "--config",
        "baseline",
        "--data",
        str(sample_data),
        "--out",
        str(out),
    ]
    settings = overrides(*TINY, "training.epochs=500", "training.workers=1")
    process = subprocess.Popen(
        [*command, "--device", device, *settings], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        folds = [out / f"fold{number}" / "metrics.csv" for number in range(1 + device.count(","))]
        while not all(path.is_file() for path in folds) and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    last = errors.rstrip().splitlines()[-1]
    assert last.startswith("stopped: SIGTERM came: fold ") and last.endswith(
        f"go on with 'hubmap train --out {out} --resume'"
    )
    assert "Traceback" not in errors and not list(out.rglob(".*.tmp*")) and (out / "curves.png").is_file()
    for path in folds:
        done = len(rows_of(path))
        assert torch.load(path.parent / "last.ckpt", weights_only=True)["epoch"] == done < 500
        assert f"{path.parent.name[:4]} {path.parent.name[4:]} after epoch {done} of 500" in last


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="only Linux tells the largest resident set of this program alone"
)
def test_a_slide_of_4500_px_stays_under_2_gib(tmp_path: Path) -> None:
    """The whole path, read to written row, at the full resolution, in a process of its own; the model alone is the
    baseline.
    """
    for side in (64, 4500):
        data = tmp_path / f"d{side}"
        (data / "test_images").mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 255, (side, side, 3), np.uint8)
        tifffile.imwrite(data / "test_images" / "1.tiff", noise, photometric="rgb", compression="deflate")
        columns = "id,organ,data_source,img_height,img_width,pixel_size,tissue_thickness"
        (data / "test.csv").write_text(f"{columns}\n1,kidney,Hubmap,{side},{side},0.5,10\n")
    code = (
        "import sys\n"
        "from hubmap_kit import experiment\n"
        "from hubmap_kit.files import write_yaml\n"
        "from hubmap_kit.models.build import build\n"
        "from safetensors.torch import save_file\n"
        "from pathlib import Path\n"
        "from hubmap_kit.jobs.predict import predict\n"
        "run, settings = Path(sys.argv[1]), experiment.load('baseline', sys.argv[4:])\n"
        "write_yaml(run / 'config.yaml', experiment.dump(settings))\n"
        "(run / 'fold0').mkdir()\n"
        "save_file(build(settings.model).state_dict(), run / 'fold0' / 'model.safetensors')\n"
        "for data in map(Path, sys.argv[2:4]):\n"
        "    predict([run], data / 'test.csv', data / 's.csv', device='cpu')\n"
        # rusage remembers whoever started it
        "    print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    folders = [str(tmp_path / name) for name in ("run", "d64", "d4500")]
    settings = [
        *TINY,
        "scale.policy=reduce",
        "scale.reduce=1",
        "inference.window=512",
        "inference.batch_size=1",
        "inference.views=none",
    ]
    done = subprocess.run(
        [sys.executable, "-c", code, *folders, *settings], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    model, whole = (int(line) * 1024 for line in done.stdout.splitlines())
    assert 4500 * 4500 * 3 < whole - model < 2 * 2**30


@pytest.mark.parametrize(
    ("verb", "words"),
    [
        ("demo", ["--out", "Folder for everything"]),
        ("sample", ["OUT", "Folder for the slides"]),
        ("config", ["[NAME]", "A shipped experiment"]),
        ("train", ["--resume", "Go on with the run"]),
        ("evaluate", ["RUN", "A run folder"]),
        ("predict", ["RUNS...", "Run folders"]),
        ("check-submission", ["SUBMISSION", "The submission.csv"]),
    ],
)
def test_help_describes_every_argument(verb: str, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(verb, "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for word in words:
        assert word in shown
