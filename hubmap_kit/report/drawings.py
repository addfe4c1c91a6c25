"""Figures: one palette, PNG files for run folders, and SVG pictures for light and dark pages."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.files import atomic_path
from hubmap_kit.report.html import Picture, data_uri

# Okabe and Ito's colour-blind-safe palette (2008), without its yellow, which is too faint for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
# For runs: without black, which a dark page swallows; beyond the palette mid-tones that both pages show.
RUN_COLOURS = (*COLOURS[:6], "#8f6bbf", "#a07a3c", "#7d8791", "#b5484b")
ORGAN_COLOURS = dict(zip(ORGANS, COLOURS, strict=False))
DPI = 110

# Drawn in the light page's colours, which no data colour has, and changed into the dark page's in the finished text.
INK, LINE = "#1b1f24", "#d5dae1"
DARK_INK, DARK_LINE = "#e3e8ee", "#3b4450"
# The palette is made for white paper; on a dark page the same hues have to be lighter, or small dots drown.
DARK_COLOURS = dict(
    zip(COLOURS, ("#45a3ee", "#ff8b45", "#2fd0a0", "#ee9fca", "#ffc247", "#b3e1ff", "#ffffff"), strict=True)
)
STYLE = {
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "none"),
    **dict.fromkeys(("legend.facecolor", "legend.edgecolor"), "none"),
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    "grid.color": LINE,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
    "svg.hashsalt": "hubmap",
}
# Names of documents on the web, and nothing to draw.
_HEAD = re.compile(r"<\?xml.*?\?>|<!DOCTYPE.*?>|<metadata>.*?</metadata>", re.DOTALL)


def run_colour(position: int) -> str:
    """The colour of a run by its place in the list."""
    return RUN_COLOURS[position % len(RUN_COLOURS)]


def drawing(draw: Callable[[Figure], None], size: tuple[float, float], alt: str, caption: str = "") -> Picture:
    """A figure of `size` inches, filled by `draw`, for light and dark pages."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        return svg_picture(figure, alt, caption)


def svg_picture(figure: Figure, alt: str, caption: str = "", crop: bool = False) -> Picture:
    """A figure in the colours of STYLE, for light and dark pages; `crop` cuts it to what was drawn."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure)
    figure.savefig(buffer, format="svg", bbox_inches="tight" if crop else None, metadata={"Date": None})
    light = _HEAD.sub("", buffer.getvalue()).strip()
    dark = light.replace(INK, DARK_INK).replace(LINE, DARK_LINE)
    for paper, night in DARK_COLOURS.items():
        dark = dark.replace(paper.lower(), night)  # matplotlib writes colours in small letters
    light, dark = (data_uri(text.encode(), "image/svg+xml") for text in (light, dark))
    return Picture(light, alt, caption, dark)


def png_figure(width: float, height: float) -> Figure:
    """An empty figure of this many inches for `save_png`."""
    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save_png(figure: Figure, path: str | Path) -> None:
    """Write a figure as PNG, atomically and without pyplot's global state."""
    with atomic_path(path) as temporary:
        FigureCanvasAgg(figure).print_png(str(temporary))


def tidy_axes(axes: Axes, title: str = "", x_label: str = "", y_label: str = "") -> None:
    """Titles, a light grid behind the data, and no frame at the top and on the right."""
    axes.set_title(title, fontsize=11)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(True, color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
