"""What tune-thresholds found: a table for the terminal, and Dice against the threshold of every organ as a PNG file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import PostprocessChoices
from hubmap_kit.files import atomic_path
from hubmap_kit.report.curves import COLOURS, DPI
from hubmap_kit.report.tables import text_table
from hubmap_kit.training.counts import THRESHOLDS
from hubmap_kit.training.tune import CANDIDATES, OrganResult, Scores, grid_of

GREY = "#777777"
HEADER = ("organ", "slides", "threshold", "tuned", "Dice", "tuned", "crossed", "tuned", "after the threshold")


def in_words(choices: PostprocessChoices, rescue: bool = False) -> str:
    """What the choices do, in a few words: "fill, open 3, drop < 0.05 %, rescue"."""
    words = [
        "fill" if choices.fill_holes else "",
        f"open {choices.opening}" if choices.opening else "",
        f"drop < {100 * choices.min_area:g} %" if choices.min_area else "",
        f"shrink {choices.shrink}" if choices.shrink else "",
        "rescue" if rescue or choices.rescue else "",
    ]
    return ", ".join(word for word in words if word) or "nothing"


def tune_summary(results: Sequence[OrganResult], rescue: bool) -> str:
    """One row an organ and one for all slides: threshold, Dice on the slides that were fitted, and cross-fitted Dice,
    each before and after tuning. Thresholds of sources follow their organ's row.
    """
    rows = []
    for result in in_order(results):
        words = in_words(CANDIDATES[result.choice.candidate], rescue)
        rows.append(
            [
                result.organ,
                str(result.slides),
                f"{result.plain_threshold:.3f}",
                f"{result.choice.threshold:.3f}",
                *_dices([result]),
                words,
            ]
        )
        rows += [
            [f"  {source}", "", "", f"{threshold:.3f}", "", "", "", "", ""]
            for source, threshold in result.choice.sources.items()
        ]
    rows.append(["all", str(sum(result.slides for result in results)), "", "", *_dices(results), ""])
    return text_table(HEADER, rows)


def _dices(results: Sequence[OrganResult]) -> list[str]:
    names = ("plain_same", "same", "plain_crossed", "crossed")
    weights = [result.slides for result in results]
    return [f"{np.average([getattr(result, name) for result in results], weights=weights):.4f}" for name in names]


def in_order(results: Sequence[OrganResult]) -> list[OrganResult]:
    """The results in the competition's order of organs."""
    return sorted(results, key=lambda result: ORGANS.index(result.organ))


def save_tuning(
    path: str | Path, scores: Scores, results: Sequence[OrganResult], rescue: bool, title: str = ""
) -> None:
    """Write a PNG with a panel for each organ: mean Dice against the threshold.

    Grey: nothing after the threshold, its best one as a hollow diamond. In colour: with the steps that were chosen, the
    chosen threshold as a dot; shaded: the thresholds within one standard error of that curve's peak. Dashed: a source's
    own threshold.
    """
    results = in_order(results)
    columns = min(3, len(results))
    lines = -(-len(results) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.1 * lines + 0.4), dpi=DPI, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, result in zip(panels, results, strict=False):
        _panel(axes, scores, result, rescue, COLOURS[ORGANS.index(result.organ)])
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=13)
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def _panel(axes: Axes, scores: Scores, result: OrganResult, rescue: bool, colour: str) -> None:
    rows, choice = scores.organs == result.organ, result.choice
    grid = grid_of(choice.candidate)
    curve = scores.final[choice.candidate][rows].mean(0)
    plain = scores.bare[0][rows].mean(0)
    axes.axvspan(*result.band, color=colour, alpha=0.12, linewidth=0, label="within a standard error of the peak")
    axes.plot(THRESHOLDS, plain, color=GREY, linewidth=1.4, label="nothing after the threshold")
    axes.plot(
        grid, curve, color=colour, linewidth=1.8, label=f"tuned: {in_words(CANDIDATES[choice.candidate], rescue)}"
    )
    axes.plot(
        result.plain_threshold,
        np.interp(result.plain_threshold, THRESHOLDS, plain),
        "D",
        markersize=8,
        color=GREY,
        markerfacecolor="white",
        label=f"plain best: {result.plain_threshold:.3f}, crossed {result.plain_crossed:.3f}",
        zorder=3,
    )
    axes.plot(
        choice.threshold,
        np.interp(choice.threshold, grid, curve),
        "o",
        markersize=9,
        color=colour,
        markeredgecolor="white",
        label=f"chosen: {choice.threshold:.3f}, crossed {result.crossed:.3f}",
        zorder=4,
    )
    for source, threshold in choice.sources.items():
        axes.axvline(threshold, color=colour, linestyle="--", linewidth=1.6, label=f"{source}: {threshold:.3f}")
    axes.set_title(
        f"{result.organ}, {result.slides} slides ({'plain threshold kept' if result.rule == 'plain' else result.rule})",
        fontsize=11,
    )
    axes.set_xlabel("threshold on the probability")
    axes.set_ylabel("mean Dice")
    axes.set_xlim(0, 1)
    axes.set_ylim(0, max(0.1, 1.12 * max(curve.max(), plain.max())))
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, framealpha=0.85)
