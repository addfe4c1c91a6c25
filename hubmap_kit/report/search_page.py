"""The page of a hyper-parameter search: how it went, what each setting did, which settings matter, and every trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hubmap_kit.report.curves import COLOURS
from hubmap_kit.report.drawings import INK, drawing
from hubmap_kit.report.html import Block, Note, Picture, Section, Table, write_page
from hubmap_kit.training.search import LEAST_TRIALS, Dimension, Outcome

COMPLETE, PRUNED, FAILED, BEST = "#3d8fd1", COLOURS[4], "#8a929b", COLOURS[1]  # the blue stands out on dark pages too
# From a grey that light and dark pages both show to the colour of the best: bad trials recede.
SHADES = LinearSegmentedColormap.from_list("trials", ["#9aa5b1", COLOURS[5], COLOURS[1]])
MOST_CURVES = 60  # more lines only hide each other; the latest are drawn
COLUMNS = 3


def save_page(
    path: Path,
    name: str,
    outcomes: Sequence[Outcome],
    space: Sequence[Dimension],
    importance: Mapping[str, float],
    folds: Sequence[int],
) -> None:
    """Write the page; `outcomes` by number, at least one; `importance` may be empty."""
    write_page(path, f"Search: {name}", _lead(outcomes, folds), sections(outcomes, space, importance))


def sections(outcomes: Sequence[Outcome], space: Sequence[Dimension], importance: Mapping[str, float]) -> list[Section]:
    """The sections of the page, in order."""
    done = _complete(outcomes)
    found = [Section("History", [_history(outcomes)])]
    if any(len(each.curve) > 1 for each in outcomes):
        found.append(Section("Curves", [_curves(outcomes)]))
    if done:
        found.append(Section("Each setting", [_slices(done, space)]))
    if len(done) > 1 and len(space) > 1:
        found.append(Section("Settings together", [_parallel(done, space)]))
    return [
        *found,
        Section("Importance", _importance(importance, done, space)),
        Section("Trials", _trials(outcomes, space)),
    ]


def _complete(outcomes: Sequence[Outcome]) -> list[Outcome]:
    return [each for each in outcomes if each.state == "complete" and each.value is not None]


def _top(outcomes: Sequence[Outcome]) -> Outcome | None:
    return max(_complete(outcomes), key=lambda each: each.value or 0.0, default=None)


def _lead(outcomes: Sequence[Outcome], folds: Sequence[int]) -> str:
    states = [each.state for each in outcomes]
    counts = ", ".join(
        f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed") if state in states
    )
    seconds = sum(each.seconds for each in outcomes)
    time = f"{seconds / 3600:.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
    names = f"fold{'s' if len(folds) > 1 else ''} {', '.join(map(str, folds))}"
    top = _top(outcomes)
    best = (
        f" The best is trial {top.number} with a mean Dice of {top.value:.4f} on the held-out slides of {names}."
        if top
        else ""
    )
    return (
        f"{len(outcomes)} trials ({counts}) in {time}.{best} The best of many is a little lucky: the slides that chose"
        " it also scored it."
    )


def _history(outcomes: Sequence[Outcome]) -> Picture:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for state, colour, marker in (("complete", COMPLETE, "o"), ("pruned", PRUNED, "x")):
            mine = [each for each in outcomes if each.state == state and each.value is not None]
            if mine:
                axes.scatter(
                    [each.number for each in mine],
                    [each.value for each in mine],
                    color=colour,
                    marker=marker,
                    label=state,
                    s=28,
                )
        failed = [each.number for each in outcomes if each.state == "failed"]
        if failed:
            axes.plot(
                failed,
                np.full(len(failed), 0.02),
                "v",
                color=FAILED,
                transform=axes.get_xaxis_transform(),
                label="failed",
            )
        done = _complete(outcomes)
        if done:
            numbers = [each.number for each in done]
            rising = np.maximum.accumulate([each.value or 0.0 for each in done])
            axes.step(
                [*numbers, outcomes[-1].number],
                [*rising, rising[-1]],
                where="post",
                color=BEST,
                linewidth=1.6,
                label="best so far",
            )
        axes.set(xlabel="trial", ylabel="Dice")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    caption = "Pruned trials stand at the Dice of their last epoch, failed ones at the lower edge."
    return drawing(draw, (11, 3.8), "Dice of every trial by its number, and the best so far.", caption)


def _curves(outcomes: Sequence[Outcome]) -> Picture:
    shown, top = [each for each in outcomes if each.curve][-MOST_CURVES:], _top(outcomes)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for each in shown:
            colour = {"complete": COMPLETE, "pruned": PRUNED}.get(each.state, FAILED)
            marker = "." if len(each.curve) == 1 else None
            axes.plot(
                list(each.curve), list(each.curve.values()), color=colour, alpha=0.75, linewidth=1.1, marker=marker
            )
        if top is not None and top.curve:
            axes.plot(
                list(top.curve),
                list(top.curve.values()),
                color=BEST,
                linewidth=2.2,
                label=f"trial {top.number}, the best",
            )
        for state, colour in (("complete", COMPLETE), ("pruned", PRUNED)):
            axes.plot([], [], color=colour, label=state)
        axes.set(xlabel="epoch", ylabel="Dice of the first fold")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    return drawing(draw, (11, 3.8), "Dice by epoch, one line for each trial.")


def _slices(done: Sequence[Outcome], space: Sequence[Dimension]) -> Picture:
    columns, values = min(COLUMNS, len(space)), [each.value or 0.0 for each in done]
    rows, top = -(-len(space) // columns), _top(done)

    def draw(figure: Figure) -> None:
        panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
        for axes, dimension in zip(panels, space, strict=False):
            places = _places(dimension, done)
            axes.scatter(places, values, color=COMPLETE, alpha=0.7, s=24, linewidth=0)
            if top is not None:
                axes.scatter([places[list(done).index(top)]], [top.value], color=BEST, marker="*", s=130, zorder=3)
            _scale(axes, dimension)
            axes.set_xlabel(dimension.key)
        for axes in panels[len(space) :]:
            axes.set_visible(False)
        for axes in panels[::columns]:
            axes.set_ylabel("Dice")

    alt = "Dice of complete trials against each setting; a star marks the best."
    return drawing(draw, (min(11, 4.2 * columns), 3.1 * rows), alt, alt)


def _places(dimension: Dimension, outcomes: Sequence[Outcome]) -> list[float]:
    """Where trials lie on the axis of a setting: its number, or the position of their choice."""
    texts = [each.words[dimension.key] for each in outcomes]
    return (
        [float(dimension.choices.index(text)) for text in texts]
        if dimension.kind == "choice"
        else [float(text) for text in texts]
    )


def _scale(axes: Axes, dimension: Dimension) -> None:
    if dimension.kind == "log":
        axes.set_xscale("log")
    elif dimension.kind == "choice":
        names = [_cut(choice) for choice in dimension.choices]
        turn = {"rotation": 20, "ha": "right"} if sum(map(len, names)) > 30 else {}
        axes.set_xticks(range(len(names)), names, **turn)
        axes.set_xlim(-0.5, len(names) - 0.5)
    elif dimension.kind == "int":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _cut(text: str, most: int = 22) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _parallel(done: Sequence[Outcome], space: Sequence[Dimension]) -> Picture:
    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        values = np.array([each.value for each in done])
        low, wide = values.min(), np.ptp(values) or 1.0
        shares = np.column_stack([*(_shares(dimension, done) for dimension in space), (values - low) / wide])
        for row in np.argsort(values):
            share = (values[row] - low) / wide
            axes.plot(shares[row], color=SHADES(share), linewidth=0.9 + 1.6 * share, alpha=0.85)
        for column, dimension in enumerate(space):
            _labels(axes, column, dimension)
        for share in (0.0, 0.5, 1.0):
            axes.text(
                len(space) + 0.03, share, f"{low + share * np.ptp(values):.3f}", va="center", fontsize=8, color=INK
            )
        axes.set_xticks(range(len(space) + 1), [*(_cut(dimension.key, 30) for dimension in space), "Dice"])
        axes.set(yticks=[], ylim=(-0.06, 1.06), xlim=(-0.15, len(space) + 0.3))
        axes.grid(True, axis="x")
        axes.spines[["left", "bottom"]].set_visible(False)

    alt = "One line for each complete trial through its settings to its Dice; the better, the thicker."
    return drawing(draw, (11, 4.2), alt, alt)


def _shares(dimension: Dimension, outcomes: Sequence[Outcome]) -> np.ndarray:
    """Where trials lie between the ends of a setting, in 0..1."""
    places = np.array(_places(dimension, outcomes))
    if dimension.kind == "choice":
        return (places + 0.5) / len(dimension.choices)
    ends = np.array([dimension.low, dimension.high])
    if dimension.kind == "log":
        places, ends = np.log(places), np.log(ends)
    return (places - ends[0]) / (ends[1] - ends[0])


def _labels(axes: Axes, column: int, dimension: Dimension) -> None:
    if dimension.kind == "choice":
        marks = [
            ((number + 0.5) / len(dimension.choices), _cut(choice, 16))
            for number, choice in enumerate(dimension.choices)
        ]
    else:
        marks = [(0.0, f"{dimension.low:g}"), (1.0, f"{dimension.high:g}")]
    for share, text in marks:
        axes.text(column + 0.03, share + 0.015, text, va="bottom", fontsize=8, color=INK)


def _importance(importance: Mapping[str, float], done: Sequence[Outcome], space: Sequence[Dimension]) -> list[Block]:
    if not importance:
        alone = "only one setting was searched" if len(space) < 2 else ""
        few = f"it takes {LEAST_TRIALS} complete trials whose Dice differs, and {len(done)} are complete"
        return [Note(f"Importance is not told: {alone or few}.")]
    ordered = sorted(importance.items(), key=lambda item: item[1])

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        bars = axes.barh([key for key, _ in ordered], [share for _, share in ordered], color=COMPLETE)
        axes.bar_label(bars, [f"{share:.0%}" for _, share in ordered], padding=4, color=INK)
        axes.set_xlim(0, max(1e-9, ordered[-1][1]) * 1.15)
        axes.set_xlabel("share of the variance of Dice")

    note = (
        f"Functional analysis of variance (fANOVA) of {len(done)} complete trials. A few dozen trials say something;"
        " fewer are a hint."
    )
    return [
        drawing(draw, (8, 0.8 + 0.4 * len(ordered)), "Bars: how much each setting matters."),
        Note(note, warn=len(done) < 20),
    ]


def _trials(outcomes: Sequence[Outcome], space: Sequence[Dimension]) -> list[Block]:
    order = {"complete": 0, "pruned": 1, "failed": 2}
    rows = []
    for each in sorted(outcomes, key=lambda each: (order[each.state], -(each.value or 0.0), each.number)):
        dice = f"{each.value:.4f}" if each.value is not None else ""
        words = [short(each.words.get(dimension.key, "")) for dimension in space]
        rows.append([str(each.number), each.state, dice, f"{each.seconds:.0f}", *words, _cut(each.reason, 160)])
    header = ["trial", "state", "Dice", "seconds", *(dimension.key for dimension in space), "note"]
    return [Table(header, rows, "Complete trials first, the best at the top.", text_columns=len(header))]


def short(text: str) -> str:
    """A drawn float to four digits; other text as it is."""
    try:
        return f"{float(text):.4g}" if "." in text or "e" in text else text
    except ValueError:
        return text
