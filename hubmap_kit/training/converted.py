"""Training tiles out of a conversion of the slides, instead of out of the slides themselves."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import Experiment
from hubmap_kit.errors import ConfigError
from hubmap_kit.tiles.conversion import convert
from hubmap_kit.tiles.convert_config import ConvertConfig, load
from hubmap_kit.tiles.finishing import open_conversion
from hubmap_kit.tiles.store import TileStore

log = logging.getLogger(__name__)


def check_conversion(settings: Experiment) -> ConvertConfig | None:
    """The conversion that an experiment trains on, if it names one.

    Raises ConfigError where the two do not go together.
    """
    name = settings.data.conversion
    if not name:
        return None
    config, tiles, scale = load(name), settings.tiles, settings.scale
    if not config.stored:
        raise ConfigError(
            f"data.conversion is {name}, whose format is {config.format}; training reads stores, so set its format to"
            " store"
        )
    if config.tiled and (config.size, config.overlap) != (tiles.size, tiles.overlap):
        raise ConfigError(
            f"data.conversion is {name}, with tiles of {config.size} px and overlap {config.overlap:g}, but tiles.size"
            f" is {tiles.size} and tiles.overlap {tiles.overlap:g}; set both alike"
        )
    if config.kind in ("grid", "pad") and (scale.policy, scale.reduce, scale.organs) != ("reduce", config.reduce, {}):
        raise ConfigError(
            f"data.conversion is {name}, at reduce {config.reduce}, but held-out slides would be predicted at another"
            f" scale; set scale.policy=reduce and scale.reduce={config.reduce}"
        )
    return config


def converted_store(settings: Experiment, slides: Sequence[Slide], stores: Path) -> TileStore | None:
    """The store of `data.conversion`, made if it is not in `stores` yet; None where the experiment names none.

    Held-out slides are always predicted whole, as inference does it, at the experiment's `scale`.
    """
    config = check_conversion(settings)
    if config is None:
        return None
    made = convert(slides, stores, config)
    log.info("training tiles: conversion %s in %s", settings.data.conversion, made.folder)
    return open_conversion(made.folder, config) if config.tiled else TileStore(made.folder, settings.tiles)
