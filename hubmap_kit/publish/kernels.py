"""Rendered kernels: build/kernels/<name> with one script that Kaggle runs as it is, and the metadata that it is pushed
with.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubmap_kit import experiment
from hubmap_kit.competition.folds import check_folds
from hubmap_kit.config import Experiment
from hubmap_kit.errors import PublishError, did_you_mean
from hubmap_kit.files import sweep, write_json, write_text
from hubmap_kit.publish.metadata import (
    KERNEL_METADATA,
    KERNELS,
    RETIREMENT,
    SHAPES,
    Sources,
    kernel_metadata,
    read_metadata,
    retired,
)
from hubmap_kit.publish.root import build_folder, repository
from hubmap_kit.publish.script import bake, constants_of

log = logging.getLogger(__name__)

LONGEST_HOURS = {
    "train": 12.0,
    "infer": 9.0,
    "tiles": 12.0,
}  # Kaggle's limit of a session; a code competition's limit of a submission
MARGIN_HOURS = 0.25  # what a kernel's own limit must leave of Kaggle's, to save and to upload its output
_OWNER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Choice:
    """What a person chooses for the kernels at hand; None and empty keep what the scripts in the repository say."""

    config: str | None
    folds: Sequence[int] | None
    overrides: Sequence[str]
    hours: float | None
    accelerator: str | None
    resume: bool


@dataclass
class _Draft:
    """One kernel on its way: its files in the repository, and the options that it has made use of."""

    name: str
    script: str
    bootstrap: str
    template: dict[str, Any]
    constants: dict[str, object]
    used: set[str] = field(default_factory=set)


def render(
    names: Sequence[str],
    owner: str,
    build_ids: Mapping[str, str],
    out: Path | None = None,
    config: str | None = None,
    folds: Sequence[int] | None = None,
    overrides: Sequence[str] = (),
    hours: float | None = None,
    accelerator: str | None = None,
    attach: Sequence[str] | None = None,
    resume: bool = False,
    image: str | None = None,
    more: Sequence[str] = (),
) -> list[Path]:
    """Render kernels for the account `owner` into `out`/<name> (default: kernels in `root.build_folder()`) and return
    the folders.

    `build_ids["code"]` is the bundle that the kernels must find on Kaggle, `build_ids["weights"]`, where it is given,
    the weights that infer must find where they are one of its inputs. None keeps what the script in the repository
    says. `overrides` are `section.key=value`; infer takes those of `inference` only. `attach` is kinds of datasets
    (weights, tiles, pretrained), `kernel:NAME` for a kernel's last output, or `owner/slug`; None is weights for infer,
    and pretrained for a training that starts from encoder weights. `more` inputs come on top. `resume` attaches train's
    own last output. `image` is `sha256:...` of Kaggle's image, or a whole reference.

    Raises PublishError for an unknown name, an option that means nothing to any of the kernels, and what Kaggle would
    refuse; ConfigError for a setting that the experiment does not have.
    """
    choice = Choice(config, folds, tuple(overrides), hours, accelerator, resume)
    _check_request(names, owner, choice, attach is not None or bool(more))
    drafts = [_draft(name) for name in names]
    ready = []
    for draft in drafts:
        constants = _constants(draft, build_ids["code"], choice)
        inputs = (*(_usual_inputs(draft, constants) if attach is None else attach), *more)
        if "WEIGHTS_ID" in draft.constants and "weights" in inputs:
            constants["WEIGHTS_ID"] = _weights(build_ids)
        script = bake(draft.script, draft.bootstrap, constants, f"{draft.name}.py")
        sources = Sources(owner, _machine(draft, choice), inputs, resume and draft.name == "train", image)
        ready.append((draft.name, script, kernel_metadata(draft.name, draft.template, sources)))
    _check_used(choice, names, set().union(*(draft.used for draft in drafts)))
    target = out or build_folder() / "kernels"
    return [_write(target, name, script, metadata) for name, script, metadata in ready]


def rendered_constants(folder: Path) -> dict[str, Any]:
    """The constants of a rendered script. Raises PublishError when it is not there."""
    path = folder / f"{folder.name}.py"
    if not path.is_file():
        raise PublishError(f"{path} does not exist; render it with 'hubmap kernels {folder.name}'")
    return constants_of(path.read_text(encoding="utf-8"), str(path))


def _check_request(names: Sequence[str], owner: str, choice: Choice, attached: bool) -> None:
    for name in names:
        if name not in KERNELS:
            raise PublishError(
                f"there is no kernel '{name}'; expected {', '.join(KERNELS)}{did_you_mean(name, KERNELS)}"
            )
    if not _OWNER.fullmatch(owner):
        raise PublishError(
            f"'{owner}' is no name of a Kaggle account; give the name that your profile's address ends with"
        )
    if choice.accelerator is not None and choice.accelerator not in SHAPES:
        raise PublishError(f"--accelerator is '{choice.accelerator}'; expected {', '.join(SHAPES)}")
    if attached and len(names) != 1:
        raise PublishError(
            f"--attach is meant for one kernel, but {', '.join(names)} are rendered; name the one, such as 'hubmap"
            " kernels infer'"
        )


def _draft(name: str) -> _Draft:
    folder = repository() / "kernels"
    try:
        script = (folder / name / f"{name}.py").read_text(encoding="utf-8")
        bootstrap = (folder / "bootstrap.py").read_text(encoding="utf-8")
    except OSError as error:
        raise PublishError(
            f"{error.filename} cannot be read ({error.strerror}); restore it from the repository"
        ) from error
    return _Draft(name, script, bootstrap, read_metadata(folder / name), constants_of(script, f"{name}.py"))


def _constants(draft: _Draft, code: str, choice: Choice) -> dict[str, object]:
    """The constants to set: every chosen setting that the kernel has, and the build id."""
    wanted = {
        "CONFIG": ("--config", choice.config),
        "FOLDS": ("--folds", None if choice.folds is None else sorted(set(choice.folds))),
        "SESSION_HOURS": ("--hours", choice.hours),
        "ACCELERATOR": ("--accelerator", choice.accelerator),
    }
    constants: dict[str, object] = {"BUILD_ID": code}
    for key, (option, value) in wanted.items():
        if key in draft.constants and value is not None:
            constants[key] = value
            draft.used.add(option)
    overrides = [text for text in choice.overrides if draft.name != "infer" or text.startswith("inference.")]
    if overrides:
        constants["OVERRIDES"] = overrides
        draft.used |= {f"--set {text}" for text in overrides}
    if choice.resume and draft.name == "train":
        constants["RESUME"] = True
        draft.used.add("--resume")
    _check_hours(draft.name, constants.get("SESSION_HOURS"))
    settings = _experiment(draft, constants)
    if "FOLDS" in draft.constants:
        count = settings.data.n_folds
        check_folds(choice.folds, range(count), source=f"data.n_folds is {count}, which gives")
    return constants


def _weights(build_ids: Mapping[str, str]) -> str:
    """The weights that infer must find; empty, with a warning, where nobody knows."""
    if not build_ids.get("weights"):
        log.warning(
            "the build of the weights is not known here, so infer takes whichever version is mounted; 'hubmap push"
            " weights' makes it known"
        )
    return build_ids.get("weights", "")


def _machine(draft: _Draft, choice: Choice) -> str:
    """The accelerator profile; a script that names none runs without."""
    if "ACCELERATOR" not in draft.constants:
        return "cpu"
    profile = choice.accelerator or str(draft.constants["ACCELERATOR"])
    if retired(SHAPES.get(profile)):
        log.warning("%s: %s; this kernel can be rendered, but not pushed", draft.name, RETIREMENT)
    return profile


def _check_hours(name: str, hours: object) -> None:
    most = LONGEST_HOURS[name] - MARGIN_HOURS
    if isinstance(hours, float) and not 0 < hours <= most:
        raise PublishError(
            f"--hours is {hours:g}, but {name} may take at most {most:g} of the {LONGEST_HOURS[name]:g} hours after"
            " which Kaggle ends it; choose fewer, or name one kernel"
        )


def _experiment(draft: _Draft, constants: Mapping[str, Any]) -> Experiment:
    """What the kernel will make of its settings: a misspelt one is found here, not after a session has started.

    Infer's settings go onto the runs' own experiments; the first shipped one stands in for them.
    """
    values = {**draft.constants, **constants}
    known = experiment.shipped()
    config = str(values.get("CONFIG", next(iter(known))))
    if config not in known:
        raise PublishError(
            f"--config is '{config}', but a kernel knows only the experiments of the published wheel"
            f" ({', '.join(known)}); put the file into hubmap_kit/configs and push the code, or use --set"
        )
    return experiment.load(config, values["OVERRIDES"])


def _usual_inputs(draft: _Draft, constants: Mapping[str, Any]) -> tuple[str, ...]:
    """What a kernel is given where nobody says so."""
    if draft.name == "infer":
        return ("weights",)
    return ("pretrained",) if draft.name == "train" and _experiment(draft, constants).model.encoder_weights else ()


def _check_used(choice: Choice, names: Sequence[str], used: Collection[str]) -> None:
    asked = {
        "--config": choice.config,
        "--folds": choice.folds,
        "--hours": choice.hours,
        "--accelerator": choice.accelerator,
    }
    given = [option for option, value in asked.items() if value is not None] + [
        f"--set {text}" for text in choice.overrides
    ]
    for option in [*given, "--resume"] if choice.resume else given:
        if option not in used:
            raise PublishError(
                f"{option} means nothing to {' and '.join(names)}; leave it out, or name the kernel that it is for"
            )


def _write(target: Path, name: str, script: str, metadata: Mapping[str, Any]) -> Path:
    """Write the folder under a temporary name and swap it in, so that nothing of an earlier rendering stays."""
    folder, temporary = target / name, target / f".{name}.{os.getpid()}.tmp"
    if (
        folder.is_dir()
        and any(folder.iterdir())
        and (not (folder / KERNEL_METADATA).is_file() or (target / "bootstrap.py").exists())
    ):
        raise PublishError(
            f"{folder} is not a folder that a kernel was rendered into; choose another --out, nothing was written"
        )
    target.mkdir(parents=True, exist_ok=True)
    sweep(target, f".{name}.*.tmp*")
    try:
        write_text(temporary / f"{name}.py", script)
        write_json(temporary / KERNEL_METADATA, metadata)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder
