"""Reading one run folder, whatever state it is in: what can be read is told, what cannot is a sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from hubmap_kit import experiment
from hubmap_kit.competition.csv_rows import read_rows
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, HubmapError
from hubmap_kit.inference.ensemble import MODEL_FILE, fold_folders, read_thresholds
from hubmap_kit.report.tries_columns import Row
from hubmap_kit.report.tries_files import read_environments, read_oof, read_timing, sentence
from hubmap_kit.report.tries_find import CONFIG, shown
from hubmap_kit.report.tries_settings import settings_row
from hubmap_kit.report.tries_theirs import OURS
from hubmap_kit.training.history import fold_number, unfinished

_BUFFERS = ("running_mean", "running_var")


@dataclass(frozen=True)
class Run:
    """A run folder that could be read: its settings, its row of the list, and a sentence for each file that is
    damaged.
    """

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
    split = run / "folds.csv"
    planned = (
        len({row["fold"] for _, row in read_rows(split, ("fold",))})
        if split.is_file()
        else max(len(begun), settings.data.n_folds)
    )
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
            slices = {name: file.get_slice(name) for name in list(file.keys())}
            return sum(
                math.prod(part.get_shape()) for name, part in slices.items() if _is_parameter(name, part.get_dtype())
            )
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged ({str(error)[:80]}); copy it again or train its fold anew") from error


def _is_parameter(name: str, kind: str) -> bool:
    return not name.endswith(_BUFFERS) and kind.startswith(("F", "BF"))


def _dice(run: Path, _settings: Experiment) -> Row:
    if not (run / "oof.csv").is_file():
        return {}
    table = read_oof(run)
    means = table.groupby("organ")["dice"].mean()
    row: Row = {organ: float(means[organ]) for organ in ORGANS if organ in means}
    return {"measured": f"out of fold, {len(table)} slides", "cv": math.fsum(table["dice"]) / len(table), **row}


def _time(run: Path, _settings: Experiment) -> Row:
    timing = read_timing(run)
    return (
        {"hours": float(timing["seconds"].sum()) / 3600, "epoch_s": statistics.median(timing["seconds"])}
        if len(timing)
        else {}
    )


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
    count = f" x{found['count']}" if found.get("count", 1) != 1 else ""
    name = (
        f"{found['name']}{count}"
        if found.get("name")
        else f"{found['type']}, {session.get('cpus', '?')} cores"
        if found.get("type")
        else ""
    )
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
