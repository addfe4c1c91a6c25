"""The train job: slides -> run folder. A verb and a Kaggle kernel call the same function."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch

from hubmap_kit import experiment
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError
from hubmap_kit.files import write_json, write_yaml
from hubmap_kit.inference.ensemble import MODEL_FILE, Ensemble, fold_folders, load_fold, read_thresholds, run_settings
from hubmap_kit.inference.postprocess import threshold_for, to_mask
from hubmap_kit.jobs.preflight import check_experiment, describe
from hubmap_kit.jobs.side_by_side import train_side_by_side
from hubmap_kit.models.device import choose_device, choose_devices
from hubmap_kit.processes import sigterm_noticed
from hubmap_kit.report.curves import save_curves, save_threshold_curves
from hubmap_kit.report.overlays import save_overlay
from hubmap_kit.tiles.store import decode_for
from hubmap_kit.training import checkpoint, oof
from hubmap_kit.training.clock import Clock, OutOfTime, Stoppable
from hubmap_kit.training.counts import THRESHOLDS
from hubmap_kit.training.fold import OnEpoch
from hubmap_kit.training.history import Row
from hubmap_kit.training.memory import with_largest_batch
from hubmap_kit.training.run import Plan, collect_done, evaluate_folds, plan, remaining, train_fold
from hubmap_kit.training.world import is_one_of_many, joined, own_device

log = logging.getLogger(__name__)
DRAW_EVERY_S = 30.0


def train(
    settings: Experiment,
    out: Path,
    folds: Sequence[int] | None = None,
    resume: bool = False,
    device: str = "auto",
    stores: Path | None = None,
    clock: Clock | None = None,
    degrade: bool = False,
    on_epoch: OnEpoch | None = None,
) -> pd.DataFrame:
    """Train into the run folder `out` and return its out-of-fold table.

    Started by torchrun, all processes train each fold together (see training.world); the first one writes. `on_epoch`
    is called after each epoch, in the process that writes.

    The resolved config and the environment are in `out` before the first step. Tile stores go to `stores` (default: a
    folder `stores` beside `out`, shared by all runs there). With several devices (cuda:0,cuda:1) each trains a fold of
    its own. Raises CheckpointError when `out` already holds a run and `resume` is off, and OutOfTime when the clock or
    a SIGTERM stopped the training. Whatever ends it early, every finished epoch is saved, and the tables of the folds
    that are done are written.

    A damaged last.ckpt is an error. With `degrade` its fold goes on from its best weights, or begins anew, with a
    warning.
    """
    devices = choose_devices(own_device(device) if is_one_of_many() else device)
    slides = read_train(train_csv(settings))
    check_experiment(settings, devices[0], pretrained=not resume)
    with joined(devices[0]) as world:
        if world.first:
            _open_run(out, settings, resume)
            _write_environment(out, devices[0])
        world.wait()
        planned = plan(settings, slides, out, stores or out.parent / "stores", folds, degrade, world)
        _train_to_the_end(planned, devices, clock, on_epoch)
        table = oof.collect(out, slides, planned.folds) if world.first else pd.DataFrame()
    if world.first:
        _draw(_report, out, settings, slides)
    return table


def auto_batched(settings: Experiment, out: Path, device: str) -> Experiment:
    """The experiment with the largest batch that fits the (first) device; a run that has begun keeps its own."""
    if any(out.glob("fold*/last.ckpt")):
        kept = experiment.read(out / "config.yaml").training
        log.info("%s has begun with training.batch_size %d and keeps it", out, kept.batch_size)
        update = {"batch_size": kept.batch_size, "accumulate": kept.accumulate}
        return settings.model_copy(update={"training": settings.training.model_copy(update=update)})
    if is_one_of_many():
        raise ConfigError(
            "--auto-batch measures one card, but torchrun shares training.batch_size among all of them; set it by hand,"
            " or leave --auto-batch out"
        )
    return with_largest_batch(settings, choose_devices(device)[0])


def _train_to_the_end(
    planned: Plan, devices: Sequence[torch.device], clock: Clock | None, on_epoch: OnEpoch | None
) -> None:
    """Train all planned folds; whatever ends that early, the tables of what is done are written."""
    out = planned.run
    with sigterm_noticed() as told:
        try:
            _train_planned(planned, devices, _Curves(out, planned.settings, on_epoch), Stoppable(clock, told))
        except OutOfTime as stop:
            _write_tables(planned, pictures=not told())  # a batch system kills some ten seconds after its SIGTERM
            others = [phrase for number, phrase in remaining(planned).items() if f"fold {number} " not in stop.where]
            same = (
                f"'hubmap train --out {out} --resume'"
                if planned.world.size == 1
                else "the same torchrun command and --resume"
            )
            advice = f"everything so far is in {out}, go on with {same}"
            raise OutOfTime(
                "; ".join([stop.where, *others]), advice, "SIGTERM came" if told() else stop.cause
            ) from stop
        except HubmapError:
            _write_tables(planned)
            raise


def _write_tables(planned: Plan, pictures: bool = True) -> None:
    """The tables and pictures of what is done, when a training ends early; no fault here may hide why it did."""
    if not planned.world.first:
        return
    try:
        done = collect_done(planned) is not None
    except Exception as error:
        log.warning("the tables of the finished folds cannot be written: %s", error)
        done = False
    if pictures:
        _draw(_report if done else _save_curves, planned.run, planned.settings, planned.slides)


def _draw(
    draw: Callable[[Path, Experiment, Sequence[Slide]], None], out: Path, settings: Experiment, slides: Sequence[Slide]
) -> None:
    """Draw pictures of a training, which are not worth losing it: a failure is a warning."""
    try:
        draw(out, settings, slides)
    except Exception as error:
        log.warning(
            "%s: its curves cannot be drawn (%s: %s); the training is not touched by that",
            out,
            type(error).__name__,
            error,
        )


def _train_planned(planned: Plan, devices: Sequence[torch.device], draw: OnEpoch, clock: Clock | None) -> None:
    left = list(remaining(planned))
    if len(devices) > 1 and len(left) > 1:
        train_side_by_side(planned, left, devices, draw, clock)
        return
    for number in planned.numbers:
        train_fold(planned, number, devices[0], draw, clock)


def evaluate(
    run: Path,
    data: str = "",
    overrides: Sequence[str] = (),
    device: str = "auto",
    stores: Path | None = None,
    pictures: bool = True,
) -> pd.DataFrame:
    """Predict a finished run's held-out slides again, fit its thresholds anew, and draw one overlay per organ.

    `data` is the folder with train.csv where it has moved since. `overrides` are `inference.key=value` settings; they
    become the run's own, because its thresholds are only right for them.
    """
    if any(override.startswith("inference.threshold") for override in overrides):
        raise ConfigError(
            "thresholds are what evaluate fits; give --set inference.thresholds to 'hubmap predict' instead"
        )
    settings = run_settings(run, overrides, data)
    slides = read_train(train_csv(settings))
    chosen = choose_device(device)
    table = evaluate_folds(settings, slides, run, stores or run.parent / "stores", chosen)
    write_yaml(run / "config.yaml", experiment.dump(settings))
    _report(run, settings, slides)
    if pictures:
        draw_overlays(run, settings, slides, table, chosen)
    return table


def draw_overlays(
    run: Path, settings: Experiment, slides: Sequence[Slide], table: pd.DataFrame, device: torch.device
) -> list[Path]:
    """Draw, for each organ, the held-out slide with the median Dice: `overlays/<organ>.png`. Returns the paths."""
    by_id = {slide.id: slide for slide in slides}
    folders = fold_folders(run)
    paths = []
    for organ, rows in table.groupby("organ"):
        row = rows.sort_values("dice").iloc[len(rows) // 2]
        slide = by_id[row["id"]]
        ensemble = load_fold(settings, folders[int(row["fold"])], device, {organ: row["threshold"]})
        paths.append(_overlay(run / "overlays" / f"{organ}.png", slide, ensemble, float(row["dice"])))
    return paths


def _overlay(path: Path, slide: Slide, ensemble: Ensemble, dice: float) -> Path:
    pixels = slide_files.read(slide.path)
    plane = ensemble.probability(pixels, slide.um_per_px, organ=slide.organ, source=slide.source)
    config = ensemble.experiment.inference
    mask = to_mask(plane, threshold_for(slide.organ, slide.source, ensemble.thresholds, config), slide.organ, config)
    save_overlay(
        path,
        pixels,
        decode_for(slide, *pixels.shape[:2]),
        mask,
        f"{slide.organ} {slide.id} ({slide.source}), held out, Dice {dice:.3f}",
    )
    return path


def train_csv(settings: Experiment) -> Path:
    """The table of the training slides, plain or packed; raises ConfigError without a data folder."""
    if not settings.data.folder:
        raise ConfigError("data.folder is empty; give the folder that holds train.csv and train_images/ with --data")
    folder = Path(settings.data.folder)
    packed = folder / "train.csv.gz"
    return packed if packed.is_file() and not (folder / "train.csv").is_file() else folder / "train.csv"


def _open_run(out: Path, settings: Experiment, resume: bool) -> None:
    """Write config.yaml into a new run folder, or make sure that the run that is there is the same experiment.

    A run where no epoch was ever finished holds nothing to lose and may be started again; any other folder with files
    in it, even one with a config.yaml of somebody's own, is refused.
    """
    kept, new = out / "config.yaml", experiment.dump(settings)
    begun = [*out.glob("fold*/last.ckpt"), *out.glob(f"fold*/{MODEL_FILE}")]
    if begun and not resume:
        raise CheckpointError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    if begun:
        checkpoint.check_same(experiment.dump(experiment.read(kept)), new, kept)
    elif out.is_dir() and any(out.iterdir()) and not (kept.is_file() and (out / "environment.json").is_file()):
        raise CheckpointError(f"{out} is not empty and holds no run; choose a new folder for --out")
    else:
        (out / "folds.csv").unlink(missing_ok=True)
    write_yaml(kept, new)


def _write_environment(out: Path, device: torch.device) -> None:
    """Keep what every session of the run ran on, the latest first."""
    path = out / "environment.json"
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        earlier = []
    write_json(path, [describe(device), *(earlier if isinstance(earlier, list) else [])])


class _Curves:
    """Draws a run's curves after an epoch, but not again within DRAW_EVERY_S: a picture takes a second or two.

    Then it calls `then`.
    """

    def __init__(self, out: Path, settings: Experiment, then: OnEpoch | None = None) -> None:
        self.out, self.settings, self.then, self._last = out, settings, then, -math.inf

    def __call__(self, fold: int, row: Row) -> None:
        if time.monotonic() - self._last >= DRAW_EVERY_S:
            _draw(_save_curves, self.out, self.settings, ())
            self._last = time.monotonic()
        if self.then is not None:
            self.then(fold, row)


def _save_curves(out: Path, settings: Experiment, _slides: Sequence[Slide] = ()) -> None:
    metrics = oof.read_metrics(out)
    if len(metrics):
        save_curves(out / "curves.png", metrics, settings.name)


def _report(out: Path, settings: Experiment, slides: Sequence[Slide]) -> None:
    _save_curves(out, settings)
    curves = oof.organ_curves(out, slides)
    save_threshold_curves(out / "thresholds.png", THRESHOLDS, curves, read_thresholds(out))
