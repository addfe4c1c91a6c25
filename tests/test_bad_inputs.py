"""Bad inputs through the real command line: each ends in exit code 1 and its own one-line error, never a traceback."""

from __future__ import annotations

import csv
import pickle
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from safetensors.torch import load_file, save_file
from tiny import TINY, overrides

from hubmap_kit.__main__ import main


@dataclass
class World:
    """A private copy of small slides and of a trained run, to be spoilt."""

    data: Path
    run: Path
    stores: Path
    tmp: Path

    def train(self, *more: str, config: str = "baseline") -> list[str]:
        base = [
            "train",
            "--config",
            config,
            "--data",
            str(self.data),
            "--out",
            str(self.tmp / "new"),
            "--stores",
            str(self.stores),
        ]
        return [*base, "--device", "cpu", *overrides(*TINY), *more]

    def resume(self, *more: str) -> list[str]:
        return [
            "train",
            "--out",
            str(self.run),
            "--resume",
            "--data",
            str(self.data),
            "--stores",
            str(self.stores),
            "--device",
            "cpu",
            *more,
        ]

    def predict(self, *more: str) -> list[str]:
        return [
            "predict",
            str(self.run),
            "--test",
            str(self.data / "test.csv"),
            "--out",
            str(self.tmp / "s.csv"),
            "--device",
            "cpu",
            *more,
        ]

    def check(self) -> list[str]:
        return ["check-submission", str(self.data / "sample_submission.csv"), "--test", str(self.data / "test.csv")]

    def edit(self, name: str, change: Callable[[list[dict[str, str]]], object]) -> None:
        """Change the rows of a table in place."""
        csv.field_size_limit(2**31 - 1)
        with open(self.data / name, newline="") as handle:
            rows = list(csv.DictReader(handle))
        change(rows)
        with open(self.data / name, "w", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)

    def cell(self, name: str, column: str, value: str, row: int = 0) -> None:
        self.edit(name, lambda rows: rows[row].__setitem__(column, value))

    def slide(self, folder: str = "test_images") -> Path:
        table = "test.csv" if folder == "test_images" else "train.csv"
        with open(self.data / table, newline="") as handle:
            return self.data / folder / f"{next(csv.DictReader(handle))['id']}.tiff"


@pytest.fixture
def world(sample_data: Path, tiny_run: Path, tmp_path: Path) -> World:
    shutil.copytree(sample_data, tmp_path / "data")
    shutil.copytree(tiny_run, tmp_path / "run")
    return World(tmp_path / "data", tmp_path / "run", tiny_run.parent / "stores", tmp_path)


def drop_column(name: str, column: str) -> Callable[[World], object]:
    return lambda w: w.edit(name, lambda rows: [row.pop(column) for row in rows])


class Code:
    """What a hostile checkpoint would carry: unpickling it runs a command."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (Path("pwned-by-a-checkpoint"),)


def folder_of_somebody(w: World) -> None:
    (w.tmp / "mine").mkdir()
    (w.tmp / "mine" / "config.yaml").write_text("name: precious\n")


def spoil_weights(w: World) -> None:
    path = w.run / "fold0" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])


def other_weights(w: World) -> None:
    save_file({"head.weight": torch.zeros(3)}, w.run / "fold0" / "model.safetensors")


def no_folds(w: World) -> None:
    for path in w.run.glob("fold*/model.safetensors"):
        path.unlink()


def code_in_checkpoint(w: World) -> None:
    with open(w.run / "fold0" / "last.ckpt", "wb") as handle:
        pickle.dump({"format": 1, "network": Code()}, handle)


def odd_checkpoint(w: World) -> None:
    torch.save({"format": 1, "epoch": 3}, w.run / "fold0" / "last.ckpt")


def one_fold_for_all(w: World) -> None:
    with open(w.data / "train.csv", newline="") as handle:
        ids = [row["id"] for row in csv.DictReader(handle)]
    (w.tmp / "folds.csv").write_text("id,organ,data_source,fold\n" + "".join(f"{i},kidney,HPA,0\n" for i in ids))


def diverged(w: World) -> None:
    path = w.run / "fold0" / "model.safetensors"
    save_file(
        {
            name: torch.full_like(value, torch.nan) if value.is_floating_point() else value
            for name, value in load_file(path).items()
        },
        path,
    )


def seven_channels(w: World) -> None:
    tifffile.imwrite(
        w.slide(),
        np.zeros((7, 64, 64), np.uint8),
        photometric="minisblack",
        planarconfig="separate",
        metadata={"axes": "SYX"},
    )


Spoil = Callable[[World], object]
Verb = Callable[[World], list[str]]


def case(name: str, spoil: Spoil | None, verb: Verb, *words: str) -> object:
    return pytest.param(spoil or (lambda w: None), verb, words, id=name)


TRAIN: Verb = World.train
PREDICT: Verb = World.predict
RESUME: Verb = World.resume
CHECK: Verb = World.check


def changed(*settings: str) -> Verb:
    return lambda w: w.train(*overrides(*settings))


CASES = [
    # tables
    case("no train.csv", lambda w: (w.data / "train.csv").unlink(), TRAIN, "train.csv", "does not exist"),
    case("empty table", lambda w: (w.data / "train.csv").write_text(""), TRAIN, "train.csv", "empty"),
    case("binary table", lambda w: (w.data / "train.csv").write_bytes(b"\x00\xff\xfe" * 99), TRAIN, "train.csv"),
    case("missing column", drop_column("train.csv", "organ"), TRAIN, "train.csv", "organ"),
    case("missing mask column", drop_column("train.csv", "rle"), TRAIN, "train.csv", "rle"),
    case(
        "duplicate id",
        lambda w: w.edit("train.csv", lambda rows: rows.append(rows[0])),
        TRAIN,
        "train.csv",
        "repeats the id",
    ),
    case("unknown organ", lambda w: w.cell("train.csv", "organ", "kidny"), TRAIN, "kidny", "kidney"),
    case("unknown source", lambda w: w.cell("test.csv", "data_source", "GTEx"), PREDICT, "GTEx", "Hubmap"),
    case("height in words", lambda w: w.cell("test.csv", "img_height", "tall"), PREDICT, "img_height", "tall"),
    case("negative pixel size", lambda w: w.cell("test.csv", "pixel_size", "-0.4"), PREDICT, "pixel_size", "-0.4"),
    case("id with a path in it", lambda w: w.cell("test.csv", "id", "../x"), PREDICT, "../x"),
    case("no test table", lambda w: (w.data / "test.csv").unlink(), PREDICT, "test.csv", "does not exist"),
    # slides
    case("missing slide", lambda w: w.slide().unlink(), PREDICT, "test_images", "lacks the slide files"),
    case("truncated slide", lambda w: w.slide().write_bytes(w.slide().read_bytes()[:3000]), PREDICT, "tiff"),
    case("empty slide", lambda w: w.slide().write_bytes(b""), PREDICT, "tiff", "empty"),
    case("alien slide", lambda w: w.slide().write_bytes(b"%PDF-1.7 not a picture at all" * 50), PREDICT, "tiff"),
    case("seven channels", seven_channels, PREDICT, "tiff", "7"),
    # masks
    case("odd number of numbers", lambda w: w.cell("train.csv", "rle", "10 5 30"), TRAIN, "3 numbers", "pairs"),
    case("words in a mask", lambda w: w.cell("train.csv", "rle", "10 five"), TRAIN, "five"),
    case("mask beyond the slide", lambda w: w.cell("train.csv", "rle", "99999999 5"), TRAIN, "99999999"),
    case("overlapping runs", lambda w: w.cell("train.csv", "rle", "10 5 12 5"), TRAIN, "12"),
    case("negative length", lambda w: w.cell("train.csv", "rle", "10 -5"), TRAIN, "-5"),
    # experiments
    case("unknown experiment", None, lambda w: w.train(config="basline"), "basline", "did you mean 'baseline'"),
    case(
        "broken YAML",
        lambda w: (w.tmp / "e.yaml").write_text("training: [1, 2\n"),
        lambda w: w.train(config=str(w.tmp / "e.yaml")),
        "YAML",
    ),
    case(
        "a list as experiment",
        lambda w: (w.tmp / "e.yaml").write_text("- 1\n"),
        lambda w: w.train(config=str(w.tmp / "e.yaml")),
        "list",
    ),
    case("unknown key", None, changed("training.epoch=3"), "training.epoch", "did you mean 'epochs'"),
    case("value out of range", None, changed("training.lr=-3"), "training.lr", "-3"),
    case("override without value", None, changed("training.lr"), "section.key=value"),
    case("unknown network", None, changed("model.arch=unett"), "unett", "did you mean 'unet'"),
    case("unknown encoder", None, changed("model.encoder=resnet19", "model.options={}"), "resnet19", "did you mean"),
    case("unknown decoder option", None, changed("model.options={depth: 3}"), "depth", "encoder_depth"),
    case("unknown loss", None, changed("training.loss=bce+dise"), "dise", "dice"),
    case("no such fold", None, lambda w: w.train("--folds", "0,7"), "fold 7"),
    case("folds in words", None, lambda w: w.train("--folds", "all"), "--folds", "all"),
    case("more folds than slides", None, changed("data.n_folds=99"), "99"),
    case("no such device", None, lambda w: [*w.train(), "--device", "quantum"], "quantum", "--device cpu"),
    case(
        "no such weights",
        None,
        changed("model.encoder_weights=/no/such.safetensors"),
        "/no/such.safetensors",
        "does not exist",
    ),
    case("no data folder", None, lambda w: [a for a in w.train() if a not in ("--data", str(w.data))], "--data"),
    case(
        "a rate that explodes",
        None,
        changed("training.lr=1e25", "training.clip_norm=0"),
        "the loss became",
        "training.lr",
    ),
    case(
        "a batch too small for batch norm",
        None,
        changed("model.arch=deeplabv3plus", "model.options={}", "training.batch_size=1"),
        "batch",
    ),
    case(
        "options that shrink the output",
        None,
        changed("model.arch=fpn", "model.options={upsampling: 2}"),
        "logits",
        "model.options",
    ),
    case("half precision on a CPU", None, changed("training.precision=fp16"), "training.precision", "fp16"),
    case(
        "a split into one fold",
        one_fold_for_all,
        lambda w: w.train(*overrides(f"data.folds_csv={w.tmp}/folds.csv")),
        "fold",
    ),
    case(
        "the run folder is a file",
        lambda w: (w.tmp / "f").touch(),
        lambda w: [*w.train(), "--out", str(w.tmp / "f")],
        "check the path",
    ),
    case("the submission is a folder", None, lambda w: w.predict("--out", str(w.data)), "is a folder"),
    # runs and checkpoints
    case("run folder in use", None, lambda w: [*w.train(), "--out", str(w.run)], "already holds a run", "--resume"),
    case(
        "a folder with a config of somebody's own",
        folder_of_somebody,
        lambda w: [*w.train(), "--out", str(w.tmp / "mine")],
        "holds no run",
    ),
    case("not a run folder", lambda w: (w.run / "config.yaml").unlink(), PREDICT, "not a run folder"),
    case("no trained fold", no_folds, PREDICT, "no trained fold"),
    case("fold not trained", None, lambda w: w.predict("--folds", "4"), "[4]"),
    case("damaged weights", spoil_weights, PREDICT, "model.safetensors", "fold0"),
    case("weights of another network", other_weights, PREDICT, "model.safetensors"),
    case(
        "damaged thresholds",
        lambda w: (w.run / "thresholds.json").write_text("[0.4]"),
        PREDICT,
        "thresholds.json",
        "hubmap evaluate",
    ),
    case("override of a trained network", None, lambda w: w.predict(*overrides("model.arch=fpn")), "inference.*"),
    case(
        "damaged checkpoint",
        lambda w: (w.run / "fold0" / "last.ckpt").write_bytes(b"PK\x03\x04 cut"),
        RESUME,
        "last.ckpt",
        "damaged",
    ),
    case("checkpoint with code in it", code_in_checkpoint, RESUME, "last.ckpt"),
    case("checkpoint without its parts", odd_checkpoint, RESUME, "last.ckpt", "lacks"),
    case("weights that diverged", diverged, PREDICT, "NaN", "training.lr"),
    case(
        "evaluate without the split",
        lambda w: (w.run / "folds.csv").unlink(),
        lambda w: ["evaluate", str(w.run)],
        "folds.csv",
    ),
    case(
        "evaluate does not take thresholds",
        None,
        lambda w: ["evaluate", str(w.run), *overrides("inference.threshold=0.3")],
        "hubmap predict",
    ),
    case("resumed with other settings", None, lambda w: w.resume(*overrides("training.lr=0.5")), "training.lr", "0.5"),
    case(
        "resumed on other masks",
        lambda w: w.cell("train.csv", "rle", "10 5"),
        RESUME,
        "last.ckpt",
        "other slides or masks",
    ),
    # submissions
    case(
        "submission lacks a row",
        lambda w: w.edit("sample_submission.csv", lambda rows: rows.pop()),
        CHECK,
        "sample_submission.csv",
    ),
    case(
        "submission row twice",
        lambda w: w.edit("sample_submission.csv", lambda rows: rows.append(rows[0])),
        CHECK,
        "sample_submission.csv",
    ),
    case("submission starts at 0", lambda w: w.cell("sample_submission.csv", "rle", "0 5"), CHECK, "0"),
    case(
        "submission beyond the slide", lambda w: w.cell("sample_submission.csv", "rle", "88888888 5"), CHECK, "88888893"
    ),
]


@pytest.mark.parametrize(("spoil", "verb", "words"), CASES)
def test_a_bad_input_is_one_clear_line(
    spoil: Spoil,
    verb: Verb,
    words: tuple[str, ...],
    world: World,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(world.tmp)
    spoil(world)
    # config.yaml and environment.json say where the data lies now and what each session ran on; the rest is hours of
    # work.
    kept = [
        path for path in world.run.rglob("*") if path.is_file() and path.name not in ("config.yaml", "environment.json")
    ]
    before = {path: path.read_bytes() for path in kept}
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(verb(world))
    captured = capsys.readouterr()
    assert stop.value.code == 1
    lines = captured.err.strip().splitlines()
    assert lines[-1].startswith("error: "), captured.err
    assert "Traceback" not in captured.err
    for word in words:
        assert word in lines[-1]
    # Nothing that was there is lost or changed, and nothing from a file was run.
    assert {path: path.read_bytes() for path in before} == before
    assert not (world.tmp / "pwned-by-a-checkpoint").exists()
    assert not (world.tmp / "s.csv").exists()
    mine = world.tmp / "mine" / "config.yaml"
    assert not mine.exists() or mine.read_text() == "name: precious\n"
