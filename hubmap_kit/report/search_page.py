"""The page of a hyper-parameter search: how it went, what each setting did, which settings matter, and every trial."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hubmap_kit.report.drawings import COLOURS, INK, LINE, drawing, svg_picture
from hubmap_kit.report.html import Block, Note, Picture, Section, Table, write_page
from hubmap_kit.training.search import LEAST_TRIALS, Dimension, Outcome, import_optuna

if TYPE_CHECKING:
    import optuna

COMPLETE, PRUNED, FAILED, BEST = "#3d8fd1", COLOURS[4], "#8a929b", COLOURS[1]  # the blue stands out on dark pages too
# From a grey that light and dark pages both show to the colour of the best: bad trials recede.
SHADES = LinearSegmentedColormap.from_list("trials", ["#9aa5b1", COLOURS[5], COLOURS[1]])
MOST_CURVES = 60  # more lines only hide each other; the latest are drawn
COLUMNS = 3


def save_search_page(
    path: Path,
    name: str,
    outcomes: Sequence[Outcome],
    space: Sequence[Dimension],
    importance: Mapping[str, float],
    folds: Sequence[int],
) -> None:
    """Write the page; `outcomes` by number, at least one; `importance` may be empty."""
    write_page(path, f"Search: {name}", _lead(outcomes, folds), search_sections(outcomes, space, importance))


def search_sections(
    outcomes: Sequence[Outcome], space: Sequence[Dimension], importance: Mapping[str, float]
) -> list[Section]:
    """The sections of the page, in order."""
    done = _complete(outcomes)
    found = [Section("History", [_history(outcomes)])]
    if any(len(each.curve) > 1 for each in outcomes):
        found.append(Section("Curves", [_curves(outcomes)]))
    if done:
        found.append(Section("Each setting", _slices(done, space)))
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
            mine = [(each.number, each.value) for each in outcomes if each.state == state and each.value is not None]
            if mine:
                numbers, values = zip(*mine, strict=True)
                axes.scatter(numbers, values, color=colour, marker=marker, label=state, s=28)
        failed = [each.number for each in outcomes if each.state == "failed"]
        if failed:
            edge = axes.get_xaxis_transform()
            axes.plot(failed, np.full(len(failed), 0.02), "v", color=FAILED, transform=edge, label="failed")
        done = _complete(outcomes)
        if done:
            rising = np.maximum.accumulate([each.value or 0.0 for each in done])
            ends = [*(each.number for each in done), outcomes[-1].number]
            style: dict[str, Any] = {"where": "post", "color": BEST, "linewidth": 1.6, "label": "best so far"}
            axes.step(ends, [*rising, rising[-1]], **style)
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
            axes.plot(*_points(each), color=colour, alpha=0.75, linewidth=1.1, marker=marker)
        if top is not None and top.curve:
            axes.plot(*_points(top), color=BEST, linewidth=2.2, label=f"trial {top.number}, the best")
        for state, colour in (("complete", COMPLETE), ("pruned", PRUNED)):
            axes.plot([], [], color=colour, label=state)
        axes.set(xlabel="epoch", ylabel="Dice of the first fold")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend()

    return drawing(draw, (11, 3.8), "Dice by epoch, one line for each trial.")


def _points(outcome: Outcome) -> tuple[list[int], list[float]]:
    return list(outcome.curve), list(outcome.curve.values())


def _slices(done: Sequence[Outcome], space: Sequence[Dimension]) -> list[Block]:
    keys = [dimension.key for dimension in space]
    groups = [keys[start : start + COLUMNS] for start in range(0, len(keys), COLUMNS)]
    return [
        _optuna_picture("plot_slice", done, space, group, f"Dice of complete trials against {', '.join(group)}.")
        for group in groups
    ]


def _parallel(done: Sequence[Outcome], space: Sequence[Dimension]) -> Picture:
    keys, said = [dimension.key for dimension in space], "One line for each complete trial through its settings."
    return _optuna_picture("plot_parallel_coordinate", done, space, keys, said)


def _optuna_picture(
    plot: str, done: Sequence[Outcome], space: Sequence[Dimension], keys: Sequence[str], said: str
) -> Picture:
    """A drawing of `optuna.visualization.matplotlib`, recoloured for light and dark pages."""
    import matplotlib.pyplot as plt
    from optuna.visualization import matplotlib as plots

    with warnings.catch_warnings(), matplotlib.rc_context():  # optuna changes the style of all later figures
        warnings.simplefilter("ignore")  # optuna's drawings are marked experimental
        found: Any = getattr(plots, plot)(_study(done, space), params=list(keys), target_name="Dice")
        figure = np.ravel(found)[0].figure
    try:
        figure.set_size_inches(11, 4.2)
        figure.suptitle("")
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.set(facecolor="none", title="")
            axes.grid(color=LINE)
            axes.tick_params(colors=INK)
            axes.spines[:].set_color(INK)
            for label in (axes.xaxis.label, axes.yaxis.label):
                label.set_color(INK)
            for collection in axes.collections:
                collection.set_cmap(SHADES)
        return svg_picture(figure, said, said, crop=True)
    finally:
        plt.close(figure)


def _study(done: Sequence[Outcome], space: Sequence[Dimension]) -> optuna.Study:
    """A study in memory of complete trials; numbers are those of the search less one."""
    optuna = import_optuna()
    study = optuna.create_study(direction="maximize")
    distributions = {dimension.key: dimension.distribution() for dimension in space}
    kinds = {"choice": str, "int": int}
    for each in done:
        params = {dimension.key: kinds.get(dimension.kind, float)(each.words[dimension.key]) for dimension in space}
        study.add_trial(optuna.create_trial(value=each.value, params=params, distributions=distributions))
    return study


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
        words = [short_text(each.words.get(dimension.key, "")) for dimension in space]
        rows.append([str(each.number), each.state, dice, f"{each.seconds:.0f}", *words, _cut(each.reason, 160)])
    header = ["trial", "state", "Dice", "seconds", *(dimension.key for dimension in space), "note"]
    return [Table(header, rows, "Complete trials first, the best at the top.", text_columns=len(header))]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def short_text(text: str) -> str:
    """A drawn float to four digits; other text as it is."""
    try:
        return f"{float(text):.4g}" if "." in text or "e" in text else text
    except ValueError:
        return text
