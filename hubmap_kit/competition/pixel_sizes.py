"""Whether the pixel sizes of a table can be true: against what the slide files state, and against how much tissue a
slide can show.

Nothing here is an error, and the table is believed wherever somebody can mend it: the competition's slides are what
counts, and a tag of a file may be left over from another size of it. But a slide from elsewhere with a wrong pixel size
is learnt or predicted at a wrong scale without a word.
"""

from __future__ import annotations

import logging

from hubmap_kit.competition.slides import MICROSCOPIC_UM, stated_um_per_px
from hubmap_kit.competition.tables import Slide

log = logging.getLogger(__name__)
APART = 1.2  # times larger or smaller than the table says: less may be rounding, or a file that was resampled a little
EXTENT_MM = (
    0.1,
    5.0,
)  # of a slide's longer side; the competition's are 1.0 to 1.4 (3000 px of 0.4 um, 4500 of 0.229, 160 of 6.263)
MOST_LINES = 5


def odd_extent(slide: Slide, height: int, width: int) -> str:
    """What is odd about `height` x `width` pixels of the table's size, in words; "" where they show 0.1 to 5 mm."""
    extent = max(height, width) * slide.um_per_px / 1000
    if EXTENT_MM[0] <= extent <= EXTENT_MM[1]:
        return ""
    return (
        f"{height} x {width} px of {slide.um_per_px:g} um are {extent:.2g} mm of tissue, where the competition's slides"
        " show about 1 mm"
    )


def odd_file(slide: Slide) -> str:
    """What is odd about the size that the slide's file states for its pixels, in words; "" where it states none or
    nearly the table's.

    Only the file's header is read. A file that is damaged or missing says nothing here.
    """
    stated = stated_um_per_px(slide.path)
    if stated is None or slide.um_per_px / APART <= stated <= slide.um_per_px * APART:
        return ""
    return (
        f"the table says {slide.um_per_px:g} um a pixel, {slide.path.name} says {stated:.4g} um; the table is believed"
    )


def believable_um(stated: float, usual: float, longer_side: int) -> float:
    """`stated`, the pixel size in um that a table gives, where tissue can have it; else `usual`, the organ's own.

    Tissue cannot where no microscope makes such pixels, and where the slide's `longer_side` (pixels; 1: not known)
    would show less than 0.1 or more than 5 mm, while `usual` is not half or twice as large either. For a table that
    nobody can mend.
    """
    least, most = (1000 * extent / longer_side if longer_side > 1 else stated for extent in EXTENT_MM)
    microscopic = MICROSCOPIC_UM[0] <= stated <= MICROSCOPIC_UM[1]
    return stated if microscopic and min(least, usual / 2) <= stated <= max(most, usual * 2) else usual


class PixelSizeWatch:
    """Warns of odd pixel sizes, each slide once, in a few lines for all of them."""

    def __init__(self) -> None:
        self._odd: dict[str, str] = {}

    def look(self, slide: Slide, height: int, width: int) -> None:
        """Warn where the pixel size of a slide of `height` x `width` pixels, which its file has, cannot be true.

        Raises nothing.
        """
        found = "; ".join(filter(None, (odd_file(slide), odd_extent(slide, height, width))))
        if not found or slide.id in self._odd:
            return
        self._odd[slide.id] = found
        if len(self._odd) <= MOST_LINES:
            log.warning("pixel_size of slide %s (%s of %s): %s", slide.id, slide.organ, slide.source, found)
        elif len(self._odd) == MOST_LINES + 1:
            log.warning("pixel_size of more slides is odd; 'hubmap eda' lists those of a train.csv")
