"""What a person gets to see of a rehearsal: a table, one sentence for each fault, report.json, and a picture of the
hidden slides.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.errors import SlideError
from hubmap_kit.files import write_json
from hubmap_kit.rehearsal.hidden import HiddenSet
from hubmap_kit.rehearsal.image import KAGGLE_PYTHON
from hubmap_kit.rehearsal.judge import Score, describe
from hubmap_kit.rehearsal.sandbox import GIB, amount
from hubmap_kit.rehearsal.steps import Step, summary
from hubmap_kit.report.overlays import contact_sheet
from hubmap_kit.report.tables import text_table

PICTURED, SIDE = 24, 960


def table(steps: Sequence[Step], must_fail: Sequence[str] = ()) -> str:
    """One line a session: seconds, memory at its peak, output at its fullest, its Python, the kernel's own word, the
    verdict.

    `must_fail` names the sessions that are there to fail.
    """
    words = {name: ", as it must" for name in must_fail}
    rows = [
        [
            step.name,
            f"{step.outcome.seconds:.0f}",
            amount(step.outcome.peak_bytes),
            amount(step.outcome.disk_bytes),
            _python(step.python),
            step.verdict.status or "-",
            "PASS" if step.verdict.passed else f"FAIL{words.get(step.name, '')}",
        ]
        for step in steps
    ]
    return text_table(["session", "seconds", "peak memory", "output", "python", "status", "verdict"], rows)


def _python(version: str) -> str:
    return version if version == KAGGLE_PYTHON else f"{version}, Kaggle has {KAGGLE_PYTHON}"


def dice_table(steps: Sequence[Step]) -> str:
    """Mean Dice of the readable hidden slides: one line an organ, one column a session that handed in masks; empty
    without any.
    """
    scored = [(step.name, describe(step.verdict.scores)) for step in steps if step.verdict.scores]
    names = [name for name in (*ORGANS, "all") if any(name in means for _, means in scored)]
    rows = [[name, *(f"{means[name]:.4f}" if name in means else "" for _, means in scored)] for name in names]
    return text_table(["hidden slides, Dice", *(name for name, _ in scored)], rows) if scored else ""


def details(steps: Sequence[Step], must_fail: Sequence[str] = ()) -> list[str]:
    """One sentence for each fault and note; notes that several sessions share come once."""
    words = {name: "found" for name in must_fail}
    lines = [
        f"{words.get(step.name, 'FAIL')} {step.name}: {problem} (log: {step.outcome.log})"
        for step in steps
        for problem in step.verdict.problems
    ]
    notes: dict[str, list[str]] = {}
    for step in steps:
        for note in step.verdict.notes:
            notes.setdefault(note, []).append(step.name)
    return [*lines, *(f"note {', '.join(names)}: {note}" for note, names in notes.items())]


def write_report(path: Path, what: str, passed: bool, steps: Sequence[Step], extra: dict[str, Any]) -> None:
    """Everything that the table says and more, as JSON."""
    facts = {
        "what": what,
        "passed": passed,
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1),
        },
        "steps": [summary(step) for step in steps],
        **extra,
    }
    write_json(path, facts)


def picture(path: Path, hidden: HiddenSet, scores: Sequence[Score]) -> None:
    """A sheet of the hidden slides with truth and prediction; those that cannot be read are grey."""
    items = []
    for slide, each in list(zip(hidden.slides, scores, strict=True))[:PICTURED]:
        fault = f", {slide.fault}" if slide.fault else ""
        word = "unreadable" if each.unreadable else f"Dice {each.dice:.2f}"
        items.append(
            (*_shown(hidden, each), f"{slide.organ} {slide.height} x {slide.width} ({slide.source}{fault}), {word}")
        )
    contact_sheet(path, items, columns=4)


def _shown(hidden: HiddenSet, each: Score) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Slide, truth and prediction, small enough that a sheet of large slides fits into memory."""
    try:
        pixels = slide_files.read(hidden.folder / "test_images" / f"{each.id}.tiff")
    except SlideError:
        return np.full((SIDE // 2, SIDE // 2, 3), 200, np.uint8), None, None
    height, width = pixels.shape[:2]
    masks = [rle.decode(text, height, width) for text in (hidden.truth[each.id], each.rle)]
    factor = SIDE / max(height, width)
    if factor < 1:
        size = max(1, round(width * factor)), max(1, round(height * factor))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        masks = [cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) for mask in masks]
    return pixels, masks[0], masks[1]
