"""Pushing a rendered kernel so that it runs, after the checks that save GPU hours: the bundle that Kaggle serves, the quota, the machine."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from hubmap_kit.errors import PublishError
from hubmap_kit.files import write_json
from hubmap_kit.publish import quota
from hubmap_kit.publish.answers import KaggleRefusal
from hubmap_kit.publish.client import Kaggle
from hubmap_kit.publish.kernel_metadata import RETIRED, SHAPES, read_metadata
from hubmap_kit.publish.kernels import LONGEST_HOURS, rendered_constants
from hubmap_kit.publish.metadata import slug as dataset_slug
from hubmap_kit.publish.push import published

log = logging.getLogger(__name__)
_CLOSING_HOURS = 0.3  # between a kernel's own limit and the moment at which Kaggle is told to end it: saving, and the upload of the output


@dataclass(frozen=True)
class Pushed:
    """What was pushed. `earlier_log` is the hash of the log that Kaggle had before, so that an old end is not taken for the new one."""

    kernel: str
    ref: str
    url: str
    version: int
    build_id: str
    time_utc: str
    earlier_log: str = ""


def launch(kaggle: Kaggle, folder: Path, force: bool = False) -> Pushed:
    """Push the kernel rendered in `folder` and let it run; the answer is also kept in `<folder>.pushed.json`.

    Raises PublishError, before anything is pushed, for a retired accelerator, another account, a code dataset on Kaggle that is not
    the one that the kernel was rendered for, or too little quota (unless `force`).
    """
    metadata, constants, name = read_metadata(folder), rendered_constants(folder), folder.name
    ref, hours, wanted = str(metadata.get("id")), constants.get("SESSION_HOURS"), str(constants.get("BUILD_ID"))
    _check_machine(metadata.get("machine_shape"))
    if ref.partition("/")[0].lower() != kaggle.owner.lower():
        raise PublishError(
            f"{folder} was rendered for {ref}, but the Kaggle credentials are those of {kaggle.owner}; "
            f"render it again with 'hubmap kernels {name}'"
        )
    check_bundle(kaggle, wanted)
    if metadata.get("enable_gpu"):
        check_quota(kaggle, name, hours or LONGEST_HOURS[name], force)
    earlier = log_hash(_earlier_log(kaggle, ref))
    push = kaggle.save_kernel(folder, run=True, timeout_s=_timeout(name, hours))
    pushed = Pushed(name, push.ref, push.url, push.version, wanted, datetime.now(timezone.utc).isoformat(timespec="seconds"), earlier)
    write_json(record(folder), asdict(pushed))
    return pushed


def record(folder: Path) -> Path:
    """Where the last push of a rendered kernel is kept: beside its folder, which rendering empties."""
    return folder.with_name(f"{folder.name}.pushed.json")


def last_push(folder: Path) -> Pushed | None:
    """The last push of a kernel from this machine, or None."""
    try:
        return Pushed(**json.loads(record(folder).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise PublishError(f"{record(folder)} is damaged ({error}); delete it, the next push writes it anew") from error


def check_bundle(kaggle: Kaggle, wanted: str) -> None:
    """Make sure that Kaggle serves the code bundle `wanted` to whoever starts a kernel now. Raises PublishError otherwise."""
    slug = dataset_slug("code")
    ref, state = f"{kaggle.owner}/{slug}", kaggle.dataset(slug)
    if state is None:
        raise PublishError(f"Kaggle shows no dataset {ref} yet, so the kernel would find no code; run 'hubmap push code' first")
    if state.status != "ready":
        raise PublishError(f"the dataset {ref} is '{state.status}' on Kaggle, not ready; run 'hubmap push code', which waits until it is")
    served = published(kaggle, slug)
    if served is None or served.build_id != wanted:
        raise PublishError(
            f"Kaggle serves {f'build {served.build_id}' if served else 'no readable BUILD_ID.json'} in {ref}, but the kernel expects "
            f"build {wanted} and would not run; run 'hubmap push code', which waits until the new one is served, then push the kernel again"
        )


def check_quota(kaggle: Kaggle, name: str, hours: float, force: bool) -> None:
    """Refuse a GPU session that may outlast the week's quota. Raises PublishError unless `force`."""
    budget = quota.read(kaggle)
    log.info("%s", quota.sentence(budget))
    if quota.fits(hours, budget):
        return
    text = f"{name} may run {hours:g} h, but only {quota.sentence(budget)}"
    if not force:
        raise PublishError(f"{text}; give it fewer with --hours, wait, or push it all the same with --force")
    log.warning("%s; pushed all the same", text)


def log_hash(text: str) -> str:
    """A hash that tells logs apart; empty for an empty log."""
    return hashlib.sha256(text.encode()).hexdigest() if text.strip() else ""


def _check_machine(shape: object) -> None:
    for profile, reason in RETIRED.items():
        if shape == SHAPES[profile]:
            raise PublishError(f"the accelerator {profile} is retired: {reason}; push with --accelerator t4x2")


def _earlier_log(kaggle: Kaggle, ref: str) -> str:
    try:
        return kaggle.kernel_log(ref)
    except KaggleRefusal as error:
        if error.status in (403, 404):
            return ""  # a kernel that was never pushed
        raise


def _timeout(name: str, hours: float | None) -> int | None:
    """Seconds after which Kaggle itself ends the session, should the kernel hang; None leaves Kaggle's own limit."""
    return None if hours is None else round(min(hours + _CLOSING_HOURS, LONGEST_HOURS[name]) * 3600)
