"""Plain-text tables for the terminal and for logs."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from hubmap_kit.competition.metric import summarise
from hubmap_kit.competition.organs import ORGANS


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
