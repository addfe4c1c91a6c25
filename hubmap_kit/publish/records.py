"""What was pushed from this machine: beside each rendered kernel its last push, and one whose answer has not come or
was lost.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hubmap_kit.errors import PublishError
from hubmap_kit.files import write_json
from hubmap_kit.publish.client import Kaggle
from hubmap_kit.publish.root import place
from hubmap_kit.publish.session import kernel_page

log = logging.getLogger(__name__)
SETTLES_IN = timedelta(minutes=10)  # what Kaggle has taken is shown by then


@dataclass(frozen=True)
class Intent:
    """A push about to be made. `before`: the kernel's newest version then (0: none, None: Kaggle names no number).

    `earlier_log` is the hash of the log that Kaggle had before, so that an old end is not taken for the new one;
    `place` is the Kaggle or stand-in that it goes to.
    """

    kernel: str
    ref: str
    build_id: str
    weights_id: str
    time_utc: str
    earlier_log: str
    before: int | None
    place: str = field(default_factory=place)


@dataclass(frozen=True)
class Pushed:
    """What was pushed, and as which version (0: Kaggle named none); the rest as in Intent.

    A record that names no `place` is not believed.
    """

    kernel: str
    ref: str
    url: str
    version: int
    build_id: str
    time_utc: str
    earlier_log: str = ""
    weights_id: str = ""
    place: str = ""


def last_push(folder: Path) -> Pushed | None:
    """The last push of the kernel rendered in `folder` to the Kaggle in use, or None.

    A stand-in's never counts for a real one.
    """
    values = _read(pushed_path(folder))
    return _here(_made(Pushed, values, pushed_path(folder))) if values is not None else None


def intent(folder: Path) -> Intent | None:
    """The push whose outcome is not known, or None."""
    values = _read(intent_path(folder))
    return _here(_made(Intent, values, intent_path(folder))) if values is not None else None


def begin(folder: Path, push: Intent) -> None:
    """Note that a push is about to be made."""
    write_json(intent_path(folder), asdict(push))


def refused(folder: Path) -> None:
    """Note that the push was not taken."""
    intent_path(folder).unlink(missing_ok=True)


def as_pushed(push: Intent, url: str, version: int) -> Pushed:
    """The record of a push that became a version; 0: one whose number is not known."""
    return Pushed(
        push.kernel, push.ref, url, version, push.build_id, push.time_utc, push.earlier_log, push.weights_id, push.place
    )


def taken(folder: Path, push: Intent, url: str, version: int) -> Pushed:
    """Note that the push became a version, and return the record."""
    pushed = as_pushed(push, url, version)
    write_json(pushed_path(folder), asdict(pushed))
    intent_path(folder).unlink(missing_ok=True)
    return pushed


def recover(kaggle: Kaggle, folder: Path) -> Pushed | Intent | None:
    """Ask Kaggle what became of a push without an answer: its record when it went through, the intent while that is not
    known.

    None: there is no such push, or it did not go through.
    """
    push = intent(folder)
    if push is None or push.ref.partition("/")[0].lower() != kaggle.owner.lower():
        return None
    version = new_version(kaggle, push)
    if version:
        log.warning(
            "the push of %s at %s, whose answer was lost, went through as version %d", push.ref, push.time_utc, version
        )
        return taken(folder, push, kernel_page(push.ref), version)
    if version is None or not _old(push.time_utc):
        return push
    log.warning(
        "the push of %s at %s, whose answer was lost, did not go through as far as Kaggle shows",
        push.ref,
        push.time_utc,
    )
    return None


def new_version(kaggle: Kaggle, push: Intent) -> int | None:
    """The version that a push became: 0 while Kaggle shows none that was not there before, None where it names no
    numbers.
    """
    try:
        now = kaggle.kernel(push.ref).version
    except PublishError as error:
        log.warning("%s", error)
        return None
    if now is None or push.before is None:
        return None
    return push.before + 1 if now > push.before else 0  # a later one may be somebody else's


def settled(moment: datetime) -> bool:
    """Whether what was asked for at a moment would be shown by now, had Kaggle taken it."""
    return datetime.now(UTC) - moment > SETTLES_IN


def pushed_path(folder: Path) -> Path:
    """Where the last push is kept: beside the rendered folder, which rendering empties."""
    return folder.with_name(f"{folder.name}.pushed.json")


def intent_path(folder: Path) -> Path:
    """Where a push is noted while its outcome is not known."""
    return folder.with_name(f"{folder.name}.pushing.json")


def _old(time_utc: str) -> bool:
    try:
        return settled(datetime.fromisoformat(time_utc))
    except (ValueError, TypeError):
        return True


def _here(found: Any) -> Any:
    return found if found.place == place() else None


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise PublishError(f"{path} is damaged ({error}); delete it, the next push writes it anew") from error


def _made(kind: Any, values: Any, path: Path) -> Any:
    try:
        known = {each.name for each in fields(kind)}
        return kind(**{key: value for key, value in values.items() if key in known})
    except (AttributeError, TypeError) as error:
        raise PublishError(f"{path} is damaged ({error}); delete it, the next push writes it anew") from error
