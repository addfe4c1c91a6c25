"""Errors a user can act on.

Each message is one sentence: the file or key, what was found, what was expected, what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class HubmapError(Exception):
    """Base of every error that the command line prints as one line, without a traceback."""


class ConfigError(HubmapError):
    """An experiment file or a `--set` override is wrong."""


class TableError(HubmapError):
    """train.csv, test.csv, a fold table or another table is wrong."""


class SlideError(HubmapError):
    """A slide file is missing, truncated, or not an image that the kit reads."""


class RleError(HubmapError):
    """A run-length string is malformed or does not fit its slide."""


class SubmissionError(HubmapError):
    """A submission.csv would be refused by the scorer."""


class StoreError(HubmapError):
    """A tile store is missing, incomplete, or was made for other data."""


class WeightsError(HubmapError):
    """A weights file does not exist or does not fit its network."""


class CheckpointError(HubmapError):
    """A run folder or a checkpoint is missing, damaged, or belongs to another experiment."""


class KernelError(HubmapError):
    """A kernel cannot start or go on: its inputs, its bundle or its accelerator are not what it was pushed for."""


class PublishError(HubmapError):
    """Something would not go up to Kaggle as it must, or Kaggle did not take it."""


class RehearsalError(HubmapError):
    """A rehearsal cannot be set up on this machine, or the kernel failed it."""


# What to do where the memory of a device does not suffice.
LESS_MEMORY = "lower training.batch_size, inference.batch_size or tiles.size with --set"


def finding(error: object) -> str:
    """What the sentence of an error says was found, without the advice after its first semicolon: for a warning that
    goes on with its own.
    """
    return str(error).partition(";")[0]


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """The end of an error that names the known word closest to a misspelt one, or nothing when none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean '{prefix}{close[0]}'?" if close else ""
