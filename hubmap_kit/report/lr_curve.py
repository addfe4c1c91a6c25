"""The picture of a learning-rate range test."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hubmap_kit.files import atomic_path
from hubmap_kit.report.curves import COLOURS, DPI


def save_lr_curve(
    path: str | Path,
    rates: np.ndarray,
    losses: np.ndarray,
    smoothed: np.ndarray,
    suggestions: Mapping[str, float | None],
    title: str = "",
) -> None:
    """Write a PNG with the loss (dots) and the smoothed loss (line), all (S,), against the rate on a logarithmic axis.

    Each suggestion, name -> rate, is a dot on the smoothed loss; None is left out.
    """
    figure = Figure(figsize=(8.5, 5.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.plot(rates, losses, ".", color="#999999", markersize=4, label="loss")
    axes.plot(rates, smoothed, color=COLOURS[0], linewidth=1.8, label="smoothed loss")
    for position, (name, rate) in enumerate(suggestions.items()):
        if rate is not None:
            height, colour = (
                float(np.interp(np.log(rate), np.log(rates), smoothed)),
                COLOURS[1 + position % (len(COLOURS) - 1)],
            )
            axes.plot(
                rate,
                height,
                "o",
                color=colour,
                markersize=10,
                markeredgecolor="white",
                zorder=3,
                label=f"{name}: {rate:.2g}",
            )
    axes.set_xscale("log")
    axes.set_xlabel("learning rate (training.lr)")
    axes.set_ylabel("training loss")
    # The last losses may be any number; what matters is where the smoothed one comes from and how deep it goes.
    if len(smoothed):
        low, high = (
            min(smoothed.min(), np.percentile(losses, 2)),
            max(smoothed[: max(len(smoothed) // 2, 1)].max(), smoothed.min() * 1.5),
        )
        space = 0.1 * (high - low) or 0.1
        axes.set_ylim(low - space, high + 3 * space)
    axes.set_title(title or "learning-rate range test", fontsize=11)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=9, framealpha=0.85)
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")
