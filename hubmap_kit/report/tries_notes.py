"""tries.json in a run folder: what a person typed in about the run, scores of the leaderboard, a submission's number, a
note.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from hubmap_kit.errors import TableError
from hubmap_kit.files import write_json
from hubmap_kit.report.ledger import locked

NOTES = "tries.json"
SCORES = ("public", "private")


def read_notes(run: Path) -> dict[str, Any]:
    """What is kept of a run; empty where nothing was typed in. Raises TableError for a damaged file."""
    path = run / NOTES
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise TableError(
            f"{path} is damaged ({str(error)[:80]}); mend it, or delete it and type its scores in again"
        ) from error
    wrong = _wrong(found)
    if wrong:
        raise TableError(f"{path} {wrong}; mend it, or delete it and type its scores in again")
    return found


def keep_notes(run: Path, scores: str = "", note: str | None = None, ref: str = "") -> dict[str, Any]:
    """Set what is given, keep the rest, and return all of it.

    `scores` is 'public=0.61,private=0.58' or one of the two; an empty value takes a score away, an empty note the note.
    `ref` is the number of the submission at Kaggle, which finds its row in a ledger.csv that does not name the run.
    Raises TableError for words that are no scores, a folder that is no run, and a damaged tries.json, which is left as
    it is.
    """
    changes: dict[str, Any] = dict(parse_scores(scores))
    if note is not None:
        changes["note"] = " ".join(note.split()) or None
    if ref:
        changes["ref"] = ref.strip()
    if not (run / "config.yaml").is_file():
        raise TableError(f"{run} is no run folder (it has no config.yaml); name the run that the score belongs to")
    with locked(run / NOTES):
        kept = {key: value for key, value in {**read_notes(run), **changes}.items() if value is not None}
        write_json(run / NOTES, kept)
    return kept


def parse_scores(words: str) -> dict[str, float | None]:
    """Scores by their name; None for one that is to be taken away. Raises TableError for anything else."""
    found: dict[str, float | None] = {}
    for word in filter(None, (part.strip() for part in words.split(","))):
        name, equals, value = (part.strip() for part in word.partition("="))
        if not equals or name not in SCORES or name in found:
            raise TableError(f"--score has '{word}'; expected public=0.61,private=0.58 or one of the two")
        found[name] = _score(word, value) if value else None
    return found


def _score(word: str, value: str) -> float:
    try:
        score = float(value)
    except ValueError:
        score = math.nan
    if not 0 <= score <= 1:
        raise TableError(f"--score has '{word}'; a score of the leaderboard is a number from 0 to 1")
    return score


def _wrong(found: Any) -> str:
    """What is wrong with the content of a file, or nothing."""
    if not isinstance(found, dict):
        return f"holds a {type(found).__name__}, but names and values were expected"
    for name in SCORES:
        value = found.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1):
            return f"says {name} = {value!r}, but a number from 0 to 1 was expected"
    texts = [name for name in ("note", "ref") if not isinstance(found.get(name, ""), str)]
    return f"says {texts[0]} = {found[texts[0]]!r}, but text was expected" if texts else ""
