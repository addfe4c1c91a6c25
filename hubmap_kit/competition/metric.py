"""The competition's Dice: the mean over slides of 2 |P and T| / (|P| + |T|), 1 where prediction and truth are both
empty.

Source: the evaluation page of hubmap-organ-segmentation. Libraries disagree on empty masks, so the kit has this one
definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt


def dice(prediction: npt.NDArray[Any], truth: npt.NDArray[Any]) -> float:
    """Dice of two masks (H, W) of any type, nonzero = inside; 1 when both are empty.

    Raises ValueError when the shapes differ.
    """
    prediction, truth = np.asarray(prediction), np.asarray(truth)
    if prediction.shape != truth.shape:
        raise ValueError(
            f"prediction has shape {prediction.shape} but truth has {truth.shape}; bring both to the slide's size"
        )
    inside, wanted = prediction != 0, truth != 0
    return float(
        dice_from_counts(np.count_nonzero(inside & wanted), np.count_nonzero(inside), np.count_nonzero(wanted))
    )


def dice_from_counts(tp: npt.ArrayLike, predicted: npt.ArrayLike, truth: npt.ArrayLike) -> npt.NDArray[np.float64]:
    """Dice from pixel counts of any one broadcastable shape: common pixels, predicted pixels, true pixels; 1 where both
    are 0.

    Counts of the tiles of one slide may be added up before this call; the Dice of several slides may not be pooled so.
    """
    tp, predicted, truth = (np.asarray(count, dtype=np.float64) for count in (tp, predicted, truth))
    total = predicted + truth
    return np.where(total == 0, 1.0, 2.0 * tp / np.where(total == 0, 1.0, total))


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean Dice over slides for "all", for each organ and for each source that occurs.

    `rows` has one mapping a slide with the keys `organ`, `source` and `dice`. Returns name -> {"dice": mean, "n":
    slides}; without rows, "all" is NaN with n = 0.
    """
    groups: dict[str, list[float]] = {"all": [row["dice"] for row in rows]}
    for key in ("organ", "source"):
        for row in rows:
            groups.setdefault(row[key], []).append(row["dice"])
    return {
        name: {"dice": float(np.mean(scores)) if scores else float("nan"), "n": len(scores)}
        for name, scores in groups.items()
    }
