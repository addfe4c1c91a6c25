"""Pushing a rendered kernel so that it runs, after the checks that save GPU hours: what Kaggle serves, the quota, the machine."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hubmap_kit.errors import PublishError
from hubmap_kit.publish import quota, records
from hubmap_kit.publish.answers import KaggleRefusal, KaggleUnavailable
from hubmap_kit.publish.client import Kaggle
from hubmap_kit.publish.kernel_metadata import RETIREMENT, SHAPES, read_metadata, retired
from hubmap_kit.publish.kernels import LONGEST_HOURS, rendered_constants
from hubmap_kit.publish.metadata import slug as dataset_slug
from hubmap_kit.publish.ready import published
from hubmap_kit.publish.records import Intent, Pushed
from hubmap_kit.runtime.build_id import KINDS

log = logging.getLogger(__name__)
_CLOSING_HOURS = 0.3  # between a kernel's own limit and the moment at which Kaggle is told to end it: saving, and the upload of the output


def launch(kaggle: Kaggle, folder: Path, force: bool = False) -> Pushed:
    """Push the kernel rendered in `folder` and let it run; the answer is also kept beside the folder.

    Raises PublishError, before anything is pushed, for a retired accelerator, another account, code or weights on Kaggle that are not those
    that the kernel was rendered for, an input of the account that is not there, and, unless `force`, too little quota or an earlier push
    that went through although its answer was lost. Ctrl-C during the push itself carries a sentence.
    """
    metadata, constants, name = read_metadata(folder), rendered_constants(folder), folder.name
    ref, hours = str(metadata.get("id")), constants.get("SESSION_HOURS")
    code, weights = str(constants.get("BUILD_ID")), str(constants.get("WEIGHTS_ID") or "")
    if retired(shape := metadata.get("machine_shape")):
        profile = next((profile for profile, known in SHAPES.items() if known == shape), shape)
        raise PublishError(f"the accelerator {profile} is retired: {RETIREMENT}; push with --accelerator t4x2")
    if ref.partition("/")[0].lower() != kaggle.owner.lower():
        raise PublishError(
            f"{folder} was rendered for {ref}, but the Kaggle credentials are those of {kaggle.owner}; "
            f"render it again with 'hubmap kernels {name}'"
        )
    check_served(kaggle, "code", code)
    if weights:
        check_served(kaggle, "weights", weights)
    check_inputs(kaggle, metadata)
    if metadata.get("enable_gpu"):
        check_quota(kaggle, name, hours or LONGEST_HOURS[name], force)
    _check_lost_push(kaggle, folder, force)
    utc = datetime.now(timezone.utc).isoformat(timespec="seconds")
    push = Intent(name, ref, code, weights, utc, log_hash(_earlier_log(kaggle, ref)), kaggle.kernel_version(ref))
    return _save(kaggle, folder, push, _timeout(name, hours))


def check_served(kaggle: Kaggle, kind: str, wanted: str) -> None:
    """Make sure that Kaggle serves the build `wanted` of a dataset to whoever starts a kernel now. Raises PublishError otherwise."""
    slug, again = dataset_slug(kind), f"run 'hubmap push {kind}'"
    ref, state = f"{kaggle.owner}/{slug}", kaggle.dataset(slug)
    if state is None:
        raise PublishError(f"Kaggle shows no dataset {ref} yet, so the kernel would find no {kind}; {again} first")
    if state.status != "ready":
        raise PublishError(f"the dataset {ref} is '{state.status}' on Kaggle, not ready; {again}, which waits until it is")
    served = published(kaggle, slug)
    if served is None or served.build_id != wanted:
        raise PublishError(
            f"Kaggle serves {f'build {served.build_id}' if served else 'no readable BUILD_ID.json'} in {ref}, but the kernel expects "
            f"build {wanted} and would not run; {again}, which waits until the new one is served, then push the kernel again"
            + (", or add --force to run with the weights that Kaggle serves" if kind == "weights" else "")
        )


def check_inputs(kaggle: Kaggle, metadata: Mapping[str, Any]) -> None:
    """Make sure that the account's own inputs are there: Kaggle would save and run the kernel without them. Raises PublishError."""
    own = f"{kaggle.owner}/".lower()
    for ref in metadata.get("dataset_sources", []):
        state = kaggle.dataset(slug := ref.partition("/")[2]) if ref.lower().startswith(own) else None
        if ref.lower().startswith(own) and (state is None or state.status != "ready"):
            kind = next((kind for kind in KINDS if dataset_slug(kind) == slug), None)
            advice = f"run 'hubmap push {kind}' first" if kind else "upload it first"
            found = f"is '{state.status}', not ready" if state else "does not exist or is still being created"
            raise PublishError(f"the input {ref} {found} on Kaggle; {advice}, or name the inputs that the kernel is to have with --attach-only")
    for ref in metadata.get("kernel_sources", []):
        if ref.lower().startswith(own) and (status := _session(kaggle, ref)) != "COMPLETE":
            log.warning("the input %s is %s on Kaggle; the kernel gets the output that it has when it starts", ref, status.lower())


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


def _save(kaggle: Kaggle, folder: Path, push: Intent, timeout_s: int | None) -> Pushed:
    """Save the kernel, noted before and after: whatever comes between, the next command can ask what became of it."""
    look = f"'hubmap kernels {push.kernel} --follow' asks whether it was, as {records.page(push.ref)} shows too"
    records.begin(folder, push)
    try:
        saved = kaggle.save_kernel(folder, timeout_s)
    except KaggleUnavailable as error:
        raise PublishError(f"{str(error).partition(';')[0]}; kernel {push.ref} may have been saved all the same: {look}") from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"stopped while kernel {push.ref} was being saved; it may have been taken all the same: {look}") from None
    except PublishError:
        records.refused(folder)
        raise
    return records.taken(folder, push, saved.url, saved.version)


def _check_lost_push(kaggle: Kaggle, folder: Path, force: bool) -> None:
    """An earlier push without an answer may be running. Raises PublishError unless `force`."""
    found = records.recover(kaggle, folder)
    if found is not None and not force:
        raise PublishError(
            f"the push of {found.ref} at {found.time_utc} went through as version {found.version} although its answer was lost; "
            f"look at it with 'hubmap kernels {found.kernel} --follow', or run this again to push another"
        )


def _session(kaggle: Kaggle, ref: str) -> str:
    try:
        return kaggle.kernel_status(ref).status
    except KaggleRefusal as error:
        if error.status not in (403, 404):
            raise
        raise PublishError(f"the input kernel {ref} does not exist on Kaggle; push it and wait for its end first, or leave that input out") from error


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
