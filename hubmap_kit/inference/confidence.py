"""How sure an ensemble is of one slide, in four numbers, and the rules by which a mask of its own may teach others."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from types import MappingProxyType
from typing import Any

import cv2
import numpy as np

from hubmap_kit.competition import rle
from hubmap_kit.tiles.background import tissue_map

# Half of the smallest and twice the largest share of a slide that the masks of the competition's 351 training slides
# cover.
COVERAGE: Mapping[str, tuple[float, float]] = MappingProxyType(
    {
        "kidney": (0.0016, 0.16),
        "prostate": (0.005, 0.86),
        "largeintestine": (0.01, 0.70),
        "spleen": (0.004, 0.69),
        "lung": (0.0004, 0.18),
    }
)


@dataclass(frozen=True)
class Scores:
    """`confidence` 0..0.5: mean distance of the probability from 0.5 within the tissue, NaN without tissue; `inside`
    0..1: mean probability within the mask, NaN of an empty one; `agreement` 0..1: mean Dice of every two folds' masks,
    NaN of a single fold; `coverage` 0..1: share of the slide that the mask covers.
    """

    confidence: float
    inside: float
    agreement: float
    coverage: float


@dataclass(frozen=True)
class Rules:
    """What a slide must reach; `coverage` gives the least and the most for each organ.

    `inside` is there because thresholds are fitted: a network that says 0.05 nearly everywhere is far from 0.5 nearly
    everywhere, and with a threshold of 0.04 its noise is a mask. The defaults of `confidence`, `inside` and `agreement`
    are a careful start, not fitted to anything: look at the contact sheets.
    """

    confidence: float = 0.35
    inside: float = 0.5
    agreement: float = 0.8
    coverage: Mapping[str, tuple[float, float]] = field(default_factory=lambda: COVERAGE)

    def plain(self) -> dict[str, Any]:
        """The rules as plain values, for JSON."""
        bounds = {organ: list(pair) for organ, pair in sorted(self.coverage.items())}
        return {"confidence": self.confidence, "inside": self.inside, "agreement": self.agreement, "coverage": bounds}

    def reasons(self, organ: str, scores: Scores) -> list[str]:
        """Why a slide is refused, a few words a rule; nothing where it is kept.

        One fold alone is not asked for its agreement.
        """
        least, most = self.coverage[organ]
        found = []
        if math.isnan(scores.confidence):
            found.append("no tissue")
        elif scores.confidence < self.confidence:
            found.append(f"confidence {scores.confidence:.3f} below {self.confidence:g}")
        if scores.inside < self.inside:
            found.append(f"probability inside {scores.inside:.3f} below {self.inside:g}")
        if scores.agreement < self.agreement:
            found.append(f"agreement {scores.agreement:.3f} below {self.agreement:g}")
        if scores.coverage < least:
            found.append(f"coverage {scores.coverage:.2%} below {least:.2%}")
        if scores.coverage > most:
            found.append(f"coverage {scores.coverage:.2%} above {most:.2%}")
        return found


def confidence(plane: np.ndarray, pixels: np.ndarray) -> float:
    """Mean |p - 0.5| of a plane (H, W) within the tissue of its slide (H, W, 3) uint8; NaN where there is none."""
    cells = tissue_map(pixels).cells
    sure = cv2.resize(np.abs(plane - np.float32(0.5)), cells.shape[::-1], interpolation=cv2.INTER_AREA)
    return float(sure[cells > 0].mean()) if cells.any() else math.nan


def inside(plane: np.ndarray, mask: np.ndarray) -> float:
    """Mean probability of a plane (H, W) within a mask (H, W); NaN where it is empty."""
    return float(plane[mask > 0].mean(dtype=np.float64)) if mask.any() else math.nan


def agreement(masks: Sequence[rle.Runs]) -> float:
    """Mean Dice of every two masks of one slide; NaN of fewer than two."""
    pairs = [rle.dice(one, other) for one, other in combinations(masks, 2)]
    return float(np.mean(pairs)) if pairs else math.nan
