"""Test-time stain normalisation: a slide once more in the colours of the slides that the networks have learnt from.

A run keeps stain_references.json (written by training.stain_record): for each organ the colour statistics of one of its
training slides, and of a second one, from another fold, for the networks of the fold that holds the first one out. They
are numbers about colours alone: no pixel, no shape and no label travels with them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hubmap_kit.augment.stain import TRANSFERS, Reference
from hubmap_kit.competition.organs import ORGANS, SOURCES
from hubmap_kit.config import InferenceConfig
from hubmap_kit.errors import CheckpointError

log = logging.getLogger(__name__)
STAIN_FILE = "stain_references.json"
FORMAT = 1
DIGITS = 7  # behind the point
SHAPES: dict[str, tuple[int, ...]] = {
    "vectors": (2, 3),
    "strengths": (2,),
    "mean": (3,),
    "std": (3,),
    "shares": (3, 256),
}


def is_normalised(source: str) -> bool:
    """Whether slides of a source are normalised: all but HPA's, which look like the training slides.

    One that is not told is left alone.
    """
    return source not in ("", SOURCES[0])


def restained(image: np.ndarray, reference: Reference, methods: Sequence[str]) -> Iterator[np.ndarray]:
    """The picture (h, w, 3) uint8 in the colours of `reference`, by each of `methods`, one in memory at a time.

    A method that leaves the picture as it is (too little tissue, one stain only) gives none: it would be the raw view
    again. A method takes up to about 50 bytes a pixel while it works, so bring slides to the network's scale first.
    """
    for method in methods:
        changed = TRANSFERS[method](image, reference)
        if changed is image or np.array_equal(changed, image):
            log.debug("%s leaves a slide of %d x %d px as it is", method, *image.shape[:2])
            continue
        yield changed


def references_of(run: Path, config: InferenceConfig, held_out: int | None = None) -> dict[str, Reference]:
    """The references of a run by organ, as far as `config` needs any.

    For the network of one fold, give its number as `held_out`.

    A fold is never judged with colours of a slide that it holds out: the second reference stands in, or none, and then
    that organ is left out. Raises CheckpointError when the file is missing or damaged.
    """
    return read_references(run, held_out) if config.normalise else {}


def read_references(run: Path, held_out: int | None = None) -> dict[str, Reference]:
    """The references in a run's stain_references.json, see `references_of`."""
    path = run / STAIN_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {values['format']}, not {FORMAT}")
        found = {
            organ: [(int(entry["fold"]), _parsed(entry)) for entry in values["organs"][organ]]
            for organ in ORGANS
            if organ in values["organs"]
        }
    except FileNotFoundError as error:
        advice = f"'hubmap evaluate {run}' writes it, where the run's training slides are"
        raise CheckpointError(f"{path} is missing, but inference.normalise needs it; {advice}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); delete it, 'hubmap evaluate {run}' writes it anew"
        ) from error
    usable = {organ: [reference for fold, reference in entries if fold != held_out] for organ, entries in found.items()}
    return {organ: references[0] for organ, references in usable.items() if references}


def as_plain(reference: Reference, fold: int) -> dict[str, Any]:
    """What stain_references.json keeps of a reference, whose name is its slide's id; `fold` is the one that holds it
    out.
    """
    return {"slide": reference.name, "fold": fold} | {
        key: np.round(getattr(reference, key), DIGITS).tolist() for key in SHAPES
    }


def digest_words(references: Mapping[str, Reference]) -> list[object]:
    """What predictions with these references depend on, as plain values to be hashed."""
    return [[organ, as_plain(reference, 0)] for organ, reference in sorted(references.items())]


def _parsed(entry: Mapping[str, Any]) -> Reference:
    arrays = {key: np.array(entry[key], np.float64) for key in SHAPES}
    for key, shape in SHAPES.items():
        if arrays[key].shape != shape or not np.isfinite(arrays[key]).all():
            raise ValueError(f"{key} are not {shape} numbers")
    shares = arrays["shares"]
    if shares.min() < 0 or (np.diff(shares) < 0).any() or np.abs(shares[:, -1] - 1).max() > 1e-3:
        raise ValueError("shares do not rise from 0 to 1")
    if (
        min(arrays["strengths"].min(), arrays["std"].min()) < 0
        or np.abs(np.linalg.norm(arrays["vectors"], axis=1) - 1).max() > 1e-3
    ):
        raise ValueError("strengths and std are not above 0, or vectors not of length 1")
    return Reference(str(entry["slide"]), **arrays)
