"""The training kernel's own part: what is attached becomes the arguments of the train job."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch

from hubmap_kit import experiment
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, KernelError
from hubmap_kit.runtime import mounts
from hubmap_kit.runtime.accelerator import adapt, detect, profile
from hubmap_kit.runtime.kernel import run_name
from hubmap_kit.runtime import train_job
from hubmap_kit.tiles.convert import fingerprint
from hubmap_kit.training.clock import Clock
from hubmap_kit.training.history import unfinished
from hubmap_kit.training.run import of_organs

log = logging.getLogger(__name__)


def train_attached(
    config: str,
    folds: Sequence[int],
    overrides: Sequence[str],
    clock: Clock,
    devices: Sequence[torch.device],
    root: Path,
    working: Path,
    scratch: Path,
    must_resume: bool = False,
) -> str:
    """Train, and return one sentence about the result. Raises HubmapError, OutOfTime among them."""
    attached = mounts.inputs(root, scratch)
    data = attached.competition()
    settings = experiment.load(config, overrides, str(data))
    out = working / run_name(settings.name)
    resume = _bring_back(attached, out)
    if must_resume and not resume:
        raise KernelError(
            f"no attached output holds a begun run '{out.name}' to go on with; mounted are {attached.tree()}; attach"
            " the output of a session that trained an epoch, or push without --resume to begin anew"
        )
    settings = _with_weights(settings, attached, resume)
    settings = adapt(settings, detect() if devices[0].type == "cuda" else profile("cpu"), len(devices))
    stores = _link_store(
        attached, of_organs(read_train(data / "train.csv"), settings.data), settings, scratch / "stores"
    )
    names = ",".join(str(device) for device in devices)
    try:
        table = train_job.train(settings, out, list(folds) or None, resume, names, stores, clock, degrade=True)
    except CheckpointError as error:
        if not resume:
            raise
        raise KernelError(
            f"{error}; in a kernel, detach the former output or give the run another name with --set name=NAME"
        ) from error
    done, left = table[table["finished"]], list(unfinished(out, settings.training).values())
    sentence = (
        f"{out}: {done['fold'].nunique()} folds done, out-of-fold Dice {done['dice'].mean():.4f} over {len(done)}"
        " slides"
    )
    return sentence + (f"; not finished, but used if this output is attached: {', '.join(left)}" if left else "")


def _bring_back(attached: mounts.Inputs, out: Path) -> bool:
    """Copy the attached run of this name, with its checkpoints, to where it goes on; whether there was one."""
    found = attached.run_to_resume(out.name)
    if found is None:
        return False
    if out.exists():
        raise KernelError(
            f"{out} is there already although {found} is to be copied to it; start the kernel with an empty"
            f" {out.parent}"
        )
    log.info("going on with %s", found)
    # File by file: copytree would take over the mount's modes, which allow no writing.
    for source in sorted(path for path in found.rglob("*") if path.is_file()):
        target = out / source.relative_to(found)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return True


def _with_weights(settings: Experiment, attached: mounts.Inputs, resume: bool) -> Experiment:
    """The settings with the path of the encoder weights where only their name is given."""
    name = settings.model.encoder_weights
    if not name or Path(name).is_file():
        return settings
    try:
        # A name without an ending is a folder of packed weights, which travel one by one.
        path = attached.weights_file(Path(name).name if Path(name).suffix else f"{settings.model.encoder}.safetensors")
    except KernelError as error:
        if not resume:
            raise
        log.warning("%s; a fold that has begun does not need them", error)
        return settings
    return settings.model_copy(update={"model": settings.model.model_copy(update={"encoder_weights": str(path)})})


def _link_store(attached: mounts.Inputs, slides: Sequence[Slide], settings: Experiment, stores: Path) -> Path:
    """A folder of stores in which an attached store of these slides and this scale stands as links to its files.

    Links, because a store keeps the table of every grid beside its pixels, and a mount cannot be written.
    """
    mark = fingerprint(slides, settings.scale)
    found = attached.store(mark)
    if found is None:
        log.info("no attached tile store is of these slides and this scale (%s); it is made for this session", mark)
        return stores
    log.info("tile store %s", found)
    (stores / mark).mkdir(parents=True, exist_ok=True)
    for source in found.iterdir():
        link = stores / mark / source.name
        if not link.exists():
            link.symlink_to(source.resolve())
    return stores
