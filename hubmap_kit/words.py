"""What verbs have in common on the command line: the exit code of Ctrl-C, and words that stand for numbers."""

from __future__ import annotations

from collections.abc import Sequence

from hubmap_kit.errors import ConfigError, HubmapError

INTERRUPTED = 130  # what typer makes of Ctrl-C


def fold_numbers(text: str) -> list[int] | None:
    """The numbers of `--folds`, such as "0,2"; None for an empty text, which means all.

    Raises HubmapError for anything else.
    """
    try:
        return [int(part) for part in text.split(",")] if text else None
    except ValueError as error:
        raise HubmapError(f"--folds is '{text}'; expected numbers such as 0,2") from error


def check_folds(numbers: Sequence[int], count: int) -> None:
    """Raise ConfigError for a fold that an experiment with `count` folds does not have."""
    wrong = [number for number in numbers if not 0 <= number < count]
    if wrong:
        raise ConfigError(
            f"fold {wrong[0]} was asked for, but data.n_folds is {count}; choose among {list(range(count))} with"
            " --folds"
        )
