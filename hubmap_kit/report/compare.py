"""Comparing runs: the settings that differ, and the Dice of the same slides under each of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from hubmap_kit.competition.organs import ORGANS

LEVEL = 0.95
DRAWS = 9999
ALL = "all"
UNSET = "(not set)"


@dataclass(frozen=True)
class Difference:
    """The mean of paired differences over `slides` slides, and its bootstrap interval; no interval for a single
    slide.
    """

    mean: float
    low: float | None
    high: float | None
    slides: int

    def __str__(self) -> str:
        return f"{self.mean:+.4f}" + (f" [{self.low:+.4f}, {self.high:+.4f}]" if self.low is not None else "")


def pairs(first: pd.DataFrame, other: pd.DataFrame) -> pd.DataFrame:
    """The slides that both out-of-fold tables have: id, organ, data_source, first, other, difference (other - first);
    the worst first.

    Equal differences are in the order of the ids, so that the table does not depend on the order of the files.
    """
    keys = ["id", "organ", "data_source"]  # another data folder may have the same ids
    both = first[[*keys, "dice"]].merge(other[[*keys, "dice"]], on=keys, suffixes=("_first", "_other"))
    both = both.rename(columns={"dice_first": "first", "dice_other": "other"})
    both["difference"] = both["other"] - both["first"]
    return both.sort_values(["difference", "id"], ignore_index=True)


def difference(values: Sequence[float] | np.ndarray | pd.Series, seed: int = 0) -> Difference:
    """Mean and percentile bootstrap interval of paired differences, at least one.

    Slides are drawn as if independent of each other.
    """
    values = np.asarray(values, float)
    mean = float(values.mean())
    if len(values) < 2:
        return Difference(mean, None, None, len(values))
    drawn = bootstrap(
        (values,),
        np.mean,
        n_resamples=DRAWS,
        confidence_level=LEVEL,
        method="percentile",
        random_state=seed,
        batch=1000,
    )
    return Difference(mean, float(drawn.confidence_interval.low), float(drawn.confidence_interval.high), len(values))


def by_organ(paired: pd.DataFrame) -> dict[str, Difference]:
    """The difference of each organ, in their usual order, and of all slides; empty without a common slide."""
    groups = {organ: paired.loc[paired["organ"] == organ, "difference"] for organ in ORGANS}
    groups |= {ALL: paired["difference"]}
    return {name: difference(values) for name, values in groups.items() if len(values)}


def dice_by_organ(table: pd.DataFrame) -> dict[str, tuple[float, int]]:
    """Mean Dice and number of slides of each organ and of all slides."""
    groups = {organ: table.loc[table["organ"] == organ, "dice"] for organ in ORGANS} | {ALL: table["dice"]}
    return {name: (float(values.mean()), len(values)) for name, values in groups.items() if len(values)}


def same_split(first: pd.DataFrame, other: pd.DataFrame) -> bool:
    """Whether two runs held the same slides out together, however their folds are numbered; as far as their tables
    tell.
    """
    both = first[["id", "fold"]].merge(other[["id", "fold"]], on="id", suffixes=("_first", "_other"))
    kinds = both[["fold_first", "fold_other"]].drop_duplicates()
    return kinds["fold_first"].is_unique and kinds["fold_other"].is_unique


def differing(values: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """The keys of nested dictionaries that are not the same in all of them: dotted key -> each one's value as text."""
    flat = [dict(_flatten(each)) for each in values]
    keys = dict.fromkeys(key for each in flat for key in each)
    rows = {key: [_shown(each[key]) if key in each else UNSET for each in flat] for key in keys}
    return {key: row for key, row in rows.items() if len(set(row)) > 1}


def _flatten(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        elif not isinstance(value, Mapping):
            yield f"{prefix}{key}", value


def _shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    return ", ".join(_shown(each) for each in value) if isinstance(value, list | tuple) else str(value) or "(empty)"
