"""The colours that a run has learnt from: one typical training slide of each organ, for inference.normalise.

What is kept are statistics of colours, of training slides only. So that a fold is not judged with the colours of a
slide that it holds out either, each organ has a second slide, of another fold, which takes the first one's place there.
(Which slides are typical was decided by all of them.)
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from hubmap_kit.augment.stain import Reference
from hubmap_kit.competition.lineage import judged
from hubmap_kit.competition.organs import ORGANS, SOURCES
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import ConfigError
from hubmap_kit.files import write_text
from hubmap_kit.inference.normalise import FORMAT, STAIN_FILE, as_plain
from hubmap_kit.tiles.store import TileStore

log = logging.getLogger(__name__)
CANDIDATES = 12  # slides of an organ that are measured
PIXELS = 1 << 18  # of a slide that are measured, about: whole rows, evenly spread


def write_stain_references(run: Path, store: TileStore, slides: Sequence[Slide], folds: Mapping[str, int]) -> None:
    """Write stain_references.json: by organ the medoid of its training slides, and the medoid of those of other folds.

    Measured at the store's scale, on which networks look at slides. HPA slides count where an organ has any; copies
    with other stains, whose `parent` is there as well, never do. An organ whose slides show too little tissue is left
    out.
    """
    originals = judged({slide.id: slide.parent for slide in slides})
    learnt = {slide.id for slide in slides if slide.id in folds and slide.id in originals and slide.weight > 0}
    organs = {}
    for organ in ORGANS:
        measured = _measured(store, _candidates(store, organ, learnt))
        if measured:
            organs[organ] = [as_plain(reference, folds[reference.name]) for reference in _chosen(measured, folds)]
            log.debug(
                "%s: %s", organ, ", ".join(f"slide {entry['slide']} of fold {entry['fold']}" for entry in organs[organ])
            )
    write_text(run / STAIN_FILE, json.dumps({"format": FORMAT, "organs": organs}) + "\n")


def medoid(references: Sequence[Reference]) -> Reference:
    """The one whose mean colour in CIE Lab is nearest to all others': unlike a mean, no odd slide moves it far, and it
    is a real slide.
    """
    means = np.stack([reference.mean for reference in references])
    distances = np.linalg.norm(means[:, None] - means[None], axis=2).sum(axis=1)
    return references[int(distances.argmin())]


def _chosen(measured: Sequence[Reference], folds: Mapping[str, int]) -> list[Reference]:
    first = medoid(measured)
    others = [reference for reference in measured if folds[reference.name] != folds[first.name]]
    return [first, medoid(others)] if others else [first]


def _candidates(store: TileStore, organ: str, learnt: set[str]) -> list[int]:
    """Row numbers of an organ's slides in the store, evenly spread among them."""
    table = store.slides[(store.slides["organ"] == organ) & store.slides["id"].isin(learnt)]
    hpa = table[table["data_source"] == SOURCES[0]]
    rows = (hpa if len(hpa) else table).index.to_numpy()
    places = np.linspace(0, len(rows) - 1, min(len(rows), CANDIDATES)).round().astype(int)
    return [int(row) for row in rows[places]]


def _measured(store: TileStore, rows: Sequence[int]) -> list[Reference]:
    found = []
    for row in rows:
        name = str(store.slides["id"][row])
        try:
            found.append(Reference.of(_some_rows(store.image(row)), name))
        except ConfigError as error:
            log.debug("slide %s is no stain reference: %s", name, error)
    return found


def _some_rows(image: np.ndarray) -> np.ndarray:
    """Every n-th row of a slide, about PIXELS pixels. An odd n meets every row of the 8 x 8 blocks of a JPEG."""
    return np.ascontiguousarray(image[:: -(-image.shape[0] * image.shape[1] // PIXELS) | 1])
