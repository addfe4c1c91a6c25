"""The notebook job: papermill executes the shipped notebook for an experiment and leaves the executed copy in the run
folder.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from hubmap_kit import experiment
from hubmap_kit.competition.tables import read_train
from hubmap_kit.errors import CheckpointError, HubmapError
from hubmap_kit.inference.ensemble import MODEL_FILE, run_settings
from hubmap_kit.jobs import train
from hubmap_kit.models.device import choose_device, choose_devices
from hubmap_kit.training.history import CHECKPOINT_FILE

log = logging.getLogger(__name__)
COPY_FILE = "notebook.ipynb"
KERNEL = "python3"  # the name under which ipykernel offers the Python that asks for it
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def shipped_notebook() -> Path:
    """The notebook inside the package."""
    return Path(str(resources.files("hubmap_kit") / "notebooks" / "train_and_report.ipynb"))


def notebook(
    config: str,
    out: Path,
    data: str = "",
    overrides: Sequence[str] = (),
    folds: Sequence[int] | None = None,
    device: str = "auto",
    stores: Path | None = None,
    resume: bool = False,
) -> Path:
    """Train and report by the shipped notebook; returns its executed copy, `out`/notebook.ipynb, which holds every
    picture.

    With `resume` an empty `config` is the run's own; a run that is finished is only reported. While it runs, the copy
    grows beside `out`, as <name>.notebook.ipynb, because a training wants a new folder. After an error it is in the run
    if that has begun, else it stays there. Raises ConfigError and CheckpointError before anything runs, and HubmapError
    for an error in the notebook and where papermill is not installed.
    """
    papermill = _import_papermill()
    kept = out / "config.yaml"
    config = config or (str(kept) if resume and kept.is_file() else "")
    if not config:
        raise HubmapError(f"--config is missing; name one of {experiment.offered()}, or a YAML file")
    experiment.load(config, overrides, data)
    choose_devices(device)
    if not resume and (any(out.glob(f"fold*/{CHECKPOINT_FILE}")) or any(out.glob(f"fold*/{MODEL_FILE}"))):
        raise CheckpointError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    values = {
        "config": config,
        "data": data,
        "out": str(out),
        "overrides": list(overrides),
        "folds": list(folds) if folds is not None else None,
        "device": device,
        "stores": str(stores) if stores else "",
        "resume": resume,
    }
    growing = out.parent / f"{out.name}.{COPY_FILE}"
    growing.parent.mkdir(parents=True, exist_ok=True)
    log.info("the notebook runs; its copy grows in %s", growing)
    failure = _execute(papermill, growing, values)
    copy = _into_run(growing, out)
    if failure:
        raise HubmapError(f"{failure}; what it had executed is in {copy}")
    return copy


def draw_run_overlays(run: Path, device: str = "auto") -> list[Path]:
    """Draw, for each organ, a run's held-out slide with the median Dice, from its oof.csv; returns the paths of the
    pictures.
    """
    settings = run_settings(run)
    table = pd.read_csv(run / "oof.csv", dtype={"id": str})
    return train.draw_overlays(
        run, settings, read_train(train.train_csv(settings)), table, choose_device(device.partition(",")[0])
    )


def _import_papermill() -> Any:
    try:
        importlib.import_module("ipykernel")
        return importlib.import_module("papermill")
    except ImportError as error:
        raise HubmapError(
            f"{error.name or 'papermill'}, which executes notebooks, is not installed; pip install"
            " 'hubmap-kit[notebook]'"
        ) from error


def _execute(papermill: Any, copy: Path, values: dict[str, Any]) -> str:
    """Execute the notebook into `copy`; returns the sentence of an error in it, or nothing."""
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    try:
        papermill.execute_notebook(
            str(shipped_notebook()), str(copy), values, kernel_name=KERNEL, progress_bar=False, log_output=False
        )
    except PapermillExecutionError as error:
        said = _COLOURS.sub("", str(error.evalue)).strip().splitlines() or [""]
        kind = "" if _is_ours(error.ename) else f"{error.ename}: "
        return f"the notebook stopped in its cell {error.exec_count}: {kind}{said[0].rstrip('.')}"
    except DeadKernelError:
        return (
            "the notebook's process died, mostly for want of memory; lower training.batch_size or tiles.size with --set"
        )
    return ""


def _is_ours(name: str) -> bool:
    """Whether the class is one of the kit's, whose message is a sentence of its own."""
    from hubmap_kit import errors

    found = getattr(errors, name, None)
    return isinstance(found, type) and issubclass(found, HubmapError)


def _into_run(growing: Path, out: Path) -> Path:
    """Move the copy into the run where there is one: in any other folder it would keep the next training out."""
    if not growing.is_file() or not (out / "config.yaml").is_file():
        return growing
    copy = out / COPY_FILE
    os.replace(growing, copy)
    return copy
