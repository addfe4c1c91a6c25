"""How long an epoch takes: from the timing of earlier runs where they were like the planned one, else from stated
assumptions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from hubmap_kit import experiment
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import Experiment
from hubmap_kit.errors import PublishError, TableError
from hubmap_kit.tiles.scaling import scaled_shape

SLIDES = 351  # of the competition's train.csv
SLIDE_SIDE, SLIDE_UM = 3000, 0.4  # pixels and micrometres per pixel of nearly all of them
# Tiles of 512 x 512 that one device trains on in a second; nothing of this was measured on Kaggle. A U-Net with a
# b1-class encoder is computed to reach about 85 on a T4 in fp16 and 45 on a P100 by their memory and arithmetic; half
# of it is taken. CPU: seen on two cores with small networks. Other networks and tiles: as many times slower as they
# have multiply-adds, or bytes to keep for the backward pass, whichever is more.
UNIT = "unet-b1"  # of the catalog
TILES_PER_SECOND = {"t4x2": 42.0, "p100": 22.0, "cpu": 1.5}
FORWARD = 1 / 3  # cost of a prediction beside that of a training step
VIEWS = {"none": 1, "flips": 4, "d4": 8}
START_H = 0.1  # start-up, installation, closing
STORE_S = 1.0  # to bring one slide into the tile store, where no finished store is attached


@dataclass(frozen=True)
class Speed:
    """Seconds of an epoch, of a fold's out-of-fold prediction and of a session's start, and the lines that say where
    they come from.
    """

    epoch_s: float
    last_s: float
    overhead_s: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Timing:
    """What a run measured: seconds of an epoch, tiles a second in its training part, epochs behind it, its settings and
    machine.
    """

    run: Path
    epoch_s: float
    tiles_per_s: float
    epochs: int
    settings: Experiment
    machine: str
    peak_gib: float


def estimate(
    settings: Experiment, accelerator: str, runs: Sequence[Path] = (), slides: int = SLIDES, stored: bool = False
) -> Speed:
    """The speed of an experiment on an accelerator profile (t4x2, p100, cpu).

    `runs` are run folders with fold<k>/timing.csv; one that was measured on another machine, network or tile size is
    not used, and a note says so. `slides` is the number of training slides, `stored` says that a finished tile store is
    attached. Raises PublishError for a run folder without a timing, TableError for a damaged one.
    """
    notes: list[str] = []
    tiles = _tiles(settings, slides)
    held_out, drawn = tiles / settings.data.n_folds, _drawn(settings, slides)
    found = [timing for run in runs if (timing := _usable(_read(run), settings, accelerator, notes)) is not None]
    if found:
        rate, epoch_s = (
            median(timing.tiles_per_s for timing in found),
            median(_scaled(timing, settings, slides, notes) for timing in found),
        )
    else:
        slower, why = _slower(settings)
        rate = TILES_PER_SECOND[accelerator] / slower
        epoch_s = drawn / rate + held_out * FORWARD / rate / settings.training.validate_every
        notes.append(
            f"ASSUMPTION: {rate:.3g} tiles of {settings.tiles.size} px a second on one device of {accelerator},"
            f" computed and not measured: {TILES_PER_SECOND[accelerator]:g} of 512 px for a U-Net of b1 class, and"
            f" {slower:.3g} times its {why} here"
        )
        notes.append(
            f"ASSUMPTION: {drawn:.0f} tiles an epoch, {held_out:.0f} held out, of {slides} slides of {SLIDE_SIDE} px"
            f" ({SLIDE_UM} um)"
        )
    views = VIEWS[settings.inference.views]
    last_s = held_out * views * FORWARD / rate / (1 - settings.inference.overlap) ** 2
    overhead_s = START_H * 3600 + (0 if stored else slides * STORE_S)
    notes.append(
        f"ASSUMPTION: out-of-fold prediction takes {last_s / 60:.0f} min a fold ({views} views, a prediction costs a"
        " third of a step)"
    )
    store = "a finished tile store is attached" if stored else f"{STORE_S:g} s a slide for the tile store"
    notes.append(f"ASSUMPTION: {overhead_s / 60:.0f} min a session to start and to close, {store}")
    return Speed(epoch_s, last_s, overhead_s, tuple(dict.fromkeys(notes)))


def _tiles(settings: Experiment, slides: int) -> float:
    """Grid tiles of all slides at the experiment's scale; organs are about equally frequent."""
    step = settings.tiles.size * (1 - settings.tiles.overlap)
    sides = [scaled_shape(SLIDE_SIDE, SLIDE_SIDE, SLIDE_UM, settings.scale, organ)[0] for organ in ORGANS]
    return slides * fmean((max(0, math.ceil((side - settings.tiles.size) / step)) + 1) ** 2 for side in sides)


def _slower(settings: Experiment) -> tuple[float, str]:
    """How many times longer a tile takes than one of 512 px takes UNIT, and by what."""
    from hubmap_kit.models.catalog import MIB, costs
    from hubmap_kit.training.memory import size_of

    unit, size = costs()[UNIT], size_of(settings)
    work, traffic = size.multiply_adds / unit.multiply_adds, size.saved_fp16.total / MIB / unit.saved_fp16_mib
    return max((work, "multiply-adds"), (traffic, "bytes to keep"))


def _drawn(settings: Experiment, slides: int) -> float:
    """Tiles that an epoch trains on."""
    training = settings.training
    if training.iterations:
        return math.ceil(training.iterations / training.epochs) * training.accumulate * training.batch_size
    if settings.training.samples_per_epoch and settings.training.sampler == "random":
        return settings.training.samples_per_epoch
    return _tiles(settings, slides) * (1 - 1 / settings.data.n_folds)


def _read(run: Path) -> _Timing:
    paths = sorted(run.glob("fold*/timing.csv"))
    if not paths:
        raise PublishError(
            f"{run} holds no fold<k>/timing.csv, so it says nothing about the speed; give a run folder in which an"
            " epoch was trained"
        )
    seconds, rates, peaks = [], [], [0.0]
    for path in paths:
        table = list(read_rows(path, ("fold", "epoch", "seconds", "tiles_per_second")))
        rows = [_numbers(path, line, row) for line, row in table]
        peaks += [_peak(row) for _, row in table]
        steady = rows[1:] or rows  # the first epoch warms caches up
        seconds += [second for second, _ in steady]
        rates += [rate for _, rate in steady]
    if not seconds:
        raise PublishError(
            f"{paths[0]} has no rows, so it says nothing about the speed; give a run folder in which an epoch was"
            " trained"
        )
    settings, machine = experiment.read(run / "config.yaml"), _machine(run / "environment.json")
    return _Timing(run, median(seconds), median(rates), len(seconds), settings, machine, max(peaks))


def _peak(row: Mapping[str, str]) -> float:
    """Gibibytes that an epoch took of its card at most; 0 where the table does not say."""
    try:
        return float(row.get("peak_memory_gib") or 0)
    except ValueError:
        return 0.0


def _numbers(path: Path, line: int, row: dict[str, str]) -> tuple[float, float]:
    try:
        found = float(row["seconds"]), float(row["tiles_per_second"])
    except ValueError as error:
        raise TableError(
            f"{path}, line {line}: {error}; expected seconds and tiles per second, take the file from the original run"
        ) from error
    if not all(math.isfinite(value) and value > 0 for value in found):
        raise TableError(
            f"{path}, line {line} has {found[0]:g} seconds and {found[1]:g} tiles a second; expected numbers above 0"
        )
    return found


def _machine(path: Path) -> str:
    """The accelerator of a run's latest session as environment.json tells it, such as 'Tesla T4' or 'cpu'."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        facts = (values[0] if isinstance(values, list) else values)["accelerator"]
        return str(facts.get("name") or facts["type"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise PublishError(
            f"{path} does not say what the run was trained on ({error!r}); take it from the original run folder"
        ) from error


def _usable(timing: _Timing, settings: Experiment, accelerator: str, notes: list[str]) -> _Timing | None:
    """The timing, where it was measured under what is planned; a note in any case."""
    word = {"t4x2": "T4", "p100": "P100", "cpu": "cpu"}[accelerator]
    pairs = [
        (
            "network",
            f"{timing.settings.model.arch}/{timing.settings.model.encoder}",
            f"{settings.model.arch}/{settings.model.encoder}",
        ),
        ("tile size", f"{timing.settings.tiles.size}", f"{settings.tiles.size}"),
        ("validate_every", f"{timing.settings.training.validate_every}", f"{settings.training.validate_every}"),
    ]
    different = [f"{what} {was}, planned {new}" for what, was, new in pairs if was != new]
    if word not in timing.machine.replace("-", " ").split():
        different.insert(0, f"machine {timing.machine}, planned {accelerator}")
    if different:
        notes.append(f"NOT USED: the timing of {timing.run} ({'; '.join(different)})")
        return None
    speed = f"{timing.epoch_s:.1f} s an epoch, {timing.tiles_per_s:.1f} tiles/s"
    notes.append(f"MEASURED: {speed} in {timing.epochs} epochs of {timing.run} on {timing.machine}")
    if timing.peak_gib > 0:
        notes.append(
            f"MEASURED: {timing.peak_gib:.1f} GiB of its memory at most, with training.batch_size"
            f" {timing.settings.training.batch_size}"
        )
    return timing


def _scaled(timing: _Timing, settings: Experiment, slides: int, notes: list[str]) -> float:
    """The measured seconds of an epoch, with as many tiles more or fewer as the plan draws; validation stays what it
    was.
    """
    was, planned = _drawn(timing.settings, slides), _drawn(settings, slides)
    if was == planned:
        return timing.epoch_s
    notes.append(
        f"ASSUMPTION: {planned:.0f} tiles an epoch instead of {was:.0f} change only its training part, at the measured"
        " rate"
    )
    return max(timing.epoch_s + (planned - was) / timing.tiles_per_s, planned / timing.tiles_per_s)
