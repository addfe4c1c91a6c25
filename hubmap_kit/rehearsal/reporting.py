"""What a person sees of a rehearsal: tables, a sentence for each fault, report.json, a picture of the hidden slides."""

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
from hubmap_kit.rehearsal.hidden import HiddenSet, Score
from hubmap_kit.rehearsal.image import KAGGLE_PYTHON
from hubmap_kit.rehearsal.judge import amount
from hubmap_kit.rehearsal.sandbox import GIB
from hubmap_kit.rehearsal.steps import Step, step_summary
from hubmap_kit.report.overlays import contact_sheet
from hubmap_kit.report.tables import text_table

PICTURED, SIDE = 24, 960


def session_table(steps: Sequence[Step], must_fail: Sequence[str] = ()) -> str:
    """One line a session: seconds, peaks of memory and output, its Python, the kernel's own status, the verdict.

    `must_fail` names the sessions with a planted fault.
    """
    rows = []
    for step in steps:
        other = "" if step.python == KAGGLE_PYTHON else f", Kaggle has {KAGGLE_PYTHON}"
        fail = "FAIL, as it must" if step.name in must_fail else "FAIL"
        rows.append(
            [
                step.name,
                f"{step.outcome.seconds:.0f}",
                amount(step.outcome.peak_bytes),
                amount(step.outcome.disk_bytes),
                f"{step.python}{other}",
                step.verdict.status or "-",
                "PASS" if step.verdict.passed else fail,
            ]
        )
    return text_table(["session", "seconds", "peak memory", "output", "python", "status", "verdict"], rows)


def dice_table(steps: Sequence[Step]) -> str:
    """Mean Dice of the readable hidden slides: one line an organ, one column a session with masks; "" without any."""
    scored = [(step.name, step.verdict.dice) for step in steps if step.verdict.scores]
    names = [name for name in (*ORGANS, "all") if any(name in means for _, means in scored)]
    rows = [[name, *(f"{means[name]:.4f}" if name in means else "" for _, means in scored)] for name in names]
    return text_table(["hidden slides, Dice", *(name for name, _ in scored)], rows) if scored else ""


def problem_lines(steps: Sequence[Step], must_fail: Sequence[str] = ()) -> list[str]:
    """One sentence for each fault and note; a note that several sessions share comes once."""
    lines = []
    notes: dict[str, list[str]] = {}
    for step in steps:
        word = "found" if step.name in must_fail else "FAIL"
        lines += [f"{word} {step.name}: {problem} (log: {step.outcome.log})" for problem in step.verdict.problems]
        for note in step.verdict.notes:
            notes.setdefault(note, []).append(step.name)
    return [*lines, *(f"note {', '.join(names)}: {note}" for note, names in notes.items())]


def write_report(path: Path, what: str, steps: Sequence[Step], wrong: Sequence[str]) -> None:
    """Everything that the table says and more, as JSON."""
    facts: dict[str, Any] = {
        "what": what,
        "passed": not wrong,
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpus": os.cpu_count(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB, 1),
        },
        "steps": [step_summary(step) for step in steps],
        "wrong": wrong,
    }
    write_json(path, facts)


def draw_hidden(path: Path, hidden: HiddenSet, steps: Sequence[Step]) -> Path | None:
    """A sheet of the hidden slides with truth and the last scored prediction; unreadable ones are grey.

    Returns None where nothing was scored.
    """
    scores = next((step.verdict.scores for step in reversed(steps) if step.verdict.scores), [])
    items = []
    for each in scores[:PICTURED]:
        slide = each.slide
        fault = f", {slide.fault}" if slide.fault else ""
        word = "unreadable" if slide.unreadable else f"Dice {each.dice:.2f}"
        title = f"{slide.organ} {slide.height} x {slide.width} ({slide.source}{fault}), {word}"
        items.append((*_thumbnails(hidden, each), title))
    if not items:
        return None
    contact_sheet(path, items, columns=4)
    return path


def _thumbnails(hidden: HiddenSet, each: Score) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Slide, truth and prediction, small enough that a sheet of large slides fits into memory."""
    try:
        pixels = slide_files.read(hidden.folder / "test_images" / f"{each.slide.id}.tiff")
    except SlideError:
        return np.full((SIDE // 2, SIDE // 2, 3), 200, np.uint8), None, None
    height, width = pixels.shape[:2]
    masks: list[np.ndarray] = [rle.decode(text, height, width) for text in (hidden.truth[each.slide.id], each.rle)]
    factor = SIDE / max(height, width)
    if factor < 1:
        size = max(1, round(width * factor)), max(1, round(height * factor))
        pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)
        masks = [cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST) for mask in masks]
    return pixels, masks[0], masks[1]
