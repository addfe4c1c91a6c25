"""The studies of scripts/generalising.py: which recipes are trained on what, and on what they are judged."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hubmap_kit.competition.tables import read_train
from hubmap_kit.jobs.external import merge
from hubmap_kit.jobs.restain import prepare as prepare_copies
from hubmap_kit.jobs.restain import restain
from hubmap_kit.sample.generate import generate

COLON = "colon"  # folder in OUT: the HPA slides of hubmap-mini and embedded ones
COPIES = "glas-restained"  # folder in OUT: glas, and each slide in PAS and in other H&E, by drawn references
HELD_OUT = (
    "14406"  # the embedded colon slide that chooses the epoch and the threshold there; all others are learnt from
)


@dataclass(frozen=True)
class Paths:
    """The folder with real tissue, and the one for runs."""

    data: Path
    out: Path


@dataclass(frozen=True)
class Trial:
    """One training.

    `data` is a folder of real tissue, COLON or COPIES; `judged` a folder to be judged on, "shift" for the battery,
    "test" for pictures of the folder's test slides, "" for held-out slides.
    """

    name: str
    title: str
    config: str
    words: tuple[str, ...]
    data: str = "glas"
    fold: int = 0
    judged: str = "shift"
    trained: bool = False  # by another study already
    copy_of: str = ""  # a trained run that is copied, and judged with `words`

    @property
    def key(self) -> str:
        """What it is called among all trials."""
        return f"{self.name}-on-{self.judged}" if self.trained else self.name

    def commands(self, paths: Paths) -> list[list[str]]:
        """The command lines: training, then judging."""
        if self.copy_of:
            return [[*self._judge(paths), *_set(*self.words)]]
        train, judge = self._train(paths), self._judge(paths)
        return [judge] if self.trained else [train, judge]

    def _train(self, paths: Paths) -> list[str]:
        run, folder = str(paths.out / self.name), paths.out if self.data in (COLON, COPIES) else paths.data
        weights = f"model.encoder_weights={paths.data / 'weights' / 'mobilenet_v2_imagenet.pth'}"
        start = [] if any(word.startswith("model.encoder_weights") for word in self.words) else [weights]
        train = [
            "train",
            "--out",
            run,
            "--config",
            self.config,
            "--data",
            str(folder / self.data),
            "--folds",
            str(self.fold),
            "--device",
            "cpu",
            "--stores",
            str(paths.out / "stores"),
            *_set(f"name={self.name}", *start, *self.words),
        ]
        if self.data == COLON:
            train += _set(f"data.folds_csv={paths.out / COLON / 'all-but-one.csv'}")
        return train

    def _judge(self, paths: Paths) -> list[str]:
        run = str(paths.out / self.name)
        if self.judged == "shift":
            return [
                "evaluate",
                run,
                "--shift",
                "hubmap",
                "--references",
                str(paths.data / "stain-references"),
                "--device",
                "cpu",
            ]
        if self.judged == "test":
            test = str(paths.data / self.data / "test.csv")
            return [
                "predict",
                run,
                "--test",
                test,
                "--out",
                f"{run}/submission.csv",
                "--overlays",
                f"{run}/pictures",
                "--device",
                "cpu",
            ]
        if not self.judged:
            return ["evaluate", run, "--device", "cpu", "--stores", str(paths.out / "stores")]
        return ["evaluate", run, "--on", str(paths.data / self.judged), "--organs", "largeintestine", "--device", "cpu"]

    def result(self, paths: Paths) -> Path:
        """The table with a row for each slide that it was judged on."""
        run = paths.out / self.name
        return run / {"shift": "shift.csv", "": "oof.csv", "test": "submission.csv"}.get(
            self.judged, f"elsewhere/{self.judged}.csv"
        )

    def is_done(self, paths: Paths) -> bool:
        """Whether it was trained and judged to the end."""
        return self.result(paths).is_file()

    def minutes(self, paths: Paths) -> float:
        """CPU minutes of its training, validation included; not a number where it was trained otherwise."""
        path = paths.out / f"{self.name}.minutes"
        return float(path.read_text(encoding="utf-8")) if path.is_file() else float("nan")


def _set(*words: str) -> list[str]:
    return [part for word in words for part in ("--set", word)]


# A small decoder and tiles of 192 px: an epoch of 160 tiles in a quarter of a minute.
SMALL = (
    "model.encoder=mobilenet_v2",
    "model.options.decoder_channels=[128,64,32,24,16]",
    "tiles.size=192",
    "inference.window=256",
    "training.batch_size=8",
    "training.samples_per_epoch=160",
    "training.ema_decay=0.97",
    "training.workers=0",
    "inference.views=none",
    "training.epochs=10",
    "training.validate_every=5",
)
# What the slides of glas are at half their size. A policy that divides pixels knows nothing of micrometres.
PHYSICAL = ("scale.policy=physical", "scale.um_per_px=1.24")
HALF = ("scale.reduce=2",)


def ingredients(paths: Paths) -> list[Trial]:
    """One change at a time, on one fold of glas."""
    rows: Mapping[str, tuple[str, str, Sequence[str]]] = {
        "baseline": ("baseline", "baseline", HALF),
        "physical": ("baseline, one physical scale", "baseline", PHYSICAL),
        "zoom": ("... and random scale 0.5-2", "baseline", (*PHYSICAL, "augment.zoom=[0.5,2]")),
        "stain": ("... and mixed stains (drawn references)", "baseline", (*PHYSICAL, "augment.stain=mixed")),
        "colour": ("... and pipeline colour", "baseline", (*PHYSICAL, "augment.pipeline=colour")),
        "strong": ("... and pipeline strong", "baseline", (*PHYSICAL, "augment.pipeline=strong")),
        "robust": ("robust", "robust", PHYSICAL[1:]),
        "robust-wide": ("robust with random scale 0.5-2", "robust", (*PHYSICAL[1:], "augment.zoom=[0.5,2]")),
        "robust-strong": (
            "robust with pipeline strong, which has its own random scale",
            "robust",
            (*PHYSICAL[1:], "augment.pipeline=strong", "augment.zoom=[1,1]"),
        ),
        "robust-first-team": (
            "robust with pipeline first-team",
            "robust",
            (*PHYSICAL[1:], "augment.pipeline=first-team"),
        ),
    }
    trials = [
        Trial(
            name if name not in ("baseline", "robust") else f"{name}-0",
            title,
            config,
            (*SMALL, *words, "training.seed=0"),
        )
        for name, (title, config, words) in rows.items()
    ]
    trials.append(
        Trial(
            "copies",
            "... and two restained copies of each slide",
            "baseline",
            (*SMALL, *PHYSICAL, "training.seed=0"),
            COPIES,
        )
    )
    for name, title in {"physical": "baseline, one physical scale", "robust-0": "robust"}.items():
        for method in ("reinhard", "macenko"):
            words = (f"inference.normalise=[{method}]",)
            trials.append(
                Trial(f"{name}-{method}", f"{title}, normalised at test time by {method}", "", words, copy_of=name)
            )
    return trials


def seeds(paths: Paths) -> list[Trial]:
    """Baseline and robust three times: another seed and another fold of glas each time."""
    pair = {"baseline": HALF, "robust": PHYSICAL[1:]}
    return [
        Trial(f"{name}-{seed}", name, name, (*SMALL, *words, f"training.seed={seed}"), fold=seed)
        for seed in range(3)
        for name, words in pair.items()
    ]


def crossing(paths: Paths) -> list[Trial]:
    """From HPA's colon to glas, and from glas (the runs of `seeds`) to HPA's colon."""
    pair = {"baseline": HALF, "robust": PHYSICAL[1:]}
    trials = []
    for seed in range(3):
        for name, words in pair.items():
            common = (*SMALL, *words, f"training.seed={seed}")
            trials.append(
                Trial(
                    f"colon-glas-{name}-{seed}",
                    f"HPA colon to glas: {name}",
                    name,
                    (*common, "data.organs=[largeintestine]"),
                    COLON,
                    0,
                    "glas",
                )
            )
            trials.append(
                Trial(
                    f"{name}-{seed}",
                    f"glas to HPA colon: {name}",
                    name,
                    common,
                    "glas",
                    seed,
                    "hubmap-mini",
                    trained=True,
                )
            )
    return sorted(trials, key=lambda trial: trial.title)


SHORT = ("training.epochs=8", "training.lr=0.0016", "training.workers=0", "inference.views=none")
TILES = ("tiles.size=192", "training.samples_per_epoch=284")  # as many pixels as 160 tiles of 256 px
NARROW = (*TILES, "model.options.decoder_channels=[128,64,32,24,16]")
COLOURS = ("augment.pipeline=colour", "augment.zoom=[0.7,1.4]", "augment.stain=mixed")


def best(paths: Paths) -> list[Trial]:
    """What helps on glas itself, one change at a time, judged at full resolution."""
    rows: Mapping[str, tuple[str, Sequence[str]]] = {
        "start": ("glas, 8 epochs", ()),
        "random": ("random weights instead of ImageNet's", ("model.encoder_weights=",)),
        "low-lr": ("learning rate 3e-6 instead of what 'hubmap lr-find' told, 1.6e-3", ("training.lr=3e-6",)),
        "fpn": ("FPN instead of U-Net", ("model.arch=fpn",)),
        "deeplab": ("DeepLabv3+ instead of U-Net", ("model.arch=deeplabv3plus",)),
        "full": ("the slides at full size instead of half", ("scale.reduce=1",)),
        "small-tiles": ("tiles of 192 px, 284 of them, instead of 160 of 256 px", TILES),
        "narrow": ("these tiles, and a decoder of half the width", NARROW),
        "colours": ("robust's stains, colours and zoom", COLOURS),
    }
    trials = [
        Trial(f"best-{name}", title, "glas", (*SHORT, *words), judged="") for name, (title, words) in rows.items()
    ]
    views = Trial("best-views", "eight views", "", ("inference.views=d4",), judged="", copy_of="best-start")
    return [*trials, views]


def folds(paths: Paths) -> list[Trial]:
    """The longest training of five folds that an hour of a CPU holds."""
    words = (*SHORT, *NARROW, "training.epochs=20", "training.validate_every=10", "inference.views=d4")
    return [
        Trial(
            f"fold-{fold}", f"20 epochs, fold {fold}", "glas", (*words, f"training.seed={fold}"), fold=fold, judged=""
        )
        for fold in range(5)
    ]


def spleen(paths: Paths) -> list[Trial]:
    """The test slide 10078 under every recipe, learnt from the 26 small HPA slides: pictures to look at, no truth."""
    rows = {
        "baseline": ("baseline", ()),
        "robust": ("robust", ()),
        "winner-like": (
            "winner-like",
            (
                "model.arch=unet",
                "scale.fit=640",
                "model.mean=[0.5,0.5,0.5]",
                "model.std=[0.5,0.5,0.5]",
                "training.iterations=0",
                "training.lr=1e-3",
                "training.ema_decay=0.97",
            ),
        ),
    }
    return [
        Trial(f"spleen-{name}", name, config, (*SMALL, *words, "training.epochs=15"), "hubmap-mini", 0, "test")
        for name, (config, words) in rows.items()
    ]


STUDIES: Mapping[str, Callable[[Paths], list[Trial]]] = {
    "ingredients": ingredients,
    "seeds": seeds,
    "crossing": crossing,
    "best": best,
    "folds": folds,
    "spleen": spleen,
}


def prepare(trial: Trial, paths: Paths) -> None:
    """Make the folder of HPA and embedded colon slides where a trial needs it."""
    if trial.copy_of:
        shutil.copytree(paths.out / trial.copy_of, paths.out / trial.name, ignore=shutil.ignore_patterns("shift*"))
    if trial.data == COPIES and not (paths.out / COPIES / "train.csv").is_file():
        restain(prepare_copies(paths.data / "glas", paths.out / "restained", looks="pas,he"))
        merge([paths.data / "glas", paths.out / "restained"], paths.out / COPIES, False, None, None)
    folder = paths.out / COLON
    if trial.data != COLON or (folder / "all-but-one.csv").is_file():
        return
    sample = paths.out / "sample"
    if not (sample / "train.csv").is_file():
        generate(sample)
    merge([paths.data / "hubmap-mini", sample], folder, False, None, None)
    with (folder / "all-but-one.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(("id", "fold"))
        rows.writerows((slide.id, int(slide.id != HELD_OUT)) for slide in read_train(folder / "train.csv"))
