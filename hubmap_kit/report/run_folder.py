"""Reading one run folder, whatever state it is in: what can be read is told, what cannot is a sentence."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import pandas as pd
from safetensors import SafetensorError, safe_open

from hubmap_kit import experiment
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import AugmentConfig, Experiment, ScaleChoices, ScaleConfig
from hubmap_kit.errors import CheckpointError, HubmapError, TableError
from hubmap_kit.inference.ensemble import MODEL_FILE, fold_folders, read_thresholds
from hubmap_kit.training.history import CHECKPOINT_FILE, TIMING_FILE, fold_number, unfinished
from hubmap_kit.training.oof import read_metrics

Value = str | float | int | None
Row = dict[str, Value]
CONFIG = "config.yaml"
OURS = "ours"  # whose run a row is about
BUFFERS = ("running_mean", "running_var")


def read_oof(run: Path) -> pd.DataFrame:
    """The out-of-fold table of a run: id, organ, data_source (text), dice (float) and fold.

    Raises TableError for a damaged one.
    """
    path = run / "oof.csv"
    table = pd.DataFrame([row for _, row in read_rows(path, ("id", "organ", "data_source", "fold", "dice"))])
    again = f"run 'hubmap evaluate {run}' to write it anew"
    if table.empty:
        raise TableError(f"{path} has a header and no rows; {again}")
    table["dice"] = pd.to_numeric(table["dice"], errors="coerce")
    if not table["dice"].between(0, 1).all():
        slide = table["id"][~table["dice"].between(0, 1)].iloc[0]
        raise TableError(f"{path} has a dice of slide {slide} that is no number from 0 to 1; {again}")
    if table["id"].duplicated().any():
        raise TableError(f"{path} has slide {table['id'][table['id'].duplicated()].iloc[0]} twice; {again}")
    return table


def read_curves(run: Path) -> pd.DataFrame:
    """The metrics of all folds, numbers only; empty before the first epoch is done.

    Raises CheckpointError for a damaged file.
    """
    metrics = read_metrics(run).apply(pd.to_numeric, errors="coerce")
    if metrics.empty:
        return metrics
    if not {"fold", "epoch"} <= set(metrics) or metrics[["fold", "epoch"]].isna().any(axis=None):
        raise CheckpointError(
            f"{run} has a fold<k>/metrics.csv without a fold and an epoch in every row; delete that file, --resume"
            " writes it anew"
        )
    return metrics


def read_timing_table(run: Path) -> pd.DataFrame:
    """The timing rows of all folds, numbers only, columns as they come; empty before the first epoch is done.

    Raises TableError.
    """
    rows: list[dict[str, Any]] = []
    for path in sorted(run.glob(f"fold*/{TIMING_FILE}")):
        for line, row in read_rows(path, ("seconds",)):
            numbers = {key: _float(cell) for key, cell in row.items() if key != "session"}
            if not math.isfinite(numbers["seconds"]):
                raise TableError(
                    f"{path}, line {line} says seconds = '{row['seconds']}', but a number was expected; delete the"
                    " file, it is for information"
                )
            rows.append(numbers | {"session": row.get("session", "")})
    return pd.DataFrame(rows)


def read_environments(run: Path) -> list[dict[str, Any]]:
    """What the run's sessions ran on, the latest first; empty where nothing was kept.

    Raises CheckpointError for a damaged file.
    """
    path = run / "environment.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is damaged ({str(error)[:80]}); delete it, the next session writes it anew"
        ) from error
    sessions = found if isinstance(found, list) else [found]
    if not all(isinstance(session, dict) for session in sessions):
        raise CheckpointError(f"{path} is no list of sessions; delete it, the next session writes it anew")
    return sessions


def _float(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return math.nan


def sentence(error: Exception, path: Path) -> str:
    """What to say of an error with a run's file; the system's own errors name no remedy."""
    if isinstance(error, OSError):
        return f"{error.filename or path} cannot be read ({error.strerror or error}); check its permissions"
    return str(error)


def find_runs(folders: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """The run folders (those with a config.yaml) in some folders, however deep, and what is wrong with others, a
    sentence each.

    Hidden folders are passed over, and a run is not looked into. Raises TableError for a named folder that does not
    exist.
    """
    runs: dict[Path, Path] = {}
    problems: list[str] = []
    seen: set[Path] = set()
    for folder in folders:
        if not folder.is_dir():
            raise TableError(f"{folder} is no folder, but a run or a folder of runs was expected; check the path")
        _walk(folder, runs, problems, seen)
    return list(runs.values()), problems


def labels(runs: Sequence[Path]) -> list[str]:
    """For each run folder the shortest end of its path that no other one has."""
    parts = [path.resolve().parts for path in runs]

    def shortest(own: tuple[str, ...]) -> int:
        lengths = range(1, len(own))
        return next(
            (each for each in lengths if all(one == own or one[-each:] != own[-each:] for one in parts)), len(own)
        )

    return [shown("/".join(own[-shortest(own) :])) for own in parts]


def shown(path: str | Path) -> str:
    """A path as text that can be written: bytes of a name that are no UTF-8 become question marks."""
    return os.fsencode(path).decode("utf-8", "replace")


def _walk(top: Path, runs: dict[Path, Path], problems: list[str], seen: set[Path]) -> None:
    def refused(error: OSError) -> None:
        problems.append(f"{error.filename} cannot be looked into ({error.strerror}); it is left out")

    for name, inner, files in os.walk(top, onerror=refused, followlinks=True):
        folder = Path(name)
        real = folder.resolve()
        if real in seen:  # a link may lead back to a folder above it
            inner.clear()
            continue
        seen.add(real)
        if CONFIG in files:
            runs[real] = folder
            inner.clear()
        elif any(_is_fold(folder / each) for each in inner):
            problems.append(
                f"{folder} has trained folds, but no {CONFIG}; take that from the original run, nobody knows its"
                " settings without it"
            )
            inner.clear()
        else:
            inner[:] = sorted(each for each in inner if not each.startswith("."))


def _is_fold(folder: Path) -> bool:
    return fold_number(folder) is not None and any((folder / name).is_file() for name in (MODEL_FILE, CHECKPOINT_FILE))


def settings_row(settings: Experiment) -> Row:
    """The cells that config.yaml alone fills."""
    augment, model, training = settings.augment, settings.model, settings.training
    return {
        "model": model.arch,
        "encoder": model.encoder,
        "conversion": settings.data.conversion or conversion(settings.scale),
        "size": settings.tiles.size,
        "overlap": settings.tiles.overlap,
        "augment": augment.pipeline,
        "engine": augment.engine,
        "mixing": _weighted(augment.mixing),
        "stain": _stain(augment),
        "loss": training.loss,
        "optimizer": training.optimizer,
        "lr": training.lr,
        "schedule": training.schedule,
        "epochs": training.epochs,
        "iterations": training.iterations or None,
        "batch": training.batch_size,
        "accumulate": training.accumulate,
        "seed": training.seed,
        "classes": model.classes,
        "auxiliary": _weighted(model.auxiliary),
        "start": PurePath(model.encoder_weights).stem or "random",
    }


def conversion(scale: ScaleConfig) -> str:
    """How a slide is scaled for the network, in a few words."""
    return ", ".join([_scale(scale), *(f"{organ} {_scale(choices)}" for organ, choices in scale.organs.items())])


def _scale(choices: ScaleChoices) -> str:
    return {
        "reduce": f"reduce {choices.reduce}",
        "physical": f"{choices.um_per_px:g} um/px",
        "fit": f"fit {choices.fit} px",
    }[choices.policy]


def _weighted(weights: Mapping[Any, float]) -> str:
    return ", ".join(f"{name} {weight:g}" for name, weight in weights.items())


def _stain(augment: AugmentConfig) -> str:
    return "" if augment.stain == "none" else f"{augment.stain} {augment.stain_probability:g}"


@dataclass(frozen=True)
class Run:
    """A run folder that could be read: settings, row of the list, and a sentence for each damaged file."""

    path: Path
    settings: Experiment
    row: Row
    problems: tuple[str, ...]


def read_run(path: Path, name: str) -> Run:
    """Read a run folder. Raises HubmapError, or OSError, where not even its settings can be read."""
    settings = experiment.read(path / CONFIG)
    row: Row = {"run": name, "whose": OURS, "path": shown(path), **settings_row(settings)}
    problems = []
    for piece in (_state, _weights, _dice, _time, _machine, _thresholds):
        try:
            row |= piece(path, settings)
        except (HubmapError, OSError) as error:
            problems.append(sentence(error, path))
    return Run(path, settings, row, tuple(problems))


def _state(run: Path, settings: Experiment) -> Row:
    try:
        left = unfinished(run, settings.training)
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{run} has a fold<k>/metrics.csv without what an epoch leaves ({error!r}); delete it, --resume writes it"
            " anew"
        ) from error
    begun = [number for folder in run.glob("fold*") if (number := fold_number(folder)) is not None and folder.is_dir()]
    done = len(begun) - len(left)
    planned, split = max(len(begun), settings.data.n_folds), run / "folds.csv"
    if split.is_file():
        planned = len({row["fold"] for _, row in read_rows(split, ("fold",))})
    finished = "finished" if done >= planned else f"{done} of {planned} folds finished"
    state = "; ".join(left.values()) if left else finished if begun else "not begun"
    return {"state": state, "done": f"{done}/{planned}{'…' if left else ''}"}


def _weights(run: Path, _settings: Experiment) -> Row:
    folders = list(fold_folders(run).values())
    return {"parameters": parameters(folders[0] / MODEL_FILE) / 1e6} if folders else {}


def parameters(path: Path) -> int:
    """The number of parameters in a safetensors file, without the statistics of batch norms and whole-number tables.

    Raises CheckpointError for a damaged file.
    """
    try:
        with safe_open(path, "np") as file:
            slices = [file.get_slice(name) for name in list(file.keys()) if not name.endswith(BUFFERS)]
            return sum(math.prod(part.get_shape()) for part in slices if part.get_dtype().startswith(("F", "BF")))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({str(error)[:80]}); copy it again or train its fold anew") from error


def _dice(run: Path, _settings: Experiment) -> Row:
    if not (run / "oof.csv").is_file():
        return {}
    table = read_oof(run)
    means = table.groupby("organ")["dice"].mean()
    row: Row = {organ: float(means[organ]) for organ in ORGANS if organ in means}
    return {"measured": f"out of fold, {len(table)} slides", "cv": math.fsum(table["dice"]) / len(table), **row}


def _time(run: Path, _settings: Experiment) -> Row:
    timing = read_timing_table(run)
    if timing.empty:
        return {}
    return {"hours": float(timing["seconds"].sum()) / 3600, "epoch_s": float(timing["seconds"].median())}


def _machine(run: Path, _settings: Experiment) -> Row:
    sessions = read_environments(run)
    if not sessions:
        return {}
    latest = sessions[0]
    machines = dict.fromkeys(machine(session) for session in sessions)
    return {
        "begun": str(sessions[-1].get("time_utc") or "")[:16].replace("T", " "),
        "machine": ", ".join(filter(None, machines)),
        "git": _short_sha(latest.get("git_sha")),
        "build": str(latest.get("build_id") or ""),
    }


def machine(session: dict[str, Any]) -> str:
    """What a session ran on, in a few words."""
    found = session.get("accelerator")
    found = found if isinstance(found, dict) else {}
    name = f"{found['type']}, {session.get('cpus', '?')} cores" if found.get("type") else ""
    if found.get("name"):
        name = found["name"] + (f" x{found['count']}" if found.get("count", 1) != 1 else "")
    return f"{name} (Kaggle)" if name and session.get("kaggle_image") else name


def _short_sha(sha: Any) -> str:
    return sha[:8] + ("+" if sha.endswith("+changes") else "") if isinstance(sha, str) else ""


def _thresholds(run: Path, _settings: Experiment) -> Row:
    found = read_thresholds(run) if (run / "thresholds.json").is_file() else {}
    return {"thresholds": ", ".join(f"{organ} {found[organ]:.3g}" for organ in ORGANS if organ in found)}


def read_each(paths: Sequence[Path], names: Sequence[str]) -> tuple[list[Run], list[str]]:
    """Read run folders; those that cannot be read are left out.

    The sentences say which and why, damaged files of the others too.
    """
    runs, problems = [], []
    for path, name in zip(paths, names, strict=True):
        try:
            runs.append(read_run(path, name))
            problems += [f"{name}: {problem}" for problem in runs[-1].problems]
        except (HubmapError, OSError) as error:
            problems.append(f"{name} is left out: {sentence(error, path)}")
    return runs, problems
