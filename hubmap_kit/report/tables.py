"""Plain-text tables for the terminal and for logs."""

from __future__ import annotations

from collections.abc import Sequence
import pandas as pd

from hubmap_kit.competition.organs import ORGANS


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns padded to their widest cell; the first is left-aligned, the others right-aligned."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))) for row in (header, *rows)]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(line.rstrip() for line in lines)


def oof_summary(table: pd.DataFrame) -> str:
    """Out-of-fold Dice per organ: slides, Dice at 0.5, Dice at the fitted threshold, the threshold."""
    rows = []
    for organ in [name for name in ORGANS if name in set(table["organ"])]:
        part = table[table["organ"] == organ]
        rows.append([organ, str(len(part)), f"{part['dice@0.5'].mean():.4f}", f"{part['dice'].mean():.4f}", f"{part['threshold'].iloc[0]:.3f}"])
    rows.append(["all slides", str(len(table)), f"{table['dice@0.5'].mean():.4f}", f"{table['dice'].mean():.4f}", ""])
    return text_table(["out of fold", "slides", "Dice at 0.5", "Dice fitted", "threshold"], rows)


def source_summary(scores: pd.DataFrame) -> str:
    """Dice per organ, one column a source; `scores` has one row a slide with organ, data_source and dice."""
    sources = sorted(scores["data_source"].unique())
    rows = []
    for organ in [*(name for name in ORGANS if name in set(scores["organ"])), "all slides"]:
        part = scores if organ == "all slides" else scores[scores["organ"] == organ]
        means = [part.loc[part["data_source"] == source, "dice"].mean() for source in sources]
        rows.append([organ, str(len(part)), *(f"{mean:.4f}" for mean in means)])
    return text_table(["test slides", "slides", *(f"Dice {source}" for source in sources)], rows)
