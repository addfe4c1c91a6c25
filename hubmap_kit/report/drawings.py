"""The drawings of `hubmap eda`, as SVG for light and dark pages: one drawing, two inks."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.report.curves import COLOURS
from hubmap_kit.report.eda_tables import UNKNOWN, Tables
from hubmap_kit.report.html import Picture, data_uri

# Drawn in the light page's colours, which no data colour has, and changed into the dark page's in the finished text.
INK, LINE = "#1b1f24", "#d5dae1"
DARK_INK, DARK_LINE = "#e3e8ee", "#3b4450"
# The palette is made for white paper; on a dark page the same hues have to be lighter, or small dots drown.
DARK_COLOURS = dict(
    zip(COLOURS, ("#45a3ee", "#ff8b45", "#2fd0a0", "#ee9fca", "#ffc247", "#b3e1ff", "#ffffff"), strict=True)
)
STYLE = {
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.facecolor": "none",
    "legend.edgecolor": "none",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "svg.hashsalt": "eda",
}
_HEAD = re.compile(
    r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>", re.DOTALL
)  # names of documents on the web, and nothing to draw
ORGAN_COLOURS = dict(zip(ORGANS, COLOURS, strict=False))
SEX_COLOURS = {"male": COLOURS[0], "female": COLOURS[4], UNKNOWN: "#8a929b"}


def drawing(draw: Callable[[Figure], None], size: tuple[float, float], alt: str, caption: str = "") -> Picture:
    """A figure of `size` inches, filled by `draw`, in both inks."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasSVG(figure)
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    light = _HEAD.sub("", buffer.getvalue()).strip()
    dark = light.replace(INK, DARK_INK).replace(LINE, DARK_LINE)
    for paper, night in DARK_COLOURS.items():
        dark = dark.replace(paper.lower(), night)  # matplotlib writes colours in small letters
    return Picture(_svg(light), alt, caption, _svg(dark))


def _svg(text: str) -> str:
    return data_uri(text.encode(), "image/svg+xml")


def organs_drawing(tables: Tables) -> Picture:
    """Slides per organ with their shares."""

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        counts = [int((tables.slides["organ"] == organ).sum()) for organ in tables.organs]
        bars = axes.barh(tables.organs, counts, color=[ORGAN_COLOURS[organ] for organ in tables.organs])
        axes.bar_label(bars, [f"{count} ({count / sum(counts):.1%})" for count in counts], padding=4, color=INK)
        axes.grid(visible=False, axis="y")  # lines through the labels
        axes.invert_yaxis()
        axes.set_xlim(0, max(counts) * 1.2)
        axes.set_xlabel("slides")

    return drawing(draw, (8, 0.7 + 0.45 * len(tables.organs)), "Bars: slides of each organ and their share.")


def people_drawing(tables: Tables) -> Picture:
    """Sex of each organ's donors, and their age."""

    def draw(figure: Figure) -> None:
        sex, age = figure.subplots(1, 2)
        table = pd.crosstab(tables.slides["organ"], tables.slides["sex"]).reindex(tables.organs)
        start = np.zeros(len(table))
        for name in (name for name in SEX_COLOURS if name in table):
            sex.barh(table.index, table[name], left=start, color=SEX_COLOURS[name], label=name)
            start += table[name].to_numpy()
        sex.invert_yaxis()
        sex.grid(visible=False, axis="y")
        sex.set_xlabel("slides")
        sex.set_title("sex", loc="left")
        sex.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=len(SEX_COLOURS), borderaxespad=0.2)
        known = tables.slides.dropna(subset="age")
        names = [name for name in SEX_COLOURS if name in set(known["sex"])]
        ages = [known.loc[known["sex"] == name, "age"].to_numpy(float) for name in names]
        if names:
            age.hist(
                ages, bins=np.arange(0, 125, 5), stacked=True, color=[SEX_COLOURS[name] for name in names], label=names
            )
            age.legend()
        age.set_title(f"age of {len(known)} slides' donors")
        age.set_xlabel("years")
        age.set_ylabel("slides")
        age.yaxis.get_major_locator().set_params(integer=True)

    return drawing(draw, (11, 3.4), "Left: slides by sex and organ. Right: histogram of ages by sex.")


def sizes_drawing(tables: Tables) -> Picture:
    """Height and width in pixels, and the side in the world."""

    def draw(figure: Figure) -> None:
        pixels, world = figure.subplots(1, 2)
        for source, group in tables.slides.groupby("data_source"):
            same = group.groupby(["width", "height"]).size().reset_index(name="slides")
            colour = COLOURS[0] if source == "HPA" else COLOURS[1]
            pixels.scatter(
                same["width"],
                same["height"],
                s=14 + 10 * np.sqrt(same["slides"]),
                color=colour,
                alpha=0.8,
                linewidth=0,
                label=source,
            )
            world.hist(group["height"] * group["um_per_px"] / 1000, bins=30, color=colour, alpha=0.8, label=source)
        pixels.set(xlabel="width, px", ylabel="height, px", title="size (larger dot: more slides)")
        world.set(xlabel="height, mm", ylabel="slides", title="size of the field")
        for axes in (pixels, world):
            axes.legend()

    return drawing(
        draw,
        (11, 3.4),
        "Left: height against width of the slides. Right: histogram of the field's height in millimetres.",
    )


def coverage_drawing(tables: Tables) -> Picture:
    """Coverage and units of every slide, by organ."""

    def draw(figure: Figure) -> None:
        covered, units = figure.subplots(1, 2, sharey=True)
        _strips(
            covered,
            tables.organs,
            [100 * tables.slides.loc[tables.slides["organ"] == organ, "coverage"] for organ in tables.organs],
        )
        _strips(
            units,
            tables.organs,
            [tables.slides.loc[tables.slides["organ"] == organ, "units"] for organ in tables.organs],
        )
        covered.set(xlabel="% of the slide's pixels", title="coverage (bar: mean)")
        units.set(xlabel="units in a slide", title="units, 8 neighbours (bar: mean)")
        units.set_xscale("symlog", linthresh=1)  # a slide may have none
        units.set_xlim(left=-0.3)
        units.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))

    return drawing(
        draw, (11, 0.9 + 0.6 * len(tables.organs)), "Dots: coverage and number of units of every slide, by organ."
    )


def _strips(axes: Axes, names: Sequence[str], values: Sequence[pd.Series]) -> None:
    """A row of dots for each name, spread upwards and downwards so that equal values stay apart."""
    for row, (name, series) in enumerate(zip(names, values, strict=True)):
        spread = row + 0.5 * ((np.arange(len(series)) * 0.618034) % 1 - 0.5)  # the golden ratio never lines up
        axes.scatter(series, spread, s=20, color=ORGAN_COLOURS[name], alpha=0.75, linewidth=0)
        axes.vlines(series.mean(), row - 0.38, row + 0.38, color=INK, linewidth=2)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def shapes_drawing(tables: Tables) -> Picture:
    """Area, size, eccentricity and solidity of units, by organ."""
    whole = tables.units[~tables.units["fragment"]]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, 2).ravel()
        for axes, (column, label, log) in zip(panels, SHAPES, strict=True):
            for organ in tables.organs:
                values = whole.loc[whole["organ"] == organ, column].to_numpy(float)
                if len(values):
                    shares = np.full(len(values), 1 / len(values))
                    style = {"histtype": "step", "linewidth": 1.6, "color": ORGAN_COLOURS[organ], "label": organ}
                    axes.hist(values, bins=_edges(whole[column], log), weights=shares, **style)
            axes.set(xlabel=label, ylabel="share of the organ's units", xscale="log" if log else "linear")
            if log:
                axes.xaxis.set_major_locator(
                    LogLocator(subs=(1.0, 3.0))
                )  # powers of ten alone may be one label, or none
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
        panels[0].legend()

    return drawing(
        draw, (11, 6.4), "Histograms of the units' area, length, eccentricity and solidity, one line for each organ."
    )


SHAPES = (
    ("area_um2", "area, µm²", True),
    ("length_um", "length, µm", True),
    ("eccentricity", "eccentricity (0: disc)", False),
    ("solidity", "solidity (1: convex)", False),
)


def _edges(values: pd.Series, log: bool) -> np.ndarray:
    """The edges of 30 bins over all values, equally wide on the axis that they are drawn on."""
    low, high = float(values.min()), float(values.max())
    return np.geomspace(low, high * 1.001, 31) if log else np.linspace(low, high + 1e-3, 31)


# Loss and Dice of several runs in one drawing.

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
