"""The columns of the list of tries: what each is called, how its values are written, and where it is shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.organs import ORGANS

Value = str | float | int | None
Row = dict[str, Value]
RESULTS, SETTINGS, RECORD = "results", "settings", "record"
SCORE = "score"  # two decimals, as people pass scores on, to five, as Kaggle gives them


@dataclass(frozen=True)
class Column:
    """One column.

    `form` is how a number is written, empty for text; `down`: the largest value comes first when the list is sorted by
    it.

    `short` heads it in the terminal, where it is at most `widest` characters wide.
    """

    key: str
    title: str
    group: str
    form: str = ""
    short: str = ""
    widest: int = 24
    down: bool = False

    @property
    def is_number(self) -> bool:
        """Whether it holds numbers."""
        return bool(self.form)

    @property
    def head(self) -> str:
        """Its name in the terminal."""
        return self.short or self.title


_SHORT_ORGANS = {"kidney": "kidn", "prostate": "pros", "largeintestine": "lint", "spleen": "sple", "lung": "lung"}
COLUMNS: tuple[Column, ...] = (
    Column("run", "run", RESULTS, widest=22),
    Column("whose", "whose", RESULTS),
    Column("model", "model", RESULTS, widest=12),
    Column("encoder", "encoder", RESULTS, widest=20),
    Column("state", "state", RECORD, widest=40),
    Column("measured", "Dice is", RECORD, widest=40),
    Column("cv", "Dice", RESULTS, ".4f", short="Dice", down=True),
    *(Column(organ, organ, RESULTS, ".3f", short=_SHORT_ORGANS[organ], down=True) for organ in ORGANS),
    Column("lb", "LB", RESULTS, SCORE, down=True),
    Column("public", "public", RECORD, SCORE, down=True),
    Column("private", "private", RESULTS, SCORE, short="priv", down=True),
    Column("submissions", "submissions", RECORD, "d", down=True),
    Column("hours", "hours", RESULTS, ".2f", down=True),
    Column("parameters", "M parameters", RESULTS, ".2f", short="par,M", down=True),
    Column("conversion", "conversion", SETTINGS, short="scale", widest=14),
    Column("augment", "augmentation", SETTINGS, widest=14),
    Column("engine", "engine", SETTINGS),
    Column("mixing", "mixing", SETTINGS),
    Column("stain", "stain", SETTINGS),
    Column("loss", "loss", SETTINGS, widest=14),
    Column("optimizer", "optimiser", SETTINGS, short="optim"),
    Column("schedule", "schedule", SETTINGS),
    Column("classes", "classes", SETTINGS),
    Column("auxiliary", "auxiliary losses", SETTINGS),
    Column("start", "encoder's start", SETTINGS),
    Column("size", "tile", SETTINGS, "d", short="px"),
    Column("overlap", "overlap", SETTINGS, "g"),
    Column("lr", "lr", SETTINGS, "g"),
    Column("epochs", "epochs", SETTINGS, "d", short="ep"),
    Column("iterations", "iterations", SETTINGS, "d"),
    Column("batch", "batch", SETTINGS, "d", short="bs"),
    Column("accumulate", "accumulate", SETTINGS, "d"),
    Column("seed", "seed", SETTINGS, "d"),
    Column("done", "folds", RESULTS),
    Column("begun", "begun", RECORD),
    Column("machine", "machine", RECORD, widest=20),
    Column("thresholds", "thresholds", RECORD, widest=30),
    Column("submitted", "submitted", RECORD),
    Column("git", "commit", RECORD, widest=9),
    Column("build", "build", RECORD, widest=12),
    Column("note", "note", SETTINGS, widest=40),
    Column("path", "folder", RECORD, widest=40),
    Column("epoch_s", "epoch, s", RECORD, ".3g"),
)
BY_KEY: Mapping[str, Column] = {column.key: column for column in COLUMNS}


def text(column: Column, value: Value) -> str:
    """A value as it is shown; empty where it is not known."""
    if value is None or value == "":
        return ""
    if not column.is_number or isinstance(value, str):
        return str(value)
    if column.form == SCORE:
        whole, digits = f"{value:.5f}".split(".")
        return f"{whole}.{digits[:2]}{digits[2:].rstrip('0')}"
    return format(int(value), "d") if column.form == "d" else format(value, column.form)


# The 26 tries that the first team published, as they gave them: 13 with MMSegmentation, 13 with fastai.

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
