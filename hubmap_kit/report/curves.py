"""Curves by epoch, threshold and learning rate: PNG files for run folders, and several runs in one drawing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import PostprocessChoices
from hubmap_kit.errors import TableError
from hubmap_kit.report.drawings import COLOURS, INK, ORGAN_COLOURS, drawing, png_figure, run_colour, save_png, tidy_axes
from hubmap_kit.report.html import Block, Note
from hubmap_kit.training.counts import THRESHOLDS
from hubmap_kit.training.tune import CANDIDATES, OrganResult, Scores, grid_of

GREY = "#777777"
RUNS_CAPTION = (
    "Loss: training solid, validation dashed. Each line is the mean of the folds that have come to that epoch."
)


def save_curves(path: str | Path, metrics: pd.DataFrame, title: str = "") -> None:
    """Write a PNG with loss (train solid, validation dashed), mean Dice and learning rate by epoch, and each organ's
    Dice below.

    `metrics` has one row for each fold and epoch: `fold`, `epoch`, and any of `train_loss`, `val_loss`, `dice`, `lr`,
    `dice_<organ>`; missing columns and NaN are left out of the picture. One colour for each fold; a star marks the
    fold's best epoch (highest Dice, or lowest validation loss where there is no Dice). Raises TableError without rows,
    fold or epoch.
    """
    missing = [name for name in ("fold", "epoch") if name not in metrics.columns]
    if missing or metrics.empty:
        found = f"the columns {list(metrics.columns)}" if missing else "no rows"
        raise TableError(
            f"The metrics for {path} have {found}, expected one for each fold and epoch; train an epoch first."
        )
    organs = [name for name in metrics.columns if str(name).startswith("dice_") and metrics[name].notna().any()]
    figure = png_figure(15, 8.2 if organs else 5.2)
    parts: list[Any] = [*figure.subfigures(2, 1, height_ratios=(1.5, 1))] if organs else [figure.subfigures(1, 1)]
    top, *bottom = parts
    loss, dice, rate = top.subplots(1, 3)
    small = bottom[0].subplots(1, len(organs), sharey=True, squeeze=False)[0] if organs else []
    for position, (fold, rows) in enumerate(metrics.sort_values("epoch").groupby("fold", sort=True)):
        best = _best_epoch(rows)
        style: dict[str, Any] = {"color": COLOURS[position % len(COLOURS)]}
        _plot_epochs(loss, rows, "train_loss", **style)
        _plot_epochs(loss, rows, "val_loss", best, **style, linestyle="--")
        _plot_epochs(dice, rows, "dice", best, **style, label=_fold_label(fold, rows, best))
        _plot_epochs(rate, rows, "lr", **style, label=f"fold {fold}")
        for axes, organ in zip(small, organs, strict=True):
            _plot_epochs(axes, rows, organ, best, **style, linewidth=1.0)
    _finish_panels(loss, dice, rate, metrics)
    for axes, organ in zip(small, organs, strict=True):
        _epoch_panel(axes, str(organ).removeprefix("dice_"), metrics)
        axes.set_ylim(-0.02, 1.02)
    if organs:
        small[0].set_ylabel("Dice")
    if title:
        figure.suptitle(title, fontsize=14)
    save_png(figure, path)


def _best_epoch(rows: pd.DataFrame) -> float | None:
    """The epoch with the highest Dice, or with the lowest validation loss when Dice is unknown; None when both are."""
    for name, sign in (("dice", 1), ("val_loss", -1)):
        values = _finite(rows, name)
        if np.isfinite(values).any():
            return float(rows["epoch"].iloc[int(np.nanargmax(sign * values))])
    return None


def _finite(rows: pd.DataFrame, name: str) -> np.ndarray:
    """A column as float (N,), NaN for whatever is no finite number, or where there is no such column."""
    if name not in rows.columns:
        return np.full(len(rows), np.nan)
    values = pd.to_numeric(rows[name], errors="coerce").to_numpy(float)
    return np.where(np.isfinite(values), values, np.nan)


def _plot_epochs(axes: Axes, rows: pd.DataFrame, name: str, best: float | None = None, **style: Any) -> None:
    values = _finite(rows, name)
    known = np.isfinite(values)
    if not known.any():
        return
    epochs = rows["epoch"].to_numpy(float)[known]
    marker = "o" if len(epochs) <= 3 else None  # a line of one epoch would not be seen
    width = style.pop("linewidth", 1.7) * (1 if len(epochs) < 60 else 0.65)
    axes.plot(epochs, values[known], marker=marker, markersize=4, linewidth=width, **style)
    if best is not None and best in epochs:
        star: dict[str, Any] = {"markersize": 13, "markeredgecolor": "white", "markeredgewidth": 0.8, "zorder": 3}
        axes.plot(best, values[known][epochs == best][0], "*", color=style["color"], **star)


def _fold_label(fold: object, rows: pd.DataFrame, best: float | None) -> str:
    values = _finite(rows, "dice")
    known = best is not None and np.isfinite(values).any()
    return f"fold {fold}" + (f": {np.nanmax(values):.3f} at {best:g}" if known else "")


def _finish_panels(loss: Axes, dice: Axes, rate: Axes, metrics: pd.DataFrame) -> None:
    _epoch_panel(loss, "loss", metrics)
    _epoch_panel(dice, "Dice, mean over slides (star: best epoch)", metrics)
    _epoch_panel(rate, "learning rate", metrics)
    styles = [("train", "-", "train_loss"), ("validation", "--", "val_loss")]
    handles = [
        Line2D([], [], color="#444444", linestyle=line, label=name) for name, line, key in styles if key in metrics
    ]
    if loss.lines and handles:
        loss.legend(handles=handles, fontsize=9, framealpha=0.85)
    for axes in (dice, rate):
        if axes.lines:
            axes.legend(fontsize=9, framealpha=0.85)
    rates = _finite(metrics, "lr")
    rates = rates[np.isfinite(rates)]
    if rates.size and rates.min() > 0 and rates.max() / rates.min() > 20:
        rate.set_yscale("log")


def _epoch_panel(axes: Axes, title: str, metrics: pd.DataFrame) -> None:
    tidy_axes(axes, title, "epoch")
    first, last = float(metrics["epoch"].min()), float(metrics["epoch"].max())
    space = max(0.5, (last - first) * 0.03)
    axes.set_xlim(first - space, last + space)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if not axes.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color="#888888")


def save_threshold_curves(
    path: str | Path, thresholds: np.ndarray, curves: Mapping[str, np.ndarray], chosen: Mapping[str, float]
) -> None:
    """Write a PNG with the mean Dice of every organ against the threshold on the probability, and a dot at the chosen
    threshold.

    thresholds: `(T,)`, rising; curves: organ -> `(T,)` mean Dice, NaN allowed; chosen: organ -> threshold, organs may
    be absent. Raises ValueError when a curve's length is not that of the thresholds.
    """
    thresholds = np.asarray(thresholds, float)
    figure = png_figure(8.5, 5.5)
    axes = figure.subplots()
    for position, (organ, values) in enumerate(curves.items()):
        values, colour = np.asarray(values, float), COLOURS[position % len(COLOURS)]
        if values.shape != thresholds.shape or thresholds.ndim != 1:
            found = f"the curve of {organ} has shape {values.shape}"
            raise ValueError(f"{found}, expected one axis like the thresholds {thresholds.shape}")
        known = np.isfinite(values)
        label = organ
        if organ in chosen and known.any():
            at = float(chosen[organ])
            height = float(np.interp(at, thresholds[known], values[known]))
            axes.plot(at, height, "o", color=colour, markersize=9, markeredgecolor="white", zorder=3)
            axes.plot([at, at], [0, height], color=colour, linewidth=0.9, linestyle=":", alpha=0.8)
            label = f"{organ}: {height:.3f} at {at:.2f}"
        marker = "." if known.sum() == 1 else None
        axes.plot(thresholds[known], values[known], color=colour, marker=marker, linewidth=1.8, label=label)
    tidy_axes(axes, "Dice by threshold (dot: chosen)", "threshold on the probability", "mean Dice")
    axes.set_ylim(0, 1.02)
    if curves:
        axes.legend(loc="best", fontsize=9, framealpha=0.85)
    save_png(figure, path)


def words_of(choices: PostprocessChoices, rescue: bool = False) -> str:
    """What the choices do, in a few words: "fill, open 3, drop < 0.05 %, rescue"."""
    words = [
        "fill" if choices.fill_holes else "",
        f"open {choices.opening}" if choices.opening else "",
        f"drop < {100 * choices.min_area:g} %" if choices.min_area else "",
        f"shrink {choices.shrink}" if choices.shrink else "",
        "rescue" if rescue or choices.rescue else "",
    ]
    return ", ".join(filter(None, words)) or "nothing"


def save_tuning(
    path: str | Path, scores: Scores, results: Sequence[OrganResult], rescue: bool, title: str = ""
) -> None:
    """Write a PNG with a panel for each organ: mean Dice against the threshold.

    Grey: nothing after the threshold, its best one as a hollow diamond. In colour: with the steps that were chosen, the
    chosen threshold as a dot; shaded: the thresholds within one standard error of that curve's peak. Dashed: a source's
    own threshold.
    """
    columns = min(3, len(results))
    lines = -(-len(results) // columns)
    figure = png_figure(5.2 * columns, 4.1 * lines + 0.4)
    panels = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes, result in zip(panels, sorted(results, key=lambda each: ORGANS.index(each.organ)), strict=False):
        _tuning_panel(axes, scores, result, rescue)
    for axes in panels[len(results) :]:
        axes.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=13)
    save_png(figure, path)


def _tuning_panel(axes: Axes, scores: Scores, result: OrganResult, rescue: bool) -> None:
    rows, choice, colour = scores.organs == result.organ, result.choice, ORGAN_COLOURS[result.organ]
    grid = grid_of(choice.candidate)
    curve, plain = scores.final[choice.candidate][rows].mean(0), scores.bare[0][rows].mean(0)
    steps = words_of(CANDIDATES[choice.candidate], rescue)
    axes.axvspan(*result.band, color=colour, alpha=0.12, linewidth=0, label="within a standard error of the peak")
    axes.plot(THRESHOLDS, plain, color=GREY, linewidth=1.4, label="nothing after the threshold")
    axes.plot(grid, curve, color=colour, linewidth=1.8, label=f"tuned: {steps}")
    at, label = result.plain_threshold, f"plain best: {result.plain_threshold:.3f}, crossed {result.plain_crossed:.3f}"
    style: dict[str, Any] = {"markersize": 8, "color": GREY, "markerfacecolor": "white", "zorder": 3}
    axes.plot(at, np.interp(at, THRESHOLDS, plain), "D", label=label, **style)
    at, label = choice.threshold, f"chosen: {choice.threshold:.3f}, crossed {result.crossed:.3f}"
    style = {"markersize": 9, "color": colour, "markeredgecolor": "white", "zorder": 4}
    axes.plot(at, np.interp(at, grid, curve), "o", label=label, **style)
    for source, threshold in choice.sources.items():
        axes.axvline(threshold, color=colour, linestyle="--", linewidth=1.6, label=f"{source}: {threshold:.3f}")
    rule = "plain threshold kept" if result.rule == "plain" else result.rule
    title = f"{result.organ}, {result.slides} slides ({rule})"
    tidy_axes(axes, title, "threshold on the probability", "mean Dice")
    axes.set(xlim=(0, 1), ylim=(0, max(0.1, 1.12 * max(curve.max(), plain.max()))))
    axes.legend(fontsize=8, framealpha=0.85)


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
    figure = png_figure(8.5, 5.5)
    axes = figure.subplots()
    axes.plot(rates, losses, ".", color="#999999", markersize=4, label="loss")
    axes.plot(rates, smoothed, color=COLOURS[0], linewidth=1.8, label="smoothed loss")
    for position, (name, rate) in enumerate(suggestions.items()):
        if rate is not None:
            height = float(np.interp(np.log(rate), np.log(rates), smoothed))
            style: dict[str, Any] = {
                "color": COLOURS[1 + position % (len(COLOURS) - 1)],
                "markersize": 10,
                "markeredgecolor": "white",
            }
            axes.plot(rate, height, "o", zorder=3, label=f"{name}: {rate:.2g}", **style)
    axes.set_xscale("log")
    tidy_axes(axes, title or "learning-rate range test", "learning rate (training.lr)", "training loss")
    # The last losses may be any number; what matters is where the smoothed one comes from and how deep it goes.
    if len(smoothed):
        low = min(smoothed.min(), np.percentile(losses, 2))
        high = max(smoothed[: max(len(smoothed) // 2, 1)].max(), smoothed.min() * 1.5)
        space = 0.1 * (high - low) or 0.1
        axes.set_ylim(low - space, high + 3 * space)
    axes.legend(fontsize=9, framealpha=0.85)
    save_png(figure, path)


def curves_blocks(metrics: Mapping[str, pd.DataFrame], losses: set[str], folds: bool = False) -> list[Block]:
    """Train and validation loss, and Dice, by epoch; one colour a run. A warning where the runs' `losses` differ.

    `metrics` is run -> the rows of its metrics.csv. With `folds` every fold is drawn too, thinly.
    """

    def draw(figure: Figure) -> None:
        loss, dice = figure.subplots(1, 2)
        for position, table in enumerate(metrics.values()):
            for axes, column, style in ((loss, "train_loss", "-"), (loss, "val_loss", "--"), (dice, "dice", "-")):
                if column in table:
                    _plot_run(axes, table[np.isfinite(table[column])], column, folds, run_colour(position), style)
        for axes, title in ((loss, "loss"), (dice, "Dice, mean over held-out slides")):
            axes.set(title=title, xlabel="epoch")
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
        handles = [
            *(Line2D([], [], color=run_colour(place), linewidth=2.5, label=name) for place, name in enumerate(metrics)),
            Line2D([], [], color=INK, linestyle="-", label="training"),
            Line2D([], [], color=INK, linestyle="--", label="validation"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)

    alt = f"Curves of {', '.join(metrics)}. Left: training and validation loss by epoch. Right: Dice by epoch."
    height = 4.05 + 0.25 * (len(metrics) // 4)
    caption = RUNS_CAPTION + (" Thin lines are single folds." if folds else "")
    blocks: list[Block] = [drawing(draw, (11, height), alt, caption)]
    if len(losses) > 1:
        found = f"These runs have different losses ({', '.join(sorted(losses))})"
        blocks.append(Note(f"{found}: their values do not compare, their shapes do.", warn=True))
    return blocks


def _plot_run(axes: Axes, known: pd.DataFrame, column: str, folds: bool, colour: str, style: str) -> None:
    mean = known.groupby("epoch")[column].mean()
    if mean.empty:
        return
    axes.plot(mean.index, mean, color=colour, linestyle=style, linewidth=1.9, marker="o" if len(mean) == 1 else None)
    if folds and known["fold"].nunique() > 1:
        for _, rows in known.groupby("fold"):
            axes.plot(rows["epoch"], rows[column], color=colour, linestyle=style, linewidth=0.7, alpha=0.55)
