"""Plain-text tables for the terminal and for logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from hubmap_kit.competition.metric import summarise
from hubmap_kit.competition.organs import FACTS, ORGANS
from hubmap_kit.config import AugmentChoices, Experiment
from hubmap_kit.inference.postprocess import choices_for, threshold_for
from hubmap_kit.report.curves import words_of
from hubmap_kit.tiles.scaling import scaled_shape
from hubmap_kit.training.tune import CANDIDATES, OrganResult

EXTENT_UM = 1200.0  # width of an HPA slide: 3000 px of 0.4 um; HuBMAP's are about as wide
RECIPE_HEADER = (
    *("organ", "um/px HPA", "um/px HuBMAP", "zoom", "detail", "stain", "drawn"),
    *("threshold", "smallest", "opening", "shrink"),
)
TUNING_HEADER = ("organ", "slides", "threshold", "tuned", "Dice", "tuned", "crossed", "tuned", "after the threshold")


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first is left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    rule = ["-" * width for width in widths]
    lines = []
    for first, *others in (header, rule, *rows):
        cells = [first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def oof_summary(table: pd.DataFrame) -> str:
    """Out-of-fold Dice per organ: slides, Dice at 0.5, Dice at the fitted threshold, the threshold; per source where
    several.
    """
    half, fitted = _means(table, "dice@0.5"), _means(table, "dice")
    thresholds = dict(zip(table["organ"], table["threshold"], strict=True))
    sources = sorted(set(table["data_source"]))
    names = [organ for organ in ORGANS if organ in fitted] + (sources if len(sources) > 1 else []) + ["all"]
    rows = []
    for name in names:
        threshold = f"{thresholds[name]:.3f}" if name in thresholds else ""
        rows.append(
            [name, str(fitted[name]["n"]), f"{half[name]['dice']:.4f}", f"{fitted[name]['dice']:.4f}", threshold]
        )
    return text_table(["out of fold", "slides", "Dice at 0.5", "Dice fitted", "threshold"], rows)


def source_summary(scores: pd.DataFrame) -> str:
    """Dice per organ, one column a source; `scores` has one row a slide with organ, data_source and dice."""
    sources = sorted(set(scores["data_source"]))
    by_source = [_means(scores[scores["data_source"] == source], "dice") for source in sources]
    total = _means(scores, "dice")
    names = [organ for organ in ORGANS if organ in total] + ["all"]
    rows = [
        [name, str(total[name]["n"]), *(f"{means[name]['dice']:.4f}" if name in means else "" for means in by_source)]
        for name in names
    ]
    return text_table(["test slides", "slides", *(f"Dice {source}" for source in sources)], rows)


def _means(table: pd.DataFrame, column: str) -> dict[str, dict[str, float]]:
    return summarise(
        [{"organ": r["organ"], "source": r["data_source"], "dice": r[column]} for r in table.to_dict("records")]
    )


def recipe_table(settings: Experiment) -> str:
    """One row an organ.

    um/px: width of a network pixel on a slide of 1.2 mm, by source; zoom: random scale; detail: share of tiles
    coarsened to HuBMAP's pixel size; drawn: how often, against 1; smallest: smallest part kept, as a share of the
    slide; opening and shrink in slide pixels.
    """
    return text_table(RECIPE_HEADER, [_recipe_row(settings, organ) for organ in ORGANS])


def _recipe_row(settings: Experiment, organ: str) -> list[str]:
    augment, after = settings.augment.of(organ), choices_for(organ, settings.inference)
    shares: Mapping[Any, float] = settings.training.organ_shares
    detail = f"{augment.hubmap_scale:g}"
    if organ == "prostate" and settings.augment.coarse_prostate:
        detail += f", far {settings.augment.coarse_prostate:g}"
    return [
        organ,
        *(_network_um(settings, organ, source) for source in ("HPA", "Hubmap")),
        "{:g}-{:g}".format(*augment.zoom),
        detail,
        _stain(augment),
        f"{shares.get(organ, 1):g}",
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


def tune_summary(results: Sequence[OrganResult], rescue: bool) -> str:
    """One row an organ and one for all slides: threshold, Dice on the slides that were fitted, and cross-fitted Dice,
    each before and after tuning. Thresholds of sources follow their organ's row.
    """
    columns = ("plain_same", "same", "plain_crossed", "crossed")
    rows = []
    for result in in_organ_order(results):
        choice = result.choice
        thresholds = [f"{result.plain_threshold:.3f}", f"{choice.threshold:.3f}"]
        steps = words_of(CANDIDATES[choice.candidate], rescue)
        rows.append([result.organ, str(result.slides), *thresholds, *mean_cells([result], columns), steps])
        rows += [[f"  {source}", "", "", f"{value:.3f}", *[""] * 5] for source, value in choice.sources.items()]
    rows.append(["all", str(sum(result.slides for result in results)), "", "", *mean_cells(results, columns), ""])
    return text_table(TUNING_HEADER, rows)


def mean_cells(results: Sequence[Any], columns: Sequence[str]) -> list[str]:
    """The mean of each attribute in `columns` over results, weighted by their `slides`."""
    weights = [result.slides for result in results]
    return [f"{np.average([getattr(result, name) for result in results], weights=weights):.4f}" for name in columns]


def in_organ_order(results: Sequence[Any]) -> list[Any]:
    """Results that have an `organ`, in the competition's order of organs."""
    return sorted(results, key=lambda result: ORGANS.index(result.organ))
