"""Trained folds as one predictor: all networks and all views inside the window, one stitch."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError
from hubmap_kit.inference.views import mean_probability, view_transforms
from hubmap_kit.inference.windows import predict_plane
from hubmap_kit.models.build import build, normalise
from hubmap_kit.models.device import autocast_dtype
from hubmap_kit.tiles.scaling import resize_image, resize_plane, scaled_shape

log = logging.getLogger(__name__)
MODEL_FILE = "model.safetensors"
COUNTS_FILE = "oof_counts.parquet"  # written beside the weights when a fold is done


@dataclass(frozen=True)
class Ensemble:
    """The folds of one run, on one device. `experiment` is the run's own, `thresholds` its fitted ones by organ."""

    experiment: Experiment
    networks: list[nn.Module]
    thresholds: dict[str, float]
    device: torch.device

    def plane(self, image: np.ndarray) -> np.ndarray:
        """Probability plane (h, w) float32 of a slide (h, w, 3) uint8 that is already at the network's scale."""
        config = self.experiment.inference
        views = view_transforms(config.views)
        dtype = autocast_dtype(self.experiment.training.precision if self.device.type == "cuda" else "fp32", self.device)

        @torch.inference_mode()
        def predict(windows: np.ndarray) -> np.ndarray:
            tiles = normalise(torch.from_numpy(windows).to(self.device), self.experiment.model)
            with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
                probability = mean_probability(self.networks, tiles, views)
            if dtype is not None and not torch.isfinite(probability).all():
                probability = mean_probability(self.networks, tiles, views)  # half precision overflowed; float32 reaches further
            if not torch.isfinite(probability).all():
                raise CheckpointError("the network gives NaN instead of probabilities; its training diverged, repeat it with a lower training.lr")
            return probability.cpu().numpy()

        return predict_plane(image, predict, config.window, config.overlap, config.batch_size)

    def probability(self, slide: np.ndarray, um_per_px: float) -> np.ndarray:
        """Probability plane (H, W) float32 of an original slide (H, W, 3) uint8 whose pixels are `um_per_px` micrometres wide."""
        shape = scaled_shape(*slide.shape[:2], um_per_px, self.experiment.scale)
        return resize_plane(self.plane(resize_image(slide, shape)), slide.shape[:2])


def fold_folders(run: Path) -> dict[int, Path]:
    """The folds of a run that have trained weights: number -> folder."""
    found = {int(folder.name[4:]): folder for folder in run.glob("fold*") if folder.name[4:].isdecimal() and (folder / MODEL_FILE).is_file()}
    return dict(sorted(found.items()))


def load_ensemble(run: str | Path, device: torch.device, folds: Sequence[int] | None = None, overrides: Sequence[str] = ()) -> Ensemble:
    """Load a run folder for inference; `folds` picks some, `overrides` are `inference.key=value` settings.

    Raises CheckpointError when the folder is not a run, holds no trained fold, or its weights do not fit its config.
    """
    run = Path(run)
    settings = run_settings(run, overrides)
    found = fold_folders(run)
    if not found:
        raise CheckpointError(f"{run} holds no trained fold (fold<k>/{MODEL_FILE}); train it first, or finish it with --resume")
    missing = [fold for fold in folds or () if fold not in found]
    if missing:
        raise CheckpointError(f"{run} holds the folds {list(found)}, not {missing}; train those or ask for others")
    for fold in folds or found:
        if (found[fold] / "last.ckpt").is_file() and not (found[fold] / COUNTS_FILE).is_file():
            log.warning("%s is not finished: its best epoch so far is used; go on with --resume", found[fold])
    networks = [load_network(settings, found[fold], device) for fold in dict.fromkeys(folds or found)]
    log.info("%s: %d folds, views %s, on %s", run, len(networks), settings.inference.views, device)
    return Ensemble(settings, networks, read_thresholds(run), device)


def load_network(settings: Experiment, fold: Path, device: torch.device) -> nn.Module:
    """The network of one fold folder, in eval mode on `device`."""
    path = fold / MODEL_FILE
    network = build(settings.model, pretrained=False)
    try:
        network.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:150]
        raise CheckpointError(f"{path} does not hold the network of its config.yaml ({reason}); train this fold again") from error
    return network.eval().to(device, memory_format=torch.channels_last)


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
        raise CheckpointError(f"{path} is not a table of organ: threshold; fit it again with 'hubmap evaluate {run}'") from error
    return values


def run_settings(run: Path, overrides: Sequence[str] = (), data: str = "") -> Experiment:
    """The experiment of a run folder, with `inference.key=value` overrides and, if given, another data folder.

    Raises CheckpointError when the folder is not a run, ConfigError for an override of anything but inference.
    """
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run} is not a run folder: config.yaml is missing; give the folder that 'hubmap train --out' wrote")
    for override in overrides:
        if not override.startswith("inference."):
            raise ConfigError(f"--set {override}: a trained network's other settings are fixed; only inference.* can change now")
    return experiment.load(str(run / "config.yaml"), overrides, data)
