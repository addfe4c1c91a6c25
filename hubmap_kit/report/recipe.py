"""What an experiment does with each organ, as one table: scale, random scale, stains, weight, threshold and what
follows it.
"""

from __future__ import annotations

from hubmap_kit.competition.organs import FACTS, ORGANS
from hubmap_kit.config import AugmentChoices, Experiment
from hubmap_kit.inference.postprocess import choices_for, threshold_for
from hubmap_kit.report.tables import text_table
from hubmap_kit.tiles.scaling import scaled_shape

EXTENT_UM = 1200.0  # width of an HPA slide: 3000 px of 0.4 um; HuBMAP's are about as wide
HEADER = (
    "organ",
    "um/px HPA",
    "um/px HuBMAP",
    "zoom",
    "detail",
    "stain",
    "drawn",
    "threshold",
    "smallest",
    "opening",
    "shrink",
)


def recipe_table(settings: Experiment) -> str:
    """One row an organ.

    um/px: width of a network pixel on a slide of 1.2 mm, by source; zoom: random scale; detail: share of tiles
    coarsened to HuBMAP's pixel size; drawn: how often, against 1; smallest: smallest part kept, as a share of the
    slide; opening and shrink in slide pixels.
    """
    return text_table(HEADER, [_row(settings, organ) for organ in ORGANS])


def _row(settings: Experiment, organ: str) -> list[str]:
    augment, after = settings.augment.of(organ), choices_for(organ, settings.inference)
    detail = f"{augment.hubmap_scale:g}"
    if organ == "prostate" and settings.augment.coarse_prostate:
        detail += f", far {settings.augment.coarse_prostate:g}"
    return [
        organ,
        *(_network_um(settings, organ, source) for source in ("HPA", "Hubmap")),
        "{:g}-{:g}".format(*augment.zoom),
        detail,
        _stain(augment),
        f"{settings.training.organ_shares.get(organ, 1):g}",
        _threshold(settings, organ),
        f"{after.min_area:g}",
        f"{after.opening}",
        f"{after.shrink}",
    ]


def _network_um(settings: Experiment, organ: str, source: str) -> str:
    um_per_px = FACTS[organ].um_per_px[source]
    side = round(EXTENT_UM / um_per_px)
    return f"{side * um_per_px / scaled_shape(side, side, um_per_px, settings.scale, organ)[0]:.3g}"


def _stain(augment: AugmentChoices) -> str:
    return "none" if augment.stain == "none" else f"{augment.stain} {augment.stain_probability:g}"


def _threshold(settings: Experiment, organ: str) -> str:
    """As configured for either source; fitted on held-out slides where nothing is."""
    own = settings.inference
    if organ not in own.thresholds and not any(organ in given for given in own.source_thresholds.values()):
        return "fitted"
    values = [f"{threshold_for(organ, source, {}, own):g}" for source in ("HPA", "Hubmap")]
    return values[0] if values[0] == values[1] else "/".join(values)
