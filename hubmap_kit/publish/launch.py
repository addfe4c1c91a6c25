"""Pushing a rendered kernel so that it runs, after the checks that save GPU hours: what Kaggle serves, the quota, the
machine.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hubmap_kit.build_id import KINDS
from hubmap_kit.errors import PublishError, finding
from hubmap_kit.publish import records
from hubmap_kit.publish.answers import a_check, check_private
from hubmap_kit.publish.client import AnswerLost, Kaggle, KaggleRefusal, KaggleUnavailable, KernelPush, SessionsBusy
from hubmap_kit.publish.kernels import LONGEST_HOURS, rendered_constants
from hubmap_kit.publish.metadata import RETIREMENT, SHAPES, dataset_slug, read_metadata, retired
from hubmap_kit.publish.plan import budget_sentence, read_budget, session_fits
from hubmap_kit.publish.ready import UNREADY, served
from hubmap_kit.publish.records import Intent, Pushed
from hubmap_kit.publish.session import kernel_page

log = logging.getLogger(__name__)
LOST_LOOKS = 3  # at a kernel's number for a push whose answer was lost
# Between a kernel's own limit and the moment at which Kaggle is told to end it: saving, and the upload of the output.
_CLOSING_HOURS = 0.3
_FORCED = "or push it all the same with --force"


def launch(kaggle: Kaggle, folder: Path, force: bool = False, pause_s: float = 2.0, wait_hours: float = 0.0) -> Pushed:
    """Push the kernel rendered in `folder` and let it run; the answer is also kept beside the folder.

    `wait_hours`: how long to try again, ten times `pause_s` apart, while the account's sessions are all in use. Raises
    PublishError, before anything is pushed and unless `force`, for a retired accelerator, another account, code or
    weights on Kaggle that are not those that the kernel was rendered for, an input of the account that is not there,
    too little quota, or an earlier push whose answer was lost and that went through, or may have; and, once it is
    saved, where it lacks an input or is public. Ctrl-C during the push itself carries a sentence.
    """
    metadata, constants, name = read_metadata(folder), rendered_constants(folder), folder.name
    ref, hours = str(metadata.get("id")), constants.get("SESSION_HOURS")
    builds = {"code": str(constants.get("BUILD_ID")), "weights": str(constants.get("WEIGHTS_ID") or "")}
    with a_check(force):
        _check_target(kaggle, folder, metadata)
    for kind in filter(builds.get, builds):
        with a_check(force):
            check_served(kaggle, kind, builds[kind])
    with a_check(force):
        check_inputs(kaggle, metadata)
    with a_check(force):
        if metadata.get("enable_gpu"):
            check_quota(kaggle, name, hours or LONGEST_HOURS[name])
    with a_check(force):
        _check_lost_push(kaggle, folder)
    deadline = time.monotonic() + wait_hours * 3600
    while True:
        utc = datetime.now(UTC).isoformat(timespec="seconds")
        push = Intent(
            name,
            ref,
            builds["code"],
            builds["weights"],
            utc,
            log_hash(_earlier_log(kaggle, ref)),
            _version_before(kaggle, folder, ref),
        )
        try:
            return _save(kaggle, folder, push, _timeout(name, hours), force, pause_s)
        except SessionsBusy as busy:
            if time.monotonic() + 10 * pause_s > deadline:
                raise
            log.info("%s (trying again in %.0f s; Ctrl-C ends that)", finding(busy), 10 * pause_s)
            time.sleep(10 * pause_s)


def check_served(kaggle: Kaggle, kind: str, wanted: str) -> None:
    """Make sure that Kaggle serves the build `wanted` of a dataset to whoever starts a kernel now.

    Raises PublishError otherwise.
    """
    slug, again = dataset_slug(kind), f"run 'hubmap push {kind}'"
    ref, state = f"{kaggle.owner}/{slug}", kaggle.dataset(slug)
    if state is None:
        raise PublishError(
            f"Kaggle shows no dataset {ref} yet, so the kernel would find no {kind}; {again} first, {_FORCED}"
        )
    if state.status in UNREADY:
        raise PublishError(
            f"the dataset {ref} is '{state.status}' on Kaggle, not ready; {again}, which waits until it is, {_FORCED}"
        )
    held = served(kaggle, slug)
    if held.build is None:
        raise PublishError(
            f"whether Kaggle serves build {wanted} is not known, as {ref} {held.why}; {again}, which waits until it can"
            f" be read, {_FORCED}: it checks the build itself when it starts"
        )
    if held.build.build_id != wanted:
        raise PublishError(
            f"Kaggle serves build {held.build.build_id} in {ref}, but the kernel expects build {wanted} and would not"
            f" run; {again}, which waits until the new one is served, then push the kernel again"
            + (", or add --force to run with the weights that Kaggle serves" if kind == "weights" else "")
        )


def check_inputs(kaggle: Kaggle, metadata: Mapping[str, Any]) -> None:
    """Make sure that the account's own inputs are there: Kaggle would save and run the kernel without them.

    Raises PublishError.
    """
    own = f"{kaggle.owner}/".lower()
    for ref in metadata.get("dataset_sources", []):
        if not ref.lower().startswith(own):
            continue
        try:
            state = kaggle.dataset(slug := ref.partition("/")[2])
        except KaggleUnavailable as error:
            log.warning("whether the input %s is there could not be checked (%s)", ref, finding(error))
            continue
        if state is None or state.status in UNREADY:
            kind = next((kind for kind in KINDS if dataset_slug(kind) == slug), None)
            advice = f"run 'hubmap push {kind}' first" if kind else "upload it first"
            found = f"is '{state.status}', not ready" if state else "does not exist or is still being created"
            advice += ", or name the inputs that the kernel is to have with --attach-only"
            raise PublishError(f"the input {ref} {found} on Kaggle; {advice}, {_FORCED}")
    for ref in metadata.get("kernel_sources", []):
        if ref.lower().startswith(own) and (status := _session(kaggle, ref)) != "COMPLETE":
            said = status.lower() or "in a state that Kaggle does not tell"
            log.warning(
                "the input %s is %s on Kaggle; the kernel gets the output that it has when it starts", ref, said
            )


def check_quota(kaggle: Kaggle, name: str, hours: float) -> None:
    """Raise PublishError for a GPU session that may outlast the week's quota.

    One that Kaggle does not tell stops nothing.
    """
    budget = read_budget(kaggle)
    log.log(logging.WARNING if budget.assumed else logging.INFO, "%s", budget_sentence(budget))
    if not session_fits(hours, budget):
        raise PublishError(
            f"{name} may run {hours:g} h, but only {budget_sentence(budget)}; give it fewer with --hours, wait,"
            f" {_FORCED}"
        )


def log_hash(text: str) -> str:
    """A hash that tells logs apart; empty for an empty log."""
    return hashlib.sha256(text.encode()).hexdigest() if text.strip() else ""


def _save(kaggle: Kaggle, folder: Path, push: Intent, timeout_s: int | None, force: bool, pause_s: float) -> Pushed:
    """Save the kernel, noted before and after: whatever comes between, the next command can ask what became of it."""
    look = f"'hubmap kernels {push.kernel} --follow' asks whether it was, as {kernel_page(push.ref)} shows too"
    records.begin(folder, push)
    try:
        saved = kaggle.save_kernel(folder, timeout_s)
    except AnswerLost as error:
        saved = _found_again(kaggle, push, str(error), look, pause_s)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"stopped while kernel {push.ref} was being saved; it may have been taken all the same: {look}"
        ) from None
    except PublishError:
        records.refused(folder)
        raise
    version = saved.version
    if not version or saved.ref.lower() != push.ref.lower():
        said = (
            f"Kaggle took kernel {push.ref}, but says neither where nor as which version"
            if not version
            else f"kernel {push.ref} landed at {saved.ref}"
        )
        version = _found_again(kaggle, push, said, look, pause_s).version
    pushed = records.taken(folder, push, saved.url, version)
    with a_check(force):
        _check_saved(kaggle, pushed, saved)
    return pushed


def _found_again(kaggle: Kaggle, push: Intent, said: str, look: str, pause_s: float) -> KernelPush:
    """The version that a push became although no answer says so.

    Raises PublishError, with the intent kept, where Kaggle does not show one.
    """
    for attempt in range(LOST_LOOKS):
        if version := records.new_version(kaggle, push):
            log.warning("%s; but Kaggle shows version %d of it, which was not there before", said, version)
            return KernelPush(push.ref, kernel_page(push.ref), version)
        if attempt < LOST_LOOKS - 1:
            time.sleep(pause_s * 3**attempt)
    raise PublishError(f"{said}; kernel {push.ref} may have been saved all the same: {look}")


def _check_saved(kaggle: Kaggle, pushed: Pushed, saved: KernelPush) -> None:
    """Raise PublishError for a version that was saved and runs where it lacks an input, or where others can see it."""
    there = f"kernel {pushed.ref} was saved as version {pushed.version} and runs, but"
    if saved.lacking:
        raise PublishError(
            f"{there} it was saved without its {saved.lacking}, which Kaggle does not know or this account may not use;"
            f" end that version on {pushed.url}, push the source first or accept its rules, then push the kernel again"
        )
    try:
        private = kaggle.kernel(pushed.ref).private
    except PublishError as error:
        log.debug("%s", error)
        private = None
    follow = f"'hubmap kernels {pushed.kernel} --follow'"
    public = (
        f"{there} it is public on Kaggle; make it private in its settings at {pushed.url}, then follow it with {follow}"
    )
    check_private(f"kernel {pushed.ref}", private, pushed.url, public)


def _check_target(kaggle: Kaggle, folder: Path, metadata: Mapping[str, Any]) -> None:
    """Raise PublishError for a machine that is retired, and for another account."""
    ref, shape = str(metadata.get("id")), metadata.get("machine_shape")
    if retired(shape):
        profile = next((profile for profile, known in SHAPES.items() if known == shape), shape)
        raise PublishError(f"the accelerator {profile} is retired: {RETIREMENT}; push with --accelerator t4x2")
    if ref.partition("/")[0].lower() != kaggle.owner.lower():
        raise PublishError(
            f"{folder} was rendered for {ref}, but the Kaggle credentials are those of {kaggle.owner}; "
            f"render it again with 'hubmap kernels {folder.name}'"
        )


def _check_lost_push(kaggle: Kaggle, folder: Path) -> None:
    """Raise PublishError where an earlier push without an answer is running, or may be."""
    found = records.recover(kaggle, folder)
    if isinstance(found, Pushed):
        raise PublishError(
            f"the push of {found.ref} at {found.time_utc} went through as version {found.version} although its answer"
            f" was lost; look at it with 'hubmap kernels {found.kernel} --follow', or run this again to push another"
        )
    if found is not None:
        later = (
            "" if found.before is None else ", run this again in some minutes"
        )  # without a number to compare with, time tells nothing
        raise PublishError(
            f"whether the push of {found.ref} at {found.time_utc}, whose answer was lost, went through is not"
            f" known{' yet' if later else ''}; look at {kernel_page(found.ref)} or with 'hubmap kernels {found.kernel}"
            f" --follow'{later}, {_FORCED}"
        )


def _session(kaggle: Kaggle, ref: str) -> str:
    """The status of an input's last session; empty where Kaggle does not tell it.

    Raises PublishError where it shows none.
    """
    try:
        return kaggle.kernel_status(ref).status
    except PublishError as error:
        if isinstance(error, KaggleRefusal) and kaggle.kernel(ref).version == 0:
            advice = "push it and wait for its end first, leave that input out"
            raise PublishError(
                f"the input kernel {ref} does not exist on Kaggle (HTTP {error.status}); {advice}, {_FORCED}"
            ) from error
        log.warning("%s", finding(error))
        return ""


def _earlier_log(kaggle: Kaggle, ref: str) -> str:
    """The log of the session before; empty where there was none, or where Kaggle does not hand it out."""
    try:
        return kaggle.kernel_log(ref)
    except PublishError as error:
        log.debug("%s", error)
        return ""


def _version_before(kaggle: Kaggle, folder: Path, ref: str) -> int | None:
    """The kernel's newest version; 0: none yet, None: not known."""
    try:
        found = kaggle.kernel(ref).version
    except PublishError as error:
        log.warning("%s; should the answer to the push be lost, nothing can tell what became of it", finding(error))
        return None
    # A kernel that Kaggle denies for a moment looks like one that was never there.
    last = records.last_push(folder)
    return found if found is None or last is None or last.ref != ref else max(found, last.version)


def _timeout(name: str, hours: float | None) -> int | None:
    """Seconds after which Kaggle itself ends the session, should the kernel hang; None leaves Kaggle's own limit."""
    return None if hours is None else round(min(hours + _CLOSING_HOURS, LONGEST_HOURS[name]) * 3600)
