"""Whether a training session went on where the one before it had stopped, by what the two left behind."""

from __future__ import annotations

from pathlib import Path

from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.errors import TableError

TIMING, METRICS = "timing.csv", "metrics.csv"


def not_resumed(before: Path, after: Path, further: bool = False) -> list[str]:
    """What speaks against it, one sentence a fold; both are folders of one run, and `before` must hold an epoch at
    least.

    What each epoch took tells: training twice on a CPU gives the same losses, but not the same seconds and tiles a
    second. With `further` the later session must have added something.
    """
    begun = [folder.name for folder in _folds(before) if _rows(folder, TIMING)]
    if not begun:
        return [
            f"the former session left no finished epoch in {before}, so nothing shows that this one went on with it"
        ]
    problems = [problem for fold in begun for problem in _fold(before / fold, after / fold)]
    if not problems:
        problems = [problem for folder in _folds(after) for problem in _counted(folder)]
    if not problems and further and _epochs(after) <= _epochs(before):
        problems = [f"no epoch came to those of the former session in {before}"]
    return problems


def _fold(before: Path, after: Path) -> list[str]:
    """A fold of the former session must stand in the later one row by row."""
    for name in (TIMING, METRICS):
        old, new = _rows(before, name), _rows(after, name)
        if len(new) < len(old):
            return [
                f"{after.name}/{name} holds {len(new)} epochs, but the former session had finished {len(old)}: they"
                " were not kept"
            ]
        for epoch, (one, two) in enumerate(zip(old, new, strict=False), start=1):
            odd = next((column for column in one if one[column] != two.get(column)), "")
            if odd:
                other = f"{odd} {two.get(odd, 'nothing')}, in the former session {one[odd]}"
                return [f"{after.name}/{name} says of epoch {epoch} {other}: it was trained again instead of kept"]
    return []


def _counted(fold: Path) -> list[str]:
    """Epochs count 1, 2, 3, ...: none was left out, and none came twice."""
    epochs = [row.get("epoch", "") for row in _rows(fold, TIMING)]
    wanted = [str(number) for number in range(1, len(epochs) + 1)]
    return (
        []
        if epochs == wanted
        else [f"{fold.name}/{TIMING} counts the epochs {', '.join(epochs)}, expected {', '.join(wanted)}"]
    )


def _epochs(run: Path) -> int:
    return sum(len(_rows(fold, TIMING)) for fold in _folds(run))


def _folds(run: Path) -> list[Path]:
    return sorted(run.glob("fold[0-9]*"))


def _rows(fold: Path, name: str) -> list[dict[str, str]]:
    """The rows without the columns that are empty: a later session may have added some."""
    try:
        found = read_rows(fold / name, ("epoch",))
    except TableError:
        return []
    return [{column: text for column, text in row.items() if text} for _, row in found]
