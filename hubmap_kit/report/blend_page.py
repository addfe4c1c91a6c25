"""The page of `hubmap blend`, and its table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hubmap_kit.report.drawings import INK, drawing, run_colour
from hubmap_kit.report.html import Block, Note, Section, Table, page
from hubmap_kit.report.tables import text_table
from hubmap_kit.training.blend import OrganBlend, Step

DARK_TEXT, LIGHT_TEXT = "#101214", "#fdfdfe"  # on coloured cells, the same on light and dark pages
CROSSED = (
    "Every Dice is that of held-out slides, at the blend's small size, with weights and threshold that were fitted"
    " without the slide's fold. Each run's kept epoch was chosen on these slides, so all columns are a little"
    " optimistic, in the same way."
)


@dataclass(frozen=True)
class Fitted:
    """A fitted blend: names of the runs, organs, greedy steps, and how alike the runs are: (runs, runs) correlation of
    planes, Dice between masks.
    """

    names: Sequence[str]
    organs: Sequence[OrganBlend]
    steps: Sequence[Step]
    correlation: np.ndarray
    overlap: np.ndarray


def blend_summary(fitted: Fitted) -> str:
    """Weights and cross-fitted Dice by organ, for the terminal, and the gain in a sentence."""
    header, rows = _dice_rows(fitted)
    weights = text_table(
        ["weights", *fitted.names, "used", "threshold"], [[name, *cells] for name, *cells in _weight_rows(fitted)]
    )
    return f"{weights}\n\n{text_table(header, rows)}\n\n{gain_sentence(fitted)}"


def blend_page(fitted: Fitted) -> str:
    """The HTML of a fitted blend."""
    header, rows = _dice_rows(fitted)
    sections = [
        Section(
            "Dice",
            [Note(gain_sentence(fitted)), Note(CROSSED), Table(header, rows, "gain: fitted weights less equal ones")],
        ),
        Section("Weights", _weights(fitted)),
        Section("How alike the runs are", _alike(fitted)),
        Section("One run after the other", _greedy(fitted)),
    ]
    return page(
        "Blend", f"{', '.join(fitted.names)}: the weighted mean of their probabilities, weights by organ.", sections
    )


def gain_sentence(fitted: Fitted) -> str:
    """What fitted weights gain over equal ones and over the best run, with a standard error over slides."""
    singles, even, blend = _dice_of(fitted.organs)
    best = int(singles.mean(1).argmax())
    kept = [each.organ for each in fitted.organs if each.used == "equal"]
    left = f" Equal weights are kept for {', '.join(kept)}." if kept else ""
    return (
        f"Fitted weights: {blend.mean():.4f}, {_difference(blend - even)} than equal weights ({even.mean():.4f}),"
        f" {_difference(blend - singles[best])} than {fitted.names[best]} alone ({singles[best].mean():.4f}), over"
        f" {len(even)} slides.{left}"
    )


def _dice_of(organs: Sequence[OrganBlend]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Dice by slide: of each run (runs, slides), of equal weights and of fitted ones (slides,)."""
    singles = np.concatenate([each.singles for each in organs], axis=1)
    return singles, np.concatenate([each.even for each in organs]), np.concatenate([each.blend for each in organs])


def _difference(values: np.ndarray) -> str:
    error = f" +- {values.std(ddof=1) / np.sqrt(len(values)):.4f}" if len(values) > 1 else ""
    return f"{abs(values.mean()):.4f}{error} {'less' if values.mean() < 0 else 'more'}"


def _dice_rows(fitted: Fitted) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, among in (*((each.organ, [each]) for each in fitted.organs), ("all", fitted.organs)):
        singles, even, blend = _dice_of(among)
        means = (*singles.mean(1), even.mean(), blend.mean())
        rows.append([name, str(len(even)), *(f"{mean:.4f}" for mean in means), f"{(blend - even).mean():+.4f}"])
    return ["organ", "slides", *fitted.names, "equal", "fitted", "gain"], rows


def _weight_rows(fitted: Fitted) -> list[list[str]]:
    return [
        [each.organ, *(f"{weight:.2f}" for weight in each.weights), each.used, f"{each.threshold:.3f}"]
        for each in fitted.organs
    ]


def _weights(fitted: Fitted) -> list[Block]:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        names, start = [each.organ for each in fitted.organs], np.zeros(len(fitted.organs))
        for run, name in enumerate(fitted.names):
            values = np.array([each.weights[run] for each in fitted.organs])
            axes.barh(names, values, left=start, color=run_colour(run), label=name)
            start += values
        axes.invert_yaxis()
        axes.set_xlim(0, 1)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("weight")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))

    picture = drawing(draw, (9, 1 + 0.45 * len(fitted.organs)), "Bars: the weight of each run, by organ.")
    note = (
        "used says 'equal' where fitted weights gained nothing in cross-fitting, or were the equal ones; inference"
        " takes the weights shown here."
    )
    return [picture, Note(note), Table(["organ", *fitted.names, "used", "threshold"], _weight_rows(fitted))]


def _alike(fitted: Fitted) -> list[Block]:
    def cells(axes: Axes, values: np.ndarray, title: str) -> None:
        count = len(fitted.names)
        axes.pcolormesh(values, cmap="viridis", vmin=min(0.0, float(values.min())), vmax=1.0)
        for row in range(count):
            for column in range(count):
                text = LIGHT_TEXT if values[row, column] < 0.6 else DARK_TEXT
                axes.text(column + 0.5, row + 0.5, f"{values[row, column]:.2f}", ha="center", va="center", color=text)
        ticks = np.arange(count) + 0.5
        axes.set_xticks(ticks, fitted.names, rotation=30, ha="right")
        axes.set_yticks(ticks, fitted.names)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.set_title(title, loc="left")

    def draw(figure: Figure) -> None:
        left, right = figure.subplots(1, 2)
        cells(left, fitted.correlation, "planes inside tissue: correlation")
        cells(right, fitted.overlap, "masks: Dice between runs")

    side = 1.6 + 0.6 * len(fitted.names)
    alt = "Two grids: how alike each pair of runs is, by planes and by masks."
    note = (
        "Runs that err alike add little to each other. Means over slides; masks are those at each run's own threshold."
    )
    return [drawing(draw, (2.6 * side + 1, side), alt), Note(note)]


def _greedy(fitted: Fitted) -> list[Block]:
    names = [fitted.names[step.run] for step in fitted.steps]

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        dice, places = [step.dice for step in fitted.steps], range(len(names))
        axes.plot(places, dice, "o-", color=run_colour(0), label="plain mean of the runs so far")
        level = _dice_of(fitted.organs)[2].mean()
        axes.axhline(level, color=INK, linestyle="--", linewidth=1, label="fitted weights of all")
        axes.set_xticks(places, [f"+ {name}" if place else name for place, name in enumerate(names)])
        axes.set_ylabel("Dice")
        axes.legend(loc="best")

    rows = [
        [name, f"{step.dice:.4f}", f"{step.gain:+.4f}" if place else ""]
        for place, (name, step) in enumerate(zip(names, fitted.steps, strict=True))
    ]
    size, alt = (max(6.0, 1.5 * len(names) + 2), 3.4), "Dice as one run after the other is added to a plain mean."
    note = (
        "Each time the run that leaves the highest Dice is added. Thresholds are cross-fitted, the order is not."
        " Counted on grouped pixels, so the last digits differ from those above."
    )
    return [drawing(draw, size, alt), Note(note), Table(["added", "Dice", "gain"], rows)]
