"""An experiment's settings as cells of the list of tries."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from hubmap_kit.config import AugmentConfig, Experiment, ScaleChoices, ScaleConfig
from hubmap_kit.report.tries_columns import Row


def settings_row(settings: Experiment) -> Row:
    """The cells that config.yaml alone fills."""
    augment, model, training = settings.augment, settings.model, settings.training
    return {
        "model": model.arch,
        "encoder": model.encoder,
        "conversion": settings.data.conversion or conversion(settings.scale),
        "size": settings.tiles.size,
        "overlap": settings.tiles.overlap,
        "augment": augment.pipeline,
        "engine": augment.engine,
        "mixing": _weighted(augment.mixing),
        "stain": _stain(augment),
        "loss": training.loss,
        "optimizer": training.optimizer,
        "lr": training.lr,
        "schedule": training.schedule,
        "epochs": training.epochs,
        "iterations": training.iterations or None,
        "batch": training.batch_size,
        "accumulate": training.accumulate,
        "seed": training.seed,
        "classes": model.classes,
        "auxiliary": _weighted(model.auxiliary),
        "start": PurePath(model.encoder_weights).stem or "random",
    }


def conversion(scale: ScaleConfig) -> str:
    """How a slide becomes the network's pixels, in a few words."""
    return ", ".join([_scale(scale), *(f"{organ} {_scale(choices)}" for organ, choices in scale.organs.items())])


def _scale(choices: ScaleChoices) -> str:
    return {
        "reduce": f"reduce {choices.reduce}",
        "physical": f"{choices.um_per_px:g} um/px",
        "fit": f"fit {choices.fit} px",
    }[choices.policy]


def _weighted(weights: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items())


def _stain(augment: AugmentConfig) -> str:
    return "" if augment.stain == "none" else f"{augment.stain} {augment.stain_probability:g}"
