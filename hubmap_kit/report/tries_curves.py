"""Loss and Dice of several runs in one drawing."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hubmap_kit.report.curves import COLOURS
from hubmap_kit.report.eda_plots import INK, drawing
from hubmap_kit.report.html import Picture

# Those of the other pictures without black, which a dark page swallows; beyond them mid-tones that both pages show.
RUN_COLOURS = (*COLOURS[:6], "#8f6bbf", "#a07a3c", "#7d8791", "#b5484b")
CAPTION = "Loss: training solid, validation dashed. Each line is the mean of the folds that have come to that epoch."


def colour(position: int) -> str:
    """The colour of a run by its place in the list."""
    return RUN_COLOURS[position % len(RUN_COLOURS)]


def curves_drawing(metrics: Mapping[str, pd.DataFrame], folds: bool = False) -> Picture:
    """Train and validation loss, and Dice, by epoch; one colour a run. `metrics` is run -> the rows of its metrics.csv.

    With `folds` every fold is drawn too, thinly.
    """
    legend_rows = 1 + len(metrics) // 4

    def draw(figure: Figure) -> None:
        loss, dice = figure.subplots(1, 2)
        for position, table in enumerate(metrics.values()):
            for axes, column, style in ((loss, "train_loss", "-"), (loss, "val_loss", "--"), (dice, "dice", "-")):
                _lines(axes, table, column, colour(position), style, folds)
        for axes, title in ((loss, "loss"), (dice, "Dice, mean over held-out slides")):
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        handles = [
            Line2D([], [], color=colour(position), linewidth=2.5, label=name) for position, name in enumerate(metrics)
        ]
        styles = [
            Line2D([], [], color=INK, linestyle=style, label=name)
            for name, style in (("training", "-"), ("validation", "--"))
        ]
        figure.legend(handles=handles + styles, loc="outside lower center", ncols=4, fontsize=9)

    alt = f"Curves of {', '.join(metrics)}. Left: training and validation loss by epoch. Right: Dice by epoch."
    return drawing(
        draw, (11, 3.8 + 0.25 * legend_rows), alt, CAPTION + (" Thin lines are single folds." if folds else "")
    )


def _lines(axes: Axes, table: pd.DataFrame, column: str, tint: str, style: str, folds: bool) -> None:
    if column not in table:
        return
    known = table[np.isfinite(table[column])]
    if known.empty:
        return
    mean = known.groupby("epoch")[column].mean()
    axes.plot(mean.index, mean, color=tint, linestyle=style, linewidth=1.9, marker="o" if len(mean) == 1 else None)
    several = known["fold"].nunique() > 1
    for _, rows in known.groupby("fold") if folds and several else ():
        axes.plot(rows["epoch"], rows[column], color=tint, linestyle=style, linewidth=0.7, alpha=0.55)
