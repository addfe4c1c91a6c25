"""Overlays: truth and prediction drawn on a slide, in colours that stay apart for colour-blind readers and on stained
tissue.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from hubmap_kit.files import atomic_path

Colour = tuple[int, int, int]
Item = tuple[np.ndarray, np.ndarray | None, np.ndarray | None, str]

# Yellow and blue differ in lightness and on the blue-yellow axis, which red-green blindness keeps (after Okabe and Ito,
# 2008).
TRUTH: Colour = (255, 200, 0)
PREDICTION: Colour = (0, 90, 200)
CORRECT: Colour = (0, 158, 115)
MISSED: Colour = (230, 159, 0)
WRONG: Colour = (86, 140, 233)
TINT = 0.28
MAX_SIDE = 1600
MIN_PANEL = 400  # smaller slides are enlarged in files, so that the title and the outlines can be seen
CELL = 480
SHEET_COLUMNS = 4
MARGIN = 12
INK: Colour = (30, 30, 30)
PAPER: Colour = (255, 255, 255)


def overlay(
    image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray | None, max_side: int = MAX_SIDE
) -> np.ndarray:
    """Draw the outlines of truth (yellow) and prediction (blue) on a slide; the input stays as it is.

    With both masks given, correct pixels are tinted green, missed ones orange and wrong ones blue. The truth's outline
    runs just outside its region and the prediction's just inside, so that both are seen where they agree.

    image: `(H, W, 3)` uint8; masks: `(H, W)`, any value above 0 is foreground. Returns `(h, w, 3)` uint8: `(H, W)`, or
    smaller by one factor when the longer side exceeds `max_side` pixels. Raises ValueError for shapes that do not fit.
    """
    masks = [_checked_mask(image, mask, name) for mask, name in ((truth, "truth"), (prediction, "prediction"))]
    image, *masks = _shrink(image, masks, max_side)
    out = _tint(image, *masks)
    width = max(1, round(max(out.shape[:2]) / 300))
    kernel = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * width + 1, 2 * width + 1))
    truth_mask, prediction_mask = masks
    if truth_mask is not None:
        out[(cv2.dilate(truth_mask, kernel) > 0) & (truth_mask == 0)] = TRUTH
    if prediction_mask is not None:
        out[(cv2.erode(prediction_mask, kernel) == 0) & (prediction_mask > 0)] = PREDICTION
    return out


def save_overlay(
    path: str | Path, image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray | None, title: str
) -> None:
    """Write a PNG with the slide on the left, the overlay on the right, a one-line title above and a legend below.

    Arrays as in `overlay`; slides whose longer side is below 400 pixels are enlarged by a whole factor. The write is
    atomic.
    """
    factor = max(1, -(-MIN_PANEL // max(image.shape[:2])))
    truth, prediction = (_enlarge(mask, factor) for mask in (truth, prediction))
    image = np.asarray(_enlarge(image, factor))
    drawn = overlay(image, truth, prediction)
    plain = cv2.resize(image, drawn.shape[1::-1], interpolation=cv2.INTER_AREA)
    height, width = drawn.shape[:2]
    text = max(16, min(48, height // 32))
    top, bottom = 2 * MARGIN + text, 2 * MARGIN + text
    sheet = Image.new("RGB", (2 * width + 3 * MARGIN, height + top + bottom), PAPER)
    sheet.paste(Image.fromarray(np.ascontiguousarray(plain)), (MARGIN, top))
    sheet.paste(Image.fromarray(drawn), (width + 2 * MARGIN, top))
    _write_title(sheet, title, (MARGIN, MARGIN), sheet.width - 2 * MARGIN, text)
    _write_legend(sheet, (MARGIN, height + top + MARGIN), text, truth is not None, prediction is not None)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def contact_sheet(path: str | Path, items: Sequence[Item], columns: int = 3) -> None:
    """Write one PNG with an overlay for each `(image, truth, prediction, title)`, row by row, with one legend at the
    foot.

    The longer side of every overlay is 480 pixels. Raises ValueError when there is nothing to draw.
    """
    if not items or columns < 1:
        raise ValueError(f"a contact sheet needs items and columns, found {len(items)} items and {columns} columns")
    columns, text = min(columns, len(items)), 18
    rows = -(-len(items) // columns)
    step_x, step_y = CELL + MARGIN, CELL + text + 2 * MARGIN
    legend = text + 2 * MARGIN
    sheet = Image.new("RGB", (columns * step_x + MARGIN, rows * step_y + legend), PAPER)
    for index, (image, truth, prediction, title) in enumerate(items):
        left, top = MARGIN + index % columns * step_x, MARGIN + index // columns * step_y
        _write_title(sheet, title, (left, top), CELL, text)
        sheet.paste(_cell(image, truth, prediction), (left, top + text + MARGIN // 2))
    has_truth, has_prediction = (any(item[part] is not None for item in items) for part in (1, 2))
    _write_legend(sheet, (MARGIN, rows * step_y + MARGIN), text, has_truth, has_prediction)
    with atomic_path(path) as temporary:
        sheet.save(temporary, format="PNG")


def _checked_mask(image: np.ndarray, mask: np.ndarray | None, name: str) -> np.ndarray | None:
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
        raise ValueError(f"the image has shape {image.shape} and type {image.dtype}, expected (H, W, 3) uint8")
    if mask is None:
        return None
    if mask.shape != image.shape[:2]:
        raise ValueError(f"the {name} mask has shape {mask.shape}, expected the image's {image.shape[:2]}")
    return (mask > 0).astype(np.uint8)


def _shrink(image: np.ndarray, masks: Sequence[np.ndarray | None], max_side: int) -> list[Any]:
    """Image and masks with the longer side at most `max_side`; a mask pixel is on when half of its area is.

    The image is a copy; None stays None.
    """
    height, width = image.shape[:2]
    factor = max_side / max(height, width)
    if factor >= 1:
        return [image.copy(), *masks]
    new = max(1, round(width * factor)), max(1, round(height * factor))
    small: list[np.ndarray | None] = [cv2.resize(image, new, interpolation=cv2.INTER_AREA)]
    for mask in masks:
        covered = None if mask is None else cv2.resize(mask * np.uint8(255), new, interpolation=cv2.INTER_AREA)
        small.append(None if covered is None else (covered > 127).astype(np.uint8))
    return small


def _tint(image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray | None) -> np.ndarray:
    if truth is None or prediction is None:
        return image
    # One table look-up over the four cases keeps this at two passes over the picture.
    cases = np.array([(0, 0, 0), MISSED, WRONG, CORRECT], np.float32)
    region = truth + 2 * prediction
    share = np.where(region > 0, np.float32(TINT), np.float32(0))[..., None]
    return np.rint(image * (1 - share) + cases[region] * share).astype(np.uint8)


def _enlarge(array: np.ndarray | None, factor: int) -> np.ndarray | None:
    return array if array is None or factor == 1 else array.repeat(factor, axis=0).repeat(factor, axis=1)


def _cell(image: np.ndarray, truth: np.ndarray | None, prediction: np.ndarray | None) -> Image.Image:
    factor = max(1, -(-CELL // max(image.shape[:2])))
    truth, prediction = (_enlarge(mask, factor) for mask in (truth, prediction))
    return Image.fromarray(overlay(np.asarray(_enlarge(image, factor)), truth, prediction, max_side=CELL))


def _write_title(sheet: Image.Image, title: str, at: tuple[int, int], room: int, text: int) -> None:
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=text)
    line = " ".join(title.split())
    if draw.textlength(line, font=font) > room:
        while line and draw.textlength(line + "...", font=font) > room:
            line = line[:-1]
        line += "..."
    draw.text(at, line, fill=INK, font=font)


def _write_legend(sheet: Image.Image, at: tuple[int, int], text: int, has_truth: bool, has_prediction: bool) -> None:
    both = [("correct", CORRECT), ("missed", MISSED), ("wrong", WRONG)] if has_truth and has_prediction else []
    entries = [("truth", TRUTH)] * has_truth + [("prediction", PREDICTION)] * has_prediction + both
    draw = ImageDraw.Draw(sheet)
    names = "".join(name for name, _ in entries)
    while text > 10 and _legend_length(draw, names, len(entries), text) > sheet.width - 2 * MARGIN:
        text -= 1
    font, (x, y) = ImageFont.load_default(size=text), at
    for name, colour in entries:
        if colour in (TRUTH, PREDICTION):
            draw.rectangle((x + 1, y + 1, x + text - 1, y + text - 1), outline=colour, width=max(3, text // 6))
        else:
            faint = tuple(round(255 * (1 - TINT) + TINT * part) for part in colour)
            draw.rectangle((x, y, x + text, y + text), fill=faint)
        draw.text((x + text + 6, y - text // 8), name, fill=INK, font=font)
        x += text + 6 + int(draw.textlength(name, font=font)) + text


def _legend_length(draw: ImageDraw.ImageDraw, names: str, count: int, text: int) -> float:
    return draw.textlength(names, font=ImageFont.load_default(size=text)) + count * (2 * text + 6)


@dataclass(frozen=True)
class Shown:
    """A slide on a sheet: its id, a line above its picture, and the number by which slides are put in order."""

    id: str
    title: str
    order: float


def save_sheet(
    path: Path, slides: Sequence[Shown], read: Callable[[str], tuple[np.ndarray, np.ndarray]], most: int
) -> int:
    """Draw up to `most` of the slides, spread evenly over their order, lowest first; returns how many.

    Without any, no sheet is left.

    `read` gives the pixels (H, W, 3) and the mask (H, W) of an id; one slide is in memory at full size at a time.
    """
    chosen = spread(sorted(slides, key=lambda shown: (shown.order, shown.id)), most)
    if not chosen:
        path.unlink(missing_ok=True)  # of an earlier time
        return 0
    contact_sheet(path, [_item(*read(shown.id), shown.title) for shown in chosen], SHEET_COLUMNS)
    return len(chosen)


def spread(slides: Sequence[Shown], most: int) -> list[Shown]:
    """At most `most` of them at even distances, the first and the last among them."""
    if len(slides) <= most or most < 2:
        return list(slides[:most])
    return [slides[round(place)] for place in np.linspace(0, len(slides) - 1, most)]


def _item(pixels: np.ndarray, mask: np.ndarray, title: str) -> Item:
    """The slide with what is inside the mask in blue: an outline alone does not tell which side is meant."""
    pixels, mask = _shrink(pixels, [mask], CELL)
    blue = cv2.addWeighted(pixels, 1 - TINT, np.full_like(pixels, PREDICTION), TINT, 0)
    return np.where(mask[..., None] > 0, blue, pixels), None, mask, title
