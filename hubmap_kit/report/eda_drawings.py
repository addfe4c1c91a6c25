"""The drawings of `hubmap eda`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from hubmap_kit.report.drawings import COLOURS, INK, ORGAN_COLOURS, drawing
from hubmap_kit.report.eda_tables import UNKNOWN, Tables
from hubmap_kit.report.html import Picture

SEX_COLOURS = {"male": COLOURS[0], "female": COLOURS[4], UNKNOWN: "#8a929b"}
SHAPES = (
    ("area_um2", "area, µm²", True),
    ("length_um", "length, µm", True),
    ("eccentricity", "eccentricity (0: disc)", False),
    ("solidity", "solidity (1: convex)", False),
)


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
            colours = [SEX_COLOURS[name] for name in names]
            age.hist(ages, bins=np.arange(0, 125, 5), stacked=True, color=colours, label=names)
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
            style = {"color": colour, "alpha": 0.8, "label": source}
            pixels.scatter(same["width"], same["height"], s=14 + 10 * np.sqrt(same["slides"]), linewidth=0, **style)
            world.hist(group["height"] * group["um_per_px"] / 1000, bins=30, **style)
        pixels.set(xlabel="width, px", ylabel="height, px", title="size (larger dot: more slides)")
        world.set(xlabel="height, mm", ylabel="slides", title="size of the field")
        for axes in (pixels, world):
            axes.legend()

    alt = "Left: height against width of the slides. Right: histogram of the field's height in millimetres."
    return drawing(draw, (11, 3.4), alt)


def coverage_drawing(tables: Tables) -> Picture:
    """Coverage and units of every slide, by organ."""

    def draw(figure: Figure) -> None:
        covered, units = figure.subplots(1, 2, sharey=True)
        slides = [tables.slides[tables.slides["organ"] == organ] for organ in tables.organs]
        _strips(covered, tables.organs, [100 * group["coverage"] for group in slides])
        _strips(units, tables.organs, [group["units"] for group in slides])
        covered.set(xlabel="% of the slide's pixels", title="coverage (bar: mean)")
        units.set(xlabel="units in a slide", title="units, 8 neighbours (bar: mean)")
        units.set_xscale("symlog", linthresh=1)  # a slide may have none
        units.set_xlim(left=-0.3)
        units.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))

    alt = "Dots: coverage and number of units of every slide, by organ."
    return drawing(draw, (11, 0.9 + 0.6 * len(tables.organs)), alt)


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
                # Powers of ten alone may be one label, or none.
                axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)))
                axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
                axes.xaxis.set_minor_formatter(NullFormatter())
        panels[0].legend()

    alt = "Histograms of the units' area, length, eccentricity and solidity, one line for each organ."
    return drawing(draw, (11, 6.4), alt)


def _edges(values: pd.Series, log: bool) -> np.ndarray:
    """The edges of 30 bins over all values, equally wide on the axis that they are drawn on."""
    low, high = float(values.min()), float(values.max())
    return np.geomspace(low, high * 1.001, 31) if log else np.linspace(low, high + 1e-3, 31)
