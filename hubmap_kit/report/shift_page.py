"""What the shifts cost a run: a page, a picture, and a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from hubmap_kit.augment.shift import HUBMAP, IN_WORDS, PLAIN, SHIFTS
from hubmap_kit.competition.organs import FACTS, ORGANS
from hubmap_kit.report.drawings import COLOURS, INK, drawing, png_figure, save_png
from hubmap_kit.report.html import Block, Note, Picture, Section, Table, encode_picture, write_page
from hubmap_kit.report.tables import in_organ_order, mean_cells, text_table
from hubmap_kit.training.counts import MixtureFit

ALL = "all"
WORST = 5
COLOUR = dict(
    zip(
        SHIFTS,
        (COLOURS[0], COLOURS[4], COLOURS[3], COLOURS[2], COLOURS[5], "#8a929b", "#b59a6a", COLOURS[1]),
        strict=True,
    )
)
MARKER = dict(zip(SHIFTS, "osPDv^<X", strict=True))  # shapes tell the shifts apart where colours do not
FIT_HEADER = ("organ", "slides", "threshold", "fitted", "Dice", "fitted", "crossed, plain fit", "crossed, fit to both")


FIT_DICE = ("dice_before", "dice_same", "crossed_plain", "crossed")
IN_SAMPLE = (
    "The run's thresholds were fitted on these very slides and its epoch was chosen on them, so Dice is a little"
    " optimistic, of plain slides the most; a comparison of two runs suffers less from it."
)
LOST = (
    "Cross-fitted, thresholds fitted to both are worse than those fitted to plain slides: these slides are too few to"
    " fit to. thresholds.plain.json, copied over thresholds.json, brings the former ones back."
)


@dataclass(frozen=True)
class Results:
    """A run's name, its table (one row a slide and shift), the fit of thresholds if there was one, and notes for the
    reader.
    """

    name: str
    table: pd.DataFrame
    fits: Sequence[MixtureFit] | None
    notes: Sequence[str]

    @property
    def shifts(self) -> list[str]:
        """Those of the table, in the battery's order."""
        present = set(self.table["shift"])
        return [shift for shift in SHIFTS if shift in present]

    def means(self, column: str = "dice") -> pd.DataFrame:
        """Mean over slides, one row an organ and one for all, one column a shift."""
        by_organ = self.table.pivot_table(column, "organ", "shift", aggfunc="mean")
        by_organ.loc[ALL] = self.table.groupby("shift")[column].mean()
        return by_organ.reindex([organ for organ in (*ORGANS, ALL) if organ in by_organ.index])[self.shifts]

    def count(self, organ: str) -> int:
        """Slides of an organ, or of all."""
        plain = self.table[self.table["shift"] == PLAIN]
        return len(plain) if organ == ALL else int((plain["organ"] == organ).sum())


@dataclass(frozen=True)
class WorstSlide:
    """A slide with its Dice shifted and plain, and the file of its picture."""

    id: str
    organ: str
    source: str
    dice: float
    plain: float
    picture: Path


def worst_of(table: pd.DataFrame, shift: str) -> list[dict[str, Any]]:
    """The rows of the five slides with the lowest Dice under `shift`, with their plain Dice; of equals, the larger drop
    first.
    """
    plain = table[table["shift"] == PLAIN].set_index("id")["dice"]
    rows = table[table["shift"] == shift].assign(plain=lambda found: found["id"].map(plain))
    return rows.sort_values(["dice", "plain", "id"], ascending=[True, False, True]).head(WORST).to_dict("records")


def shift_summary(results: Results) -> str:
    """Mean Dice by organ: plain, under every shift, and the drop under the last one; what a fit of thresholds is
    worth.
    """
    means, last = results.means(), results.shifts[-1]
    rows = [
        [organ, str(results.count(organ)), *(f"{value:.4f}" for value in row), f"{row[PLAIN] - row[last]:.4f}"]
        for organ, row in means.iterrows()
    ]
    text = text_table(["held out", "slides", *results.shifts, f"drop, {last}"], rows)
    return text if results.fits is None else f"{text}\n\n{text_table(FIT_HEADER, _fit_rows(results.fits))}"


def save_shift_picture(path: Path, results: Results) -> None:
    """Write the drawing of the page as a PNG file."""
    with matplotlib.rc_context({"axes.grid": True, "axes.axisbelow": True, "grid.color": "#dddddd"}):
        figure = png_figure(*_size(results))
        _draw(figure, results)
        figure.suptitle(f"{results.name}: Dice of held-out slides, plain and shifted")
        save_png(figure, path)


def save_shift_page(path: Path, results: Results, worst: Sequence[WorstSlide]) -> None:
    """Write the page; the pictures of `worst` are read from their files and travel inside it."""
    means, last = results.means().loc[ALL], results.shifts[-1]
    lead = f"{results.count(ALL)} held-out slides: mean Dice {means[PLAIN]:.4f} as they are"
    if last != PLAIN:
        lead += f", {means[last]:.4f} under the shift {last}; {means[PLAIN] - means[last]:.4f} are lost"
    sections = [Section("Dice", _dice(results)), Section("What each shift costs", _costs(results))]
    if worst:
        sections.append(Section(f"The {len(worst)} worst slides", _pictures(worst, last)))
    if results.fits is not None:
        sections.append(Section("Thresholds for both", _fits(results.fits)))
    sections.append(Section("The shifts", [_explained(results), _sizes(), *(Note(note) for note in results.notes)]))
    write_page(path, f"{results.name} under HuBMAP's conditions", f"{lead}.", sections)


def _dice(results: Results) -> list[Block]:
    means, half, last = results.means(), results.means("dice@0.5"), results.shifts[-1]
    rows = []
    for organ, row in means.iterrows():
        values = (row[PLAIN], row[last], row[PLAIN] - row[last], half.loc[organ, PLAIN], half.loc[organ, last])
        rows.append([organ, str(results.count(organ)), *(f"{value:.4f}" for value in values)])
    header = ["organ", "slides", "plain", last, "drop", "plain, at 0.5", f"{last}, at 0.5"]
    alt = "Each organ's mean Dice, one mark a shift; a bar joins plain slides and the last shift."
    return [
        Table(header, rows, "Mean Dice of held-out slides at the run's thresholds, and at 0.5"),
        drawing(lambda figure: _draw(figure, results), _size(results), alt),
        Note(IN_SAMPLE),
    ]


def _costs(results: Results) -> list[Block]:
    others = [shift for shift in results.shifts if shift != PLAIN]
    if not others:
        return [Note("Only plain slides were asked for.")]
    rows = [
        [organ, f"{row[PLAIN]:.4f}", *(f"{row[shift] - row[PLAIN]:+.4f}" for shift in others)]
        for organ, row in results.means().iterrows()
    ]
    caption = "Mean difference of Dice from the same slides as they are, at the run's thresholds"
    return [Table(["organ", PLAIN, *others], rows, caption)]


def _size(results: Results) -> tuple[float, float]:
    return 9.5, 1.4 + 0.55 * len(results.means())


def _draw(figure: Figure, results: Results) -> None:
    axes: Axes = figure.subplots()
    means, last = results.means(), results.shifts[-1]
    rows = np.arange(len(means))
    axes.hlines(rows, means[PLAIN], means[last], color=INK, linewidth=1)
    for shift in results.shifts:
        size = 70 if shift in (PLAIN, last) else 34
        axes.scatter(means[shift], rows, s=size, color=COLOUR[shift], marker=MARKER[shift], label=shift, zorder=3)
    axes.set_yticks(rows, [f"{organ} ({results.count(organ)})" for organ in means.index])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("mean Dice of held-out slides")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def _pictures(worst: Sequence[WorstSlide], shift: str) -> list[Block]:
    said = (
        f"Lowest Dice under {shift}. Outlines: truth yellow, prediction at the run's threshold blue. Green is right,"
        " orange missed, blue wrong."
    )
    return [Note(said), *(_picture(slide, shift) for slide in worst)]


def _picture(slide: WorstSlide, shift: str) -> Picture:
    with Image.open(slide.picture) as picture:
        uri = encode_picture(picture.convert("RGB"), "JPEG")
    caption = f"{slide.organ} {slide.id} ({slide.source}): Dice {slide.plain:.4f} plain, {slide.dice:.4f} under {shift}"
    return Picture(uri, f"{caption}, with truth and prediction", caption)


def _fit_rows(fits: Sequence[MixtureFit]) -> list[list[str]]:
    rows = [
        [fit.organ, str(fit.slides), f"{fit.before:.3f}", f"{fit.threshold:.3f}", *mean_cells([fit], FIT_DICE)]
        for fit in in_organ_order(fits)
    ]
    return [*rows, [ALL, str(sum(fit.slides for fit in fits)), "", "", *mean_cells(fits, FIT_DICE)]]


def _fits(fits: Sequence[MixtureFit]) -> list[Block]:
    said = (
        f"Thresholds for plain slides and the shift {HUBMAP}, with equal weight, are the run's now (thresholds.json;"
        " the former are kept beside it). Dice is the mean over both kinds of slides. The first two figures are of the"
        " very slides that were fitted: the run's former threshold, and the new one. Crossed: every slide at a"
        " threshold that was fitted without its fold, to plain slides alone and to both; what differs there is the"
        " gain. The other figures of this page are at the former thresholds."
    )
    blocks: list[Block] = [Note(said), Table(FIT_HEADER, _fit_rows(fits))]
    return [*blocks, Note(LOST, warn=True)] if gain_of(fits) < 0 else blocks


def gain_of(fits: Sequence[MixtureFit]) -> float:
    """What fitting to both kinds of slides is worth against fitting to plain ones, cross-fitted: mean Dice over
    slides.
    """
    return float(np.average([fit.crossed - fit.crossed_plain for fit in fits], weights=[fit.slides for fit in fits]))


def _explained(results: Results) -> Table:
    rows = [[shift, IN_WORDS[shift]] for shift in results.shifts]
    return Table(["shift", "the slide"], rows, "Fixed by the slide's id and the shift's name", 2)


def _sizes() -> Table:
    rows = []
    for organ, facts in FACTS.items():
        side = round(3000 * facts.um_per_px["HPA"] / facts.um_per_px["Hubmap"])
        rows.append([organ, f"{facts.um_per_px['Hubmap']:g}", f"{facts.thickness_um['Hubmap']:g}", str(side)])
    header = ["organ", "um per pixel", "thickness, um", "side of a slide of 3000 px"]
    return Table(header, rows, "HuBMAP's slides, by the competition's data page")
