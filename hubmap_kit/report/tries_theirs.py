"""The 26 tries that the first team published, as they gave them: 13 with MMSegmentation, 13 with fastai.

Those of MMSegmentation carry its mDice, some a leaderboard score too; those of fastai a leaderboard score alone.
Whether that is the public or the private one is not said, nor on which slides the mDice was taken: neither compares
with an out-of-fold Dice one to one.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.report.tries_columns import BY_KEY, Row, Value

FILE = "first_team.csv"
THEIRS, OURS = "theirs", "ours"


def first_team() -> list[Row]:
    """Their rows, in the order of publication, with the keys of `tries_columns`."""
    path = Path(str(resources.files("hubmap_kit") / "report" / FILE))
    return [
        {"whose": THEIRS, **{key: _value(key, cell) for key, cell in row.items()}}
        for _, row in read_rows(path, ("run", "cv", "lb"))
    ]


def _value(key: str, cell: str) -> Value:
    if not cell or not BY_KEY[key].is_number:
        return cell or None
    return int(cell) if BY_KEY[key].form == "d" else float(cell)
