"""A second opinion on submission.csv before it is handed in: own parsing, no code shared with what writes it.

What the scorer asks for is the evaluation page of hubmap-organ-segmentation: one row per test slide, columns `id,rle`,
pairs of start and length that are sorted, positive, and name no pixel twice. Runs are held to the kit's convention
(column-major, the first pixel is 0) and start 0 is refused, so an accepted file also fits a scorer that counts from 1.
"""

from __future__ import annotations

import csv
import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hubmap_kit.competition.tables import Slide, read_test
from hubmap_kit.errors import SlideError, SubmissionError

logger = logging.getLogger(__name__)

_SHOWN = 5
_WIDEST_FIELD = 2**31 - 1


@dataclass(frozen=True)
class SubmissionReport:
    """What an accepted submission holds: rows, rows with an empty mask, and the mean over rows of the covered share
    (0..1).
    """

    rows: int
    empty: int
    mean_coverage: float


def check_submission(path: str | Path, test_csv: str | Path, images_dir: str | Path | None = None) -> SubmissionReport:
    """Check a submission against its test table, as `check_rows` does; raises TableError for a bad test table."""
    return check_rows(path, read_test(test_csv, images_dir, check_files=False))


def check_rows(path: str | Path, slides: Sequence[Slide]) -> SubmissionReport:
    """Check a submission against the slides that it must answer; their sizes come from their files where these exist.

    Raises SubmissionError that counts all problems and names the first few.
    """
    path = Path(path)
    text, problems = _text(path)
    rows = _rows(text, problems)
    problems += _order_problems([row[0] for row in rows], [slide.id for slide in slides])
    by_id = {slide.id: slide for slide in slides}
    shares: list[float] = []
    for slide_id, rle in rows:
        if slide_id in by_id:
            pixels = _pixel_count(by_id[slide_id]) if rle else 1  # nothing lies outside of any slide
            covered, wrong = _covered(rle, pixels)
            problems += [f"id {slide_id} {what}" for what in wrong]
            shares.append(covered / pixels)
    if problems:
        raise SubmissionError(_sentence(path, problems))
    return SubmissionReport(rows=len(shares), empty=shares.count(0.0), mean_coverage=sum(shares) / max(1, len(shares)))


def _text(path: Path) -> tuple[str, list[str]]:
    """The file's text, and the problems of its encoding."""
    try:
        data = path.read_bytes()
    except OSError as error:
        what = error.strerror or error
        raise SubmissionError(
            f"{path} cannot be read ({what}), but a submission was expected there; write it first"
        ) from error
    problems = []
    if data.startswith(b"\xef\xbb\xbf"):
        problems.append("the file begins with a byte-order mark, so its first column is not called id")
    try:
        return data.decode("utf-8-sig"), problems
    except UnicodeDecodeError as error:
        raise SubmissionError(
            f"{path} is not text, but a CSV with the columns id,rle was expected; write it again"
        ) from error


def _rows(text: str, problems: list[str]) -> list[tuple[str, str]]:
    """The (id, rle) rows below the header; whatever is not such a row is added to `problems`."""
    before = csv.field_size_limit(_WIDEST_FIELD)  # masks may be longer than the module's 128 KiB a field
    try:
        lines = list(csv.reader(io.StringIO(text, newline="")))
    except csv.Error as error:
        problems.append(f"the file is not CSV ({error})")
        return []
    finally:
        csv.field_size_limit(before)
    header = lines[0] if lines else []
    if header != ["id", "rle"]:
        problems.append(f"the first line is {','.join(header)[:60]!r} instead of 'id,rle'")
    rows = []
    for number, fields in enumerate(lines[1:], start=2):
        if len(fields) == 2:
            rows.append((fields[0], fields[1]))
        else:
            problems.append(f"row {number} has {len(fields)} fields instead of 2")
    return rows


def _order_problems(found: Sequence[str], wanted: Sequence[str]) -> list[str]:
    problems = []
    known = set(wanted)
    seen: set[str] = set()
    for slide_id in found:
        if slide_id in seen:
            problems.append(f"id {slide_id} comes more than once")
        elif slide_id not in known:
            problems.append(f"id {slide_id!r} is not in the test table")
        seen.add(slide_id)
    problems += [f"id {slide_id} is missing" for slide_id in wanted if slide_id not in seen]
    if not problems and list(found) != list(wanted):
        first = next(pair for pair in zip(found, wanted, strict=True) if pair[0] != pair[1])
        problems.append(
            f"ids are not in the order of the test table (id {first[0]} stands where {first[1]} was expected)"
        )
    return problems


def _covered(rle: str, pixels: int) -> tuple[int, list[str]]:
    """The number of covered pixels of one mask, and what is wrong with it (at most one thing of each kind)."""
    words = rle.split(" ") if rle else []
    odd = [word for word in words if not (word.isascii() and word.isdigit() and len(word) < 1000)]
    if odd:
        return 0, [f"holds {odd[0][:20]!r} where a whole number was expected"]
    if len(words) % 2:
        return 0, [f"has an odd count of numbers ({len(words)})"]
    numbers = [int(word) for word in words]
    wrong: dict[str, str] = {}
    end = covered = 0
    last_start = -1
    for start, length in zip(numbers[0::2], numbers[1::2], strict=True):
        if start < 1:
            wrong.setdefault("start", "has start 0, but starts must be positive")
        if length < 1:
            wrong.setdefault("length", f"has length 0 at start {start}")
        if start < last_start:
            wrong.setdefault("order", f"is not sorted: start {start} comes after {last_start}")
        elif start < end:
            wrong.setdefault("twice", f"names pixel {start} twice")
        if start + length > pixels:
            wrong.setdefault("outside", f"ends at pixel {start + length}, but its slide has {pixels}")
        last_start, end = start, max(end, start + length)
        covered += length
    return covered, list(wrong.values())


def _pixel_count(slide: Slide) -> int:
    if slide.path.is_file():
        from hubmap_kit.competition import (
            slides,
        )  # reading TIFF headers needs libraries that a check against the table does not

        try:
            height, width = slides.size(slide.path)
            return height * width
        except SlideError as error:
            logger.warning("%s; its size is taken from the test table", error)
    return slide.height * slide.width


def _sentence(path: Path, problems: Sequence[str]) -> str:
    shown = ", ".join(problems[:_SHOWN])
    more = f", and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return f"{path} has {count}: {shown}{more}; mend what wrote it before handing it in"
