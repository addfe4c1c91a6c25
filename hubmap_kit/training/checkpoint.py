"""`last.ckpt`: everything that a fold needs to go on as if it had never stopped.

Only tensors and plain Python values go in, so it is read with `weights_only=True`: a checkpoint cannot run code.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch

from hubmap_kit import experiment
from hubmap_kit.errors import CheckpointError, ConfigError
from hubmap_kit.files import atomic_path, sweep

FORMAT = 1
# What may differ between a run and its continuation, because no number of its training depends on it.
FREE = {
    ("training", "workers"),
    ("training", "sinks"),
    ("data", "folder"),
    ("inference", "batch_size"),
    ("inference", "views"),
    ("inference", "threshold"),
    ("inference", "thresholds"),
}
# Files that may lie in another folder now, as mounts do: their names say whether they are the same.
FILES = {("model", "encoder_weights"), ("data", "folds_csv")}
KEYS = {
    "format",
    "settings",
    "store",
    "epoch",
    "history",
    "timing",
    "network",
    "ema",
    "optimizer",
    "schedule",
    "scaler",
    "rng",
}


class DamagedCheckpoint(CheckpointError):
    """A checkpoint cannot be read at all, whatever experiment it belonged to."""


def save(path: Path, state: dict[str, Any]) -> None:
    """Write a checkpoint atomically: a kill during the write leaves the previous one."""
    sweep(path.parent, f".{path.stem}.*.tmp{path.suffix}")
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT, **state}, temporary)


def load(path: Path, settings: dict[str, Any], store_mark: str, slides: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read a checkpoint for a continuation with `settings` (a dumped experiment) on the store `store_mark`.

    `slides` is what the store does not say of them, see `facts_of`; a checkpoint of before it was kept is not compared
    with it.

    Raises DamagedCheckpoint when nothing can be made of the file, CheckpointError when it is of another format, or
    belongs to another experiment or other data.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["format"]
    except Exception as error:
        # A cut-off or alien file makes torch's readers fail in a dozen ways, from OSError to struct.error.
        raise DamagedCheckpoint(
            f"{path} is damaged or no checkpoint of this kit; delete it and its folder to train this fold anew"
        ) from error
    if found != FORMAT:
        raise CheckpointError(
            f"{path} has checkpoint format {found}, this version reads {FORMAT}; train this fold anew"
        )
    if not state.keys() >= KEYS:
        raise DamagedCheckpoint(
            f"{path} lacks {', '.join(sorted(KEYS - state.keys()))}; delete it and its folder to train this fold anew"
        )
    check_same(state["settings"], settings, path)
    if state["store"] != store_mark:
        raise CheckpointError(
            f"{path} was trained on other slides or masks than the data folder holds now; train into another --out"
        )
    if slides is not None and "slides" in state:
        _check_slides(state["slides"], slides, path)
    return state


def facts_of(weights: Mapping[str, float], held_out: Iterable[str]) -> dict[str, Any]:
    """What a fold's numbers depend on beside the store: the weights of slides by id, where they are not 1, and the ids
    that judge it.
    """
    return {
        "weights": {slide_id: weight for slide_id, weight in weights.items() if weight != 1},
        "held_out": sorted(held_out),
    }


def _check_slides(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    (before, now), end = (old["weights"], new["weights"]), "train into another --out"
    if changed := [
        slide_id for slide_id in dict.fromkeys([*before, *now]) if before.get(slide_id, 1) != now.get(slide_id, 1)
    ]:
        first, more = changed[0], f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise CheckpointError(
            f"{path} was trained with weight {before.get(first, 1):g} for slide {first}, now train.csv gives it"
            f" {now.get(first, 1):g}{more}; give it the weights of before, or {end}"
        )
    if moved := sorted(set(old["held_out"]) ^ set(new["held_out"])):
        how = "was judged" if moved[0] in old["held_out"] else "was not judged"
        raise CheckpointError(
            f"slide {moved[0]} {how} in the epochs of {path}, but the column parent of train.csv now says otherwise;"
            f" {end}"
        )


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of every random generator that a layer or library may draw from, as plain values and tensors."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, [int(key) for key in keys], position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to a state that `rng_state` took."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)


def check_same(old: dict[str, Any], new: dict[str, Any], path: Path) -> None:
    """Raise CheckpointError, naming `path`, where two dumped experiments differ in anything that numbers depend on.

    The older one is completed with today's defaults first: a key that this version added does not make it another
    experiment.
    """
    try:
        old = experiment.dump(experiment.parse(old, f"the experiment in {path}"))
    except ConfigError as error:
        raise CheckpointError(
            f"{error}; it was made with another version of the kit, go on with that one or train into another --out"
        ) from error
    changed = [
        (f"{section}.{key}", old.get(section, {}).get(key), value)
        for section, values in new.items()
        if isinstance(values, dict)
        for key, value in values.items()
        if (section, key) not in FREE and _differ(section, key, old.get(section, {}).get(key), value)
    ]
    if changed:
        key, before, now = changed[0]
        more = f" (and {len(changed) - 1} more)" if len(changed) > 1 else ""
        raise CheckpointError(
            f"{path} was made with {key} = {before!r}, now it is {now!r}{more}; resume with the same settings, or train"
            " into another --out"
        )


def _differ(section: str, key: str, old: Any, new: Any) -> bool:
    if (section, key) in FILES and isinstance(old, str) and isinstance(new, str):
        return PurePath(old).stem != PurePath(new).stem
    return old != new
