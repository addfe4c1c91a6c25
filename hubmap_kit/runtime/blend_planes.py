"""The out-of-fold planes of several runs at one small size, one file a slide and run: what blends are fitted on.

BLEND/planes/<run>/fold<k>-<mark>/<id>.npy is what fold k of a run, which never saw the slide, says of it: probabilities
of 0..255, (h, w) uint8. The mark stands for weights, settings, slides and size, so a file is never another network's. A
file is there whole or not at all; what is there is not predicted again.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import Experiment
from hubmap_kit.files import atomic_path, sweep
from hubmap_kit.inference.ensemble import MODEL_FILE, fold_folders, load_fold
from hubmap_kit.inference.normalise import digest_words, references_of
from hubmap_kit.inference.tissue import tissue_map
from hubmap_kit.models.weights_card import sha256
from hubmap_kit.tiles.convert import decode_for
from hubmap_kit.tiles.scaling import resize_mask, resize_plane
from hubmap_kit.tiles.store import TileStore

log = logging.getLogger(__name__)
TRUTH, TISSUE = 1, 2  # bits of the truth files
# Of inference, these change no plane or only its last digit.
APART = {"threshold", "thresholds", "source_thresholds", "postprocess", "ladder", "batch_size", "tune_speed"}


@dataclass(frozen=True)
class Member:
    """A run that may become part of a blend: its name in it, its folder and settings, the organs that it knows, and
    their store at its scale.
    """

    name: str
    run: Path
    settings: Experiment
    store: TileStore
    organs: frozenset[str]


@dataclass(frozen=True)
class Planes:
    """Where the planes of the slides lie: `of[id]` has one file for each run that knows its organ, `truth[id]` its mask
    and tissue.
    """

    of: dict[str, list[Path]]
    truth: dict[str, Path]

    def read(self, slide_id: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The planes (runs that know its organ, h, w) uint8 of a slide, its mask and its tissue (h, w) bool."""
        bits = np.load(self.truth[slide_id])
        return np.stack([np.load(path) for path in self.of[slide_id]]), (bits & TRUTH) > 0, (bits & TISSUE) > 0


def small_shape(height: int, width: int, side: int) -> tuple[int, int]:
    """(h, w) of a slide whose longer side has at most `side` pixels."""
    zoom = min(1.0, side / max(height, width))
    return max(1, round(height * zoom)), max(1, round(width * zoom))


def gather(
    root: Path,
    members: Sequence[Member],
    slides: Sequence[Slide],
    folds: Mapping[str, int],
    side: int,
    device: torch.device,
    progress: tqdm,
) -> Planes:
    """Predict what is not there yet of the `slides`, each by the fold that held it out; one slide is in memory at a
    time.

    Every run has trained all folds of the slides whose organ it knows. `progress` counts these slides over all runs.
    """
    of: dict[str, list[Path]] = {slide.id: [] for slide in slides}
    truth: dict[str, Path] = {}
    for member in members:
        known = [slide for slide in slides if slide.organ in member.organs]
        for number in sorted({folds[slide.id] for slide in known}):
            held_out = [slide for slide in known if folds[slide.id] == number]
            folder = root / member.name / f"fold{number}-{_mark(member, number, side)}"
            _fill(folder, member, number, held_out, side, device, progress)
            for slide in held_out:
                of[slide.id].append(folder / f"{slide.id}.npy")
        truth |= _truths(root, member.store, [slide for slide in known if slide.id not in truth], side)
    return Planes(of, truth)


def _mark(member: Member, number: int, side: int) -> str:
    values = {
        "weights": sha256(fold_folders(member.run)[number] / MODEL_FILE),
        "side": side,
        "slides": member.store.folder.name,
        "model": member.settings.model.model_dump(mode="json"),
        "inference": member.settings.inference.model_dump(mode="json", exclude=APART),
    }
    if member.settings.inference.normalise:
        values["references"] = digest_words(references_of(member.run, member.settings.inference, number))
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def _fill(
    folder: Path, member: Member, number: int, slides: Sequence[Slide], side: int, device: torch.device, progress: tqdm
) -> None:
    rows = {slide_id: row for row, slide_id in enumerate(member.store.slides["id"])}
    sweep(folder, ".*.tmp.npy")
    missing = [
        slide
        for slide in slides
        if not _is_whole(folder / f"{slide.id}.npy", _shape(member.store, rows[slide.id], side))
    ]
    progress.update(len(slides) - len(missing))
    if not missing:
        return
    if len(missing) < len(slides):
        log.info(
            "%s fold %d: %d of %d planes are there already",
            member.name,
            number,
            len(slides) - len(missing),
            len(slides),
        )
    ensemble = load_fold(member.settings, fold_folders(member.run)[number], device)
    for slide in missing:
        progress.set_postfix_str(f"{member.name} fold {number} {slide.organ} {slide.id}", refresh=False)
        row = rows[slide.id]
        plane = resize_plane(
            ensemble.plane(member.store.image(row), organ=slide.organ, source=slide.source),
            _shape(member.store, row, side),
        )
        _save(folder / f"{slide.id}.npy", np.rint(plane * 255).astype(np.uint8))
        progress.update(1)


def _truths(root: Path, store: TileStore, slides: Sequence[Slide], side: int) -> dict[str, Path]:
    folder = root / f"truth-{store.folder.name}-{side}"
    rows = {slide_id: row for row, slide_id in enumerate(store.slides["id"])}
    sweep(folder, ".*.tmp.npy")
    for slide in slides:
        row = rows[slide.id]
        shape, record = _shape(store, row, side), store.slides.iloc[row]
        if not _is_whole(folder / f"{slide.id}.npy", shape):
            truth = resize_mask(decode_for(slide, int(record["height"]), int(record["width"])), shape)
            cells = tissue_map(store.image(row), shape)
            down, across = ((np.arange(length) * cells.shape[axis]) // length for axis, length in enumerate(shape))
            _save(folder / f"{slide.id}.npy", truth * np.uint8(TRUTH) + cells[np.ix_(down, across)] * np.uint8(TISSUE))
    return {slide.id: folder / f"{slide.id}.npy" for slide in slides}


def _shape(store: TileStore, row: int, side: int) -> tuple[int, int]:
    record = store.slides.iloc[row]
    return small_shape(int(record["height"]), int(record["width"]), side)


def _is_whole(path: Path, shape: tuple[int, int]) -> bool:
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return False
    return found.shape == shape and found.dtype == np.uint8


def _save(path: Path, values: np.ndarray) -> None:
    with atomic_path(path) as temporary:
        np.save(temporary, values)
