"""Trained folds as one predictor: all networks and all views inside the window, one stitch."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.augment.stain import Reference
from hubmap_kit.competition.organs import FACTS
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import Experiment, InferenceConfig
from hubmap_kit.errors import CheckpointError, ConfigError
from hubmap_kit.inference.normalise import is_normalised, references_of, restained
from hubmap_kit.inference.on_device import Limits, MeanProbability, MemoryShort, Stopwatch, scale_on_device, to_device
from hubmap_kit.inference.postprocess import read_fitted, with_fitted
from hubmap_kit.inference.views import tour
from hubmap_kit.inference.windows import plan, sample, stitch, tissue_map, whole_plane, windows_with_tissue
from hubmap_kit.models.build import build
from hubmap_kit.models.device import autocast_dtype
from hubmap_kit.models.fastest import Tuner
from hubmap_kit.tiles.scaling import finest_um, reduced_shape, resize_image, resize_plane, scaled_shape

# How much is spent on a slide: what a deadline may take away, and nothing that it may not.

VIEW_COUNTS = {"none": 1, "flips": 4, "d4": 8}
FEWER_VIEWS = {"d4": "flips", "flips": "none"}
OVERLAPS = (0.5, 0.25, 0.125, 0.0)  # where a step down may lead
MAX_REDUCE = 4


@dataclass(frozen=True)
class Effort:
    """How one slide is predicted: least `overlap` of windows, `views` by name, number of `folds`, how many times
    coarser than the network's own scale (`reduce`, 1: not at all), and the methods by which it is predicted once more
    with other stains (`normalise`; slides of HPA are not).
    """

    overlap: float
    views: str
    folds: int
    reduce: int = 1
    normalise: tuple[str, ...] = ()

    def __str__(self) -> str:
        reduced = f", reduced {self.reduce}x" if self.reduce > 1 else ""
        stains = f", normalised by {' and '.join(self.normalise)}" if self.normalise else ""
        return f"overlap {self.overlap:g}, {VIEW_COUNTS[self.views]} views, {self.folds} folds{reduced}{stains}"


def full_effort(config: InferenceConfig, folds: int) -> Effort:
    """What the config asks for, with the `folds` networks that there are."""
    return Effort(config.overlap, config.views, folds, normalise=tuple(dict.fromkeys(config.normalise)))


def ladder(config: InferenceConfig, folds: int) -> list[Effort]:
    """All efforts from the config's own down to the cheapest, each giving up one thing more, in the order of
    `inference.ladder`.
    """
    steps = [full_effort(config, folds)]
    for name in config.ladder:
        while (lower := _lower(steps[-1], name)) is not None:
            steps.append(lower)
    return steps


def _lower(effort: Effort, name: str) -> Effort | None:
    if name == "normalise":
        return replace(effort, normalise=effort.normalise[:-1]) if effort.normalise else None
    if name == "overlap":
        below = next((overlap for overlap in OVERLAPS if overlap < effort.overlap), None)
        return None if below is None else replace(effort, overlap=below)
    if name == "views":
        return replace(effort, views=FEWER_VIEWS[effort.views]) if effort.views in FEWER_VIEWS else None
    if name == "folds":
        return replace(effort, folds=effort.folds // 2) if effort.folds > 1 else None
    return replace(effort, reduce=effort.reduce * 2) if effort.reduce < MAX_REDUCE else None


def team_ladder(ladders: Sequence[Sequence[Effort]]) -> list[tuple[Effort, ...]]:
    """The ladders of several runs that predict together as one: all step down at once, each no further than its own
    last step.
    """
    return [tuple(each[min(step, len(each) - 1)] for each in ladders) for step in range(max(map(len, ladders)))]


def windows_along(length: int, size: int, overlap: float) -> int:
    """How many windows of `size` an axis of `length` pixels takes, as `windows.plan_axis` places them."""
    return math.ceil(max(0, length - size) / max(1, math.floor(size * (1 - overlap)))) + 1


def network_passes(slide: Slide, settings: Experiment, effort: Effort) -> float:
    """What a slide costs the device: window-sized passes of one network with one view.

    Windows of glass and views with other stains count, though they may be skipped. The table's size is believed; a file
    that differs is measured all the same.
    """
    config = settings.inference
    height, width = reduced_shape(
        scaled_shape(slide.height, slide.width, slide.um_per_px, settings.scale, slide.organ), effort.reduce
    )
    if max(height, width) <= config.whole_slide:
        windows = height * width / config.window**2
    else:
        windows = windows_along(height, config.window, effort.overlap) * windows_along(
            width, config.window, effort.overlap
        )
    stains = 1 + len(effort.normalise) if is_normalised(slide.source) else 1
    return windows * VIEW_COUNTS[effort.views] * effort.folds * stains


log = logging.getLogger(__name__)
MODEL_FILE = "model.safetensors"
SPEED_FILE = "speed.json"
COUNTS_FILE = "oof_counts.parquet"  # written beside the weights when a fold is done


@dataclass(frozen=True)
class Ensemble:
    """The folds of one run, on one device.

    `experiment` is the run's own, `thresholds` its fitted ones by organ, `references` the colours of its training
    slides by organ, where inference.normalise wants them.

    What it learns on the way, for the slides that follow: how many windows fit into memory, how much time went into the
    networks, and, with a `tuner`, in which form the networks are fastest; one that scores a training has none.
    """

    experiment: Experiment
    networks: list[nn.Module]
    thresholds: dict[str, float]
    device: torch.device
    tuner: Tuner | None = None
    references: Mapping[str, Reference] = field(default_factory=dict)
    limits: Limits = field(init=False)
    stopwatch: Stopwatch = field(init=False, default_factory=Stopwatch)

    def __post_init__(self) -> None:
        object.__setattr__(self, "limits", Limits.at_first(self.experiment.inference, self.device))

    @property
    def full_effort(self) -> Effort:
        """What the config asks for, with all networks."""
        return full_effort(self.experiment.inference, len(self.networks))

    @property
    def seconds_in_network(self) -> float:
        """Seconds of all slides so far in the networks' forward passes; on a GPU, in everything from the slide's bytes
        to its plane.
        """
        return self.stopwatch.seconds

    def plane(self, image: np.ndarray, effort: Effort | None = None, organ: str = "", source: str = "") -> np.ndarray:
        """Probability plane (h, w) float32 of a slide (h, w, 3) uint8 that is already at the network's scale.

        Networks that know organs apart read the channel of `organ`; where that is empty, any organ counts. A slide of
        another `source` than HPA is predicted with other stains too, where the effort says so and its organ has a
        reference.
        """
        effort = effort or self.full_effort
        shape = reduced_shape(image.shape[:2], effort.reduce)
        um_per_px = finest_um(self.experiment.scale, organ) * effort.reduce
        return resize_plane(self._predict(image, shape, um_per_px, effort, organ, source), image.shape[:2])

    def probability(
        self, slide: np.ndarray, um_per_px: float, effort: Effort | None = None, organ: str = "", source: str = ""
    ) -> np.ndarray:
        """Probability plane (H, W) float32 of an original slide (H, W, 3) uint8 whose pixels are `um_per_px`
        micrometres wide.
        """
        effort = effort or self.full_effort
        height, width = slide.shape[:2]
        scaled = scaled_shape(height, width, um_per_px, self.experiment.scale, organ)
        shape = reduced_shape(scaled, effort.reduce)
        return resize_plane(
            self._predict(slide, shape, um_per_px * slide.shape[0] / shape[0], effort, organ, source), slide.shape[:2]
        )

    def _predict(
        self, slide: np.ndarray, shape: tuple[int, int], um_per_px: float, effort: Effort, organ: str, source: str
    ) -> np.ndarray:
        """Plane of `shape` (h, w) of a slide (H, W, 3), scaled to that shape; `um_per_px` is the width of a pixel of
        the plane.
        """
        config, dtype = self.experiment.inference, self._dtype()
        keep = None
        if config.skip_background:
            keep = windows_with_tissue(
                tissue_map(slide, shape), *plan(*shape, config.window, effort.overlap), config.window, um_per_px
            )
        methods = effort.normalise if is_normalised(source) and organ in self.references else ()
        if methods:
            slide = resize_image(slide, shape)  # here, once for all views: stains are changed at the network's scale
        image = scale_on_device(slide, shape, self.device)
        if self.tuner is not None:
            self.tuner.settle(self.networks, sample(image, config.window), self.experiment.model, dtype)
        index = FACTS[organ].index if organ in FACTS else 0  # a faulty row of a table may name no organ at all
        plane, count = self._finite(image, effort, dtype, keep, index), 1
        for changed in restained(slide, self.references[organ], methods) if methods else ():
            plane += self._finite(to_device(changed, self.device), effort, dtype, keep, index)
            count += 1
        return plane if count == 1 else np.divide(plane, np.float32(count), out=plane)

    def _finite(
        self, image: torch.Tensor, effort: Effort, dtype: torch.dtype | None, keep: np.ndarray | None, organ: int
    ) -> np.ndarray:
        """The plane of one view of a slide, in float32 where half precision does not do."""
        plane = self._attempt(image, effort, dtype, keep, organ)
        # NaN of any window is NaN in the sum, which costs one pass over the plane and no memory.
        if dtype is not None and not math.isfinite(plane.sum()):
            log.debug("half precision overflowed; this slide again in float32")
            plane = self._attempt(image, effort, None, keep, organ)
        if not math.isfinite(plane.sum()):
            raise CheckpointError(
                "the network gives NaN instead of probabilities; its training diverged, repeat it with a lower"
                " training.lr"
            )
        return plane

    def _attempt(
        self, image: torch.Tensor, effort: Effort, dtype: torch.dtype | None, keep: np.ndarray | None, organ: int
    ) -> np.ndarray:
        window, is_cuda = self.experiment.inference.window, self.device.type == "cuda"
        # A GPU's passes return before they are done, so there the clock runs until the plane has arrived.
        watch = None if is_cuda else self.stopwatch
        networks, model = self.networks[: effort.folds], self.experiment.model
        predict = MeanProbability(networks, tour(effort.views), model, self.device, self.limits, dtype, watch, organ)
        in_one_piece = max(image.shape[:2]) <= self.limits.whole
        if is_cuda:
            torch.backends.cudnn.benchmark = (
                not in_one_piece
            )  # batches of windows have one shape; no GPU has run this line
        with self.stopwatch.running() if is_cuda else nullcontext():
            plane = self._in_one_piece(image, predict) if in_one_piece else None
            if plane is None:
                plane = stitch(image, predict, window, effort.overlap, self.limits.windows, keep)
            return plane.cpu().numpy()

    def _in_one_piece(self, image: torch.Tensor, predict: MeanProbability) -> torch.Tensor | None:
        """The whole plane; None where the network does not take its shape or the memory is too small: windows
        remain.
        """
        try:
            return whole_plane(image, predict)
        except MemoryShort:
            self.limits.whole = max(image.shape[:2]) - 1
        except (RuntimeError, ValueError, AssertionError) as error:
            self.limits.whole = 0
            log.debug("the network does not take %d x %d px", *image.shape[:2], exc_info=error)
        log.warning(
            "a slide of %d x %d px cannot be predicted in one piece; it and larger ones are predicted in windows",
            *image.shape[:2],
        )
        return None

    def _dtype(self) -> torch.dtype | None:
        precision = self.experiment.inference.precision
        if precision == "auto":
            precision = self.experiment.training.precision if self.device.type == "cuda" else "fp32"
        elif precision == "fp16" and self.device.type == "cpu":
            raise ConfigError(
                "inference.precision is fp16 on a CPU, which computes it slowly and coarsely; use auto, fp32 or bf16"
            )
        return autocast_dtype(precision, self.device)


def fold_folders(run: Path) -> dict[int, Path]:
    """The folds of a run that have trained weights: number -> folder."""
    found = {
        int(folder.name[4:]): folder
        for folder in run.glob("fold*")
        if folder.name[4:].isdecimal() and (folder / MODEL_FILE).is_file()
    }
    return dict(sorted(found.items()))


def load_ensemble(
    run: str | Path, device: torch.device, folds: Sequence[int] | None = None, overrides: Sequence[str] = ()
) -> Ensemble:
    """Load a run folder for inference; `folds` picks some, `overrides` are `inference.key=value` settings.

    Raises CheckpointError when the folder is not a run, holds no trained fold, its weights do not fit its config, or
    inference.normalise is set and the run has no stain_references.json.
    """
    run = Path(run)
    settings = run_settings(run, overrides)
    found = fold_folders(run)
    if not found:
        raise CheckpointError(
            f"{run} holds no trained fold (fold<k>/{MODEL_FILE}); train it first, or finish it with --resume"
        )
    missing = [fold for fold in folds or () if fold not in found]
    if missing:
        raise CheckpointError(f"{run} holds the folds {list(found)}, not {missing}; train those or ask for others")
    for fold in folds or found:
        if (found[fold] / "last.ckpt").is_file() and not (found[fold] / COUNTS_FILE).is_file():
            log.warning("%s is not finished: its best epoch so far is used; go on with --resume", found[fold])
    references = references_of(run, settings.inference)
    networks = [load_network(settings, found[fold], device) for fold in dict.fromkeys(folds or found)]
    log.info("%s: %d folds, views %s, on %s", run, len(networks), settings.inference.views, device)
    tuner = Tuner(run / SPEED_FILE, device) if settings.inference.tune_speed else None
    thresholds = read_thresholds(run)
    inference = with_fitted(settings.inference, read_fitted(run, thresholds))
    return Ensemble(
        settings.model_copy(update={"inference": inference}), networks, thresholds, device, tuner, references
    )


def load_fold(
    settings: Experiment, folder: Path, device: torch.device, thresholds: Mapping[str, float] | None = None
) -> Ensemble:
    """The network of one fold's `folder` alone, to judge it on the slides that it holds out; no speed is tuned.

    Raises CheckpointError as `load_ensemble` does.
    """
    references = references_of(folder.parent, settings.inference, int(folder.name.removeprefix("fold")))
    return Ensemble(
        settings, [load_network(settings, folder, device)], dict(thresholds or {}), device, references=references
    )


def load_network(settings: Experiment, fold: Path, device: torch.device) -> nn.Module:
    """The network of one fold folder, in eval mode on `device`."""
    path = fold / MODEL_FILE
    network = build(settings.model, pretrained=False)
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:150]
        raise CheckpointError(
            f"{path} does not hold the network of its config.yaml ({reason}); train this fold again"
        ) from error
    whole: Any = network.eval()  # torch's stubs lack this form of `to`
    return whole.to(device, memory_format=torch.channels_last)


def read_thresholds(run: Path) -> dict[str, float]:
    """The fitted thresholds of a run by organ; empty when there are none yet."""
    path = run / "thresholds.json"
    if not path.is_file():
        log.warning("%s has no thresholds.json; every organ takes inference.threshold", run)
        return {}
    try:
        values = {str(organ): float(value) for organ, value in json.loads(path.read_text(encoding="utf-8")).items()}
        if not all(0 < value < 1 for value in values.values()):
            raise ValueError("a threshold is no probability")
    except (ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not a table of organ: threshold; fit it again with 'hubmap evaluate {run}'"
        ) from error
    return values


def run_settings(run: Path, overrides: Sequence[str] = (), data: str = "") -> Experiment:
    """The experiment of a run folder, with `inference.key=value` overrides and, if given, another data folder.

    Raises CheckpointError when the folder is not a run, ConfigError for an override of anything but inference.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(
            f"{run} is not a run folder: config.yaml is missing; give the folder that 'hubmap train --out' wrote"
        )
    for override in overrides:
        if not override.startswith("inference."):
            raise ConfigError(
                f"--set {override}: a trained network's other settings are fixed; only inference.* can change now"
            )
    return experiment.load(str(run / "config.yaml"), overrides, data)
