"""Curves of a training: loss, Dice and learning rate by epoch, and Dice by threshold, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from hubmap_kit.errors import TableError
from hubmap_kit.files import atomic_path

# Okabe and Ito's colour-blind-safe palette (2008), without its yellow, which is too faint for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DPI = 110


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
    figure = Figure(figsize=(15, 8.2 if organs else 5.2), dpi=DPI, layout="constrained")
    top, *bottom = figure.subfigures(2, 1, height_ratios=(1.5, 1)) if organs else [figure.subfigures(1, 1)]
    loss, dice, rate = top.subplots(1, 3)
    small = bottom[0].subplots(1, len(organs), sharey=True, squeeze=False)[0] if organs else []
    for position, (fold, rows) in enumerate(metrics.sort_values("epoch").groupby("fold", sort=True)):
        colour, label, best = COLOURS[position % len(COLOURS)], f"fold {fold}", _best(rows)
        _line(loss, rows, "train_loss", colour, best=None)
        _line(loss, rows, "val_loss", colour, best, linestyle="--")
        _line(dice, rows, "dice", colour, best, label=_fold_label(label, rows, best))
        _line(rate, rows, "lr", colour, best=None, label=label)
        for axes, organ in zip(small, organs, strict=True):
            _line(axes, rows, organ, colour, best, linewidth=1.0)
    _finish_panels(loss, dice, rate, metrics)
    for axes, organ in zip(small, organs, strict=True):
        _epoch_panel(axes, str(organ).removeprefix("dice_"), metrics)
        axes.set_ylim(-0.02, 1.02)
    if organs:
        small[0].set_ylabel("Dice")
    if title:
        figure.suptitle(title, fontsize=14)
    _save(figure, path)


def save_threshold_curves(
    path: str | Path, thresholds: np.ndarray, curves: Mapping[str, np.ndarray], chosen: Mapping[str, float]
) -> None:
    """Write a PNG with the mean Dice of every organ against the threshold on the probability, and a dot at the chosen
    threshold.

    thresholds: `(T,)`, rising; curves: organ -> `(T,)` mean Dice, NaN allowed; chosen: organ -> threshold, organs may
    be absent. Raises ValueError when a curve's length is not that of the thresholds.
    """
    thresholds = np.asarray(thresholds, float)
    figure = Figure(figsize=(8.5, 5.5), dpi=DPI, layout="constrained")
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
    _panel(axes, "Dice by threshold (dot: chosen)", "threshold on the probability")
    axes.set_ylabel("mean Dice")
    axes.set_ylim(0, 1.02)
    if curves:
        axes.legend(loc="best", fontsize=9, framealpha=0.85)
    _save(figure, path)


def _best(rows: pd.DataFrame) -> float | None:
    """The epoch with the highest Dice, or with the lowest validation loss when Dice is unknown; None when both are."""
    for name, sign in (("dice", 1), ("val_loss", -1)):
        values = _values(rows, name)
        if np.isfinite(values).any():
            return float(rows["epoch"].iloc[int(np.nanargmax(sign * values))])
    return None


def _values(rows: pd.DataFrame, name: str) -> np.ndarray:
    if name not in rows.columns:
        return np.full(len(rows), np.nan)
    values = pd.to_numeric(rows[name], errors="coerce").to_numpy(float)
    return np.where(np.isfinite(values), values, np.nan)


def _line(
    axes: Axes,
    rows: pd.DataFrame,
    name: str,
    colour: str,
    best: float | None,
    label: str | None = None,
    linestyle: str = "-",
    linewidth: float = 1.7,
) -> None:
    values = _values(rows, name)
    known = np.isfinite(values)
    if not known.any():
        return
    epochs = rows["epoch"].to_numpy(float)[known]
    marker = "o" if len(epochs) <= 3 else None  # a line of one epoch would not be seen
    style = {"linestyle": linestyle, "linewidth": linewidth if len(epochs) < 60 else 0.65 * linewidth}
    axes.plot(epochs, values[known], color=colour, label=label, marker=marker, markersize=4, **style)
    at_best = values[known][epochs == best] if best is not None else []
    if len(at_best):
        axes.plot(
            best, at_best[0], "*", color=colour, markersize=13, markeredgecolor="white", markeredgewidth=0.8, zorder=3
        )


def _fold_label(label: str, rows: pd.DataFrame, best: float | None) -> str:
    values = _values(rows, "dice")
    return f"{label}: {np.nanmax(values):.3f} at {best:g}" if best is not None and np.isfinite(values).any() else label


def _finish_panels(loss: Axes, dice: Axes, rate: Axes, metrics: pd.DataFrame) -> None:
    _epoch_panel(loss, "loss", metrics)
    _epoch_panel(dice, "Dice, mean over slides (star: best epoch)", metrics)
    _epoch_panel(rate, "learning rate", metrics)
    styles = [("train", "-", "train_loss"), ("validation", "--", "val_loss")]
    styles = [entry for entry in styles if entry[2] in metrics]
    handles = [Line2D([], [], color="#444444", linestyle=style, label=name) for name, style, _ in styles]
    if loss.lines and handles:
        loss.legend(handles=handles, fontsize=9, framealpha=0.85)
    for axes in (dice, rate):
        if axes.lines:
            axes.legend(fontsize=9, framealpha=0.85)
    rates = _values(metrics, "lr")
    rates = rates[np.isfinite(rates)]
    if rates.size and rates.min() > 0 and rates.max() / rates.min() > 20:
        rate.set_yscale("log")


def _epoch_panel(axes: Axes, title: str, metrics: pd.DataFrame) -> None:
    _panel(axes, title, "epoch")
    first, last = float(metrics["epoch"].min()), float(metrics["epoch"].max())
    space = max(0.5, (last - first) * 0.03)
    axes.set_xlim(first - space, last + space)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    if not axes.lines:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no values", transform=axes.transAxes, ha="center", va="center", color="#888888")


def _panel(axes: Axes, title: str, x_label: str) -> None:
    axes.set_title(title, fontsize=11)
    axes.set_xlabel(x_label)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | Path) -> None:
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


# The picture of a learning-rate range test.


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
