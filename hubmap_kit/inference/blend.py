"""Several runs as one: the weight of each run for each organ, with the thresholds that were fitted for the weighted
mean.

`hubmap blend` writes blend.json. It names runs by their folders, relative to its own, and by the hash of their weights,
so that it finds them again where the folders are called something else, as in a kernel, and never weighs others than it
was fitted on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, overload

from hubmap_kit import experiment
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import InferenceConfig
from hubmap_kit.errors import CheckpointError
from hubmap_kit.inference.ensemble import MODEL_FILE, Ensemble, fold_folders
from hubmap_kit.models.pretrained import sha256

BLEND_FILE = "blend.json"
FORMAT = 1


@dataclass(frozen=True)
class BlendRun:
    """A run of a blend: a name, its folder (relative to that of blend.json, or its name alone in a published blend),
    its `weights_id`.
    """

    name: str
    path: str
    weights_id: str


@dataclass(frozen=True)
class Blend:
    """What inference needs of a blend.json: `weights` by organ, one for each run, summing to 1; `thresholds` by organ;
    whether empty masks are rescued, because every training slide had a unit.
    """

    runs: tuple[BlendRun, ...]
    weights: dict[str, tuple[float, ...]]
    thresholds: dict[str, float]
    rescue: bool


class Blended(Sequence[Ensemble]):
    """The ensembles of a blend on one device, in the order of its runs; a team that knows its weights and thresholds.

    `inference` judges the mean plane. It holds what the command line says and nothing of the runs' own configs: their
    thresholds and post-processing were fitted for their own planes.
    """

    def __init__(self, ensembles: Sequence[Ensemble], blend: Blend, overrides: Sequence[str] = ()) -> None:
        if len(ensembles) != len(blend.runs):
            raise ValueError(f"{len(ensembles)} ensembles for a blend of {len(blend.runs)} runs")
        self._ensembles, self.blend = tuple(ensembles), blend
        self.inference = _judge(blend, overrides)

    @overload
    def __getitem__(self, index: int) -> Ensemble: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Ensemble]: ...

    def __getitem__(self, index: int | slice) -> Ensemble | Sequence[Ensemble]:
        return self._ensembles[index]

    def __len__(self) -> int:
        return len(self._ensembles)


def shares(team: Sequence[Ensemble], organ: str) -> tuple[float, ...] | None:
    """The weights of a team's ensembles for an organ; None where all count alike.

    Without fitted ones those count that have learnt the organ (`data.organs`), or all where none has.
    """
    found = team.blend.weights.get(organ) if isinstance(team, Blended) else None
    if found is None and (count := sum(each.experiment.data.has(organ) for each in team)):
        found = tuple(each.experiment.data.has(organ) / count for each in team)
    return found if found is not None and len(set(found)) > 1 else None


def weights_id(run: Path) -> str:
    """A hash (12 hex digits) of a run's trained weights: the same wherever the run lies and whatever it is called."""
    digests = {str(number): sha256(folder / MODEL_FILE) for number, folder in fold_folders(run).items()}
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()[:12]


def read_blend(path: str | Path) -> Blend:
    """Read blend.json, or the one in a folder. Raises CheckpointError when it is missing or no blend."""
    return _parsed(_values(path), _file(path))


def published(path: str | Path, names: Sequence[str]) -> dict[str, Any]:
    """The content of blend.json with `names` instead of the runs' folders, for other machines."""
    values = _values(path)
    runs = [asdict(run) for run in _parsed(values, _file(path)).runs]
    return values | {"runs": [run | {"name": name, "path": name} for run, name in zip(runs, names, strict=True)]}


def runs_at(path: str | Path) -> list[Path]:
    """The folders of a blend's runs, in its order, where blend.json says they are.

    Raises CheckpointError for a run that is not there, or whose weights are no longer those that the blend was fitted
    on.
    """
    file = _file(path)
    blend = read_blend(file)
    folders = [Path(os.path.normpath(file.parent / run.path)) for run in blend.runs]
    for folder, run in zip(folders, blend.runs, strict=True):
        if not (folder / "config.yaml").is_file() or not fold_folders(folder):
            raise CheckpointError(
                f"{file} needs the run {run.name} in {folder}, where there is none; bring it back, or run 'hubmap"
                " blend' again"
            )
        if (found := weights_id(folder)) != run.weights_id:
            raise CheckpointError(
                f"{folder} holds other weights ({found}) than {file} was fitted on ({run.weights_id}); fit it again"
                " with 'hubmap blend'"
            )
    return folders


def runs_among(path: str | Path, runs: Iterable[Path]) -> list[Path]:
    """The runs of a blend, in its order, among `runs`, wherever they lie.

    Raises CheckpointError when one is missing.
    """
    found = {weights_id(run): run for run in runs}
    blend = read_blend(path)
    missing = [run.name for run in blend.runs if run.weights_id not in found]
    if missing:
        raise CheckpointError(
            f"{_file(path)} needs the weights of {', '.join(missing)}, which are not there; publish all runs of the"
            " blend together"
        )
    return [found[run.weights_id] for run in blend.runs]


def _judge(blend: Blend, overrides: Sequence[str]) -> InferenceConfig:
    config = experiment.load(
        "baseline", [override for override in overrides if override.startswith("inference.")]
    ).inference
    if not blend.rescue or any(override.startswith("inference.postprocess") for override in overrides):
        return config
    return config.model_copy(update={"postprocess": config.postprocess.model_copy(update={"rescue": True})})


def _file(path: str | Path) -> Path:
    return Path(path) / BLEND_FILE if Path(path).is_dir() else Path(path)


def _values(path: str | Path) -> dict[str, Any]:
    file = _file(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing; give the folder that 'hubmap blend --out' wrote") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} is damaged ({type(error).__name__}); fit it again with 'hubmap blend'"
        ) from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise CheckpointError(f"{file} is no blend of format {FORMAT}; fit it again with 'hubmap blend'")
    return values


def _parsed(values: dict[str, Any], file: Path) -> Blend:
    try:
        runs = tuple(BlendRun(*(str(run[key]) for key in ("name", "path", "weights_id"))) for run in values["runs"])
        organs = {
            str(organ): (tuple(map(float, each["weights"])), float(each["threshold"]))
            for organ, each in values["organs"].items()
        }
        for organ, (weights, threshold) in organs.items():
            if organ not in ORGANS:
                raise ValueError(f"'{organ}' is no organ")
            if (
                len(weights) != len(runs)
                or not all(0 <= weight <= 1 for weight in weights)
                or not math.isclose(sum(weights), 1, abs_tol=1e-3)
            ):
                raise ValueError(f"the weights of {organ} are no shares of {len(runs)} runs")
            if not 0 < threshold < 1:
                raise ValueError(f"the threshold of {organ} is no probability")
        return Blend(
            runs,
            {key: each[0] for key, each in organs.items()},
            {key: each[1] for key, each in organs.items()},
            bool(values["rescue"]),
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{file} is not what 'hubmap blend' writes ({type(error).__name__}: {error}); fit it again"
        ) from error
