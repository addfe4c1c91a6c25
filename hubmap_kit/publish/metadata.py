"""dataset-metadata.json of each kind, from the templates in datasets-meta/, checked as the Kaggle client checks it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubmap_kit.build_id import KINDS, METADATA
from hubmap_kit.errors import PublishError, did_you_mean
from hubmap_kit.files import write_json
from hubmap_kit.publish.root import repository

PLACEHOLDER = "OWNER"  # stands for the account in the templates
KEYS = ("id", "title", "subtitle", "description", "licenses", "keywords")
# Names that the client's documentation lists (docs/datasets_metadata.md of kaggle-cli); what the server makes of others
# is unknown.
LICENCES = (
    "CC0-1.0",
    "CC-BY-SA-3.0",
    "CC-BY-SA-4.0",
    "CC-BY-NC-SA-4.0",
    "GPL-2.0",
    "ODbL-1.0",
    "DbCL-1.0",
    "copyright-authors",
    "other",
    "unknown",
    "CC-BY-4.0",
    "CC-BY-NC-4.0",
    "PDDL",
    "CC-BY-3.0",
    "CC-BY-3.0-IGO",
    "US-Government-Works",
    "CC-BY-NC-SA-3.0-IGO",
    "CDLA-Permissive-1.0",
    "CDLA-Sharing-1.0",
    "CC-BY-ND-4.0",
    "CC-BY-NC-ND-4.0",
    "ODC-BY-1.0",
    "LGPL-3.0",
    "AGPL-3.0",
    "FDL-1.3",
    "EU-ODP-Legal-Notice",
    "apache-2.0",
    "GPL-3.0",
)


def dataset_metadata(kind: str, owner: str, templates: Path | None = None) -> dict[str, Any]:
    """The metadata of a kind's dataset under the account `owner`. Raises PublishError where Kaggle would refuse it.

    `templates` is the folder datasets-meta, by default that of the checkout.
    """
    path = _template(kind, templates)
    values = _read(path)
    identity = values.get("id")
    if not isinstance(identity, str) or not identity.startswith(f"{PLACEHOLDER}/"):
        raise PublishError(
            f"{path}: id is {identity!r}; expected '{PLACEHOLDER}/<slug>', the account is filled in when it is pushed"
        )
    check(values, path)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", owner):
        raise PublishError(
            f"'{owner}' is no name of a Kaggle account; give the name that your profile's address ends with"
        )
    return {**values, "id": f"{owner}/{identity.partition('/')[2]}", "isPrivate": True}


def write_metadata(folder: Path, kind: str, owner: str, templates: Path | None = None) -> Path:
    """Write dataset-metadata.json into a staged folder and return its path."""
    write_json(folder / METADATA, dataset_metadata(kind, owner, templates))
    return folder / METADATA


def dataset_slug(kind: str, templates: Path | None = None) -> str:
    """The slug of a kind's dataset, such as hubmap-kit-code."""
    return str(dataset_metadata(kind, PLACEHOLDER, templates)["id"]).partition("/")[2]


def check(values: dict[str, Any], path: Path) -> None:
    """The client's own rules for a new dataset, and ours. Raises PublishError naming the key."""
    name = str(values.get("id")).rpartition("/")[2]
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name) or not 6 <= len(name) <= 50:
        raise PublishError(
            f"{path}: id has the slug '{name}'; expected 6 to 50 lower-case letters, digits and single hyphens"
        )
    for key, shortest, longest, needed in (("title", 6, 50, True), ("subtitle", 20, 80, False)):
        text = values.get(key)
        if (text is not None or needed) and not (isinstance(text, str) and shortest <= len(text) <= longest):
            raise PublishError(f"{path}: {key} is {text!r}; expected {shortest} to {longest} characters")
    names = [entry.get("name") if isinstance(entry, dict) else None for entry in values.get("licenses") or [None]]
    if len(names) != 1 or names[0] not in LICENCES:
        raise PublishError(
            f"{path}: licenses is {values.get('licenses')!r}; expected exactly one of {', '.join(LICENCES)}"
        )
    unknown = sorted(values.keys() - KEYS)
    if unknown:
        raise PublishError(f"{path}: unknown key '{unknown[0]}'; expected {', '.join(KEYS)}")


def _template(kind: str, templates: Path | None) -> Path:
    if kind not in KINDS:
        raise PublishError(f"'{kind}' is no kind of dataset; expected {', '.join(KINDS)}{did_you_mean(kind, KINDS)}")
    return (templates or repository() / "datasets-meta") / kind / METADATA


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise PublishError(f"{path} does not exist; take it from the repository") from error
    except ValueError as error:
        raise PublishError(f"{path} is not valid JSON ({error}); mend it, or take it from the repository") from error
    if not isinstance(values, dict):
        raise PublishError(f"{path} holds a {type(values).__name__}; expected an object with id, title and licenses")
    return values


# kernel-metadata.json: a kernel's template with the account, the sources and the machine filled in, and refused where
# Kaggle would take it without a word and do something else.


KERNELS = {"train": "hubmap-train", "infer": "hubmap-infer", "tiles": "hubmap-make-tiles"}
# Kaggle's names of machines: NvidiaTeslaT4 is a T4 x2.
SHAPES = {"t4x2": "NvidiaTeslaT4", "p100": "NvidiaTeslaP100", "cpu": None}
RETIRED_SHAPES = (
    "nvidiateslap100",
    "tpuv38",
    "tpu1vmv38",
    "tpuv232",
    "tpuv2256",
)  # Kaggle runs such a kernel on something else without a word
RETIREMENT = "Kaggle retired the P100 on 2026-09-15 and runs such kernels on a T4 x2 without a word"
KERNEL_METADATA = "kernel-metadata.json"
# The repository that pinned kernels are reported to name; not tried on Kaggle itself.
IMAGE = "gcr.io/kaggle-private-byod/python"
_SOURCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*/[a-z0-9][a-z0-9-]*")


@dataclass(frozen=True)
class Sources:
    """What a kernel is pushed with: account, accelerator profile, attached inputs, its own last output, image."""

    owner: str
    accelerator: str
    attach: Sequence[str] = ()
    resume: bool = False
    image: str | None = None


def read_metadata(folder: Path) -> dict[str, Any]:
    """The kernel-metadata.json of a kernel's folder. Raises PublishError when it is missing or malformed."""
    path = folder / KERNEL_METADATA
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(
            f"{path} cannot be read ({error}); expected a kernel's metadata as JSON, restore or render it again"
        ) from error
    if not isinstance(values, dict):
        raise PublishError(f"{path} holds a {type(values).__name__}; expected a JSON object with a kernel's metadata")
    return values


def retired(shape: object) -> bool:
    """Whether Kaggle no longer has a machine of this name."""
    return str(shape or "").lower() in RETIRED_SHAPES


def kernel_metadata(name: str, template: Mapping[str, Any], sources: Sources) -> dict[str, Any]:
    """The metadata to push kernel `name` with.

    Raises PublishError where the template or an attached source is not allowed.

    The kernel is private always, enable_internet is always written, and infer never has it.
    """
    _check(template, name)
    datasets = [
        _with_owner(source, sources.owner)
        for source in (f"OWNER/{dataset_slug('code')}", *template.get("dataset_sources", []))
    ]
    kernels = [_with_owner(source, sources.owner) for source in template.get("kernel_sources", [])]
    for word in sources.attach:
        (kernels if word.startswith("kernel:") else datasets).append(_source(word, sources.owner))
    if sources.resume:
        kernels.append(f"{sources.owner}/{KERNELS[name]}")
    values = dict(template) | {
        "id": f"{sources.owner}/{KERNELS[name]}",
        "is_private": True,
        "enable_gpu": sources.accelerator != "cpu",
        "enable_tpu": False,
        "enable_internet": template.get("enable_internet", False),
        "machine_shape": SHAPES[sources.accelerator],
        "dataset_sources": list(dict.fromkeys(datasets)),
        "kernel_sources": list(dict.fromkeys(kernels)),
    }
    if sources.image is not None:
        values["docker_image"] = _image(sources.image)
    return {key: value for key, value in values.items() if value is not None}


def _check(values: Mapping[str, Any], name: str) -> None:
    from slugify import slugify  # what the Kaggle client itself asks

    where, slug, title = f"kernels/{name}/{KERNEL_METADATA}", KERNELS[name], values.get("title")
    if not isinstance(title, str) or slugify(title) != slug:
        raise PublishError(
            f"{where}: title is {title!r}, but Kaggle would not make the address '{slug}' of it; write a title that"
            " becomes that slug"
        )
    if (values.get("code_file"), values.get("language"), values.get("kernel_type")) != (
        f"{name}.py",
        "python",
        "script",
    ):
        raise PublishError(
            f"{where} must say code_file '{name}.py', language 'python' and kernel_type 'script'; mend it"
        )
    if values.get("is_private", True) is not True:
        raise PublishError(
            f"{where}: is_private is {values['is_private']!r}, but the kit's kernels are always private; set it to true"
        )
    if not isinstance(values.get("enable_internet", False), bool):
        raise PublishError(f"{where}: enable_internet is {values['enable_internet']!r}; expected true or false")
    if name == "infer" and values.get("enable_internet", False):
        raise PublishError(
            f"{where}: enable_internet is true, but a code competition takes no kernel with internet; set it to false"
        )


def _with_owner(source: str, owner: str) -> str:
    """A template's source; one under a placeholder in capitals belongs to the account."""
    account, _, slug = source.partition("/")
    return f"{owner}/{slug}" if account.isupper() else source


def _source(word: str, owner: str) -> str:
    """The address of one `--attach` word."""
    kind, colon, other = word.partition(":")
    if colon and kind == "kernel":
        full = f"{owner}/{KERNELS[other]}" if other in KERNELS else other
    else:
        full = f"{owner}/{dataset_slug(word)}" if word in KINDS else word
    if not _SOURCE.fullmatch(full):
        known = ", ".join([*KINDS, *(f"kernel:{name}" for name in KERNELS)])
        raise PublishError(f"--attach is '{word}'; expected {known}, owner/slug of a dataset, or kernel:owner/slug")
    return full


def _image(text: str) -> str:
    reference = f"{IMAGE}@{text}" if text.startswith("sha256:") else text
    if not re.fullmatch(r"[a-z0-9./_-]+@sha256:[0-9a-f]{64}", reference):
        raise PublishError(
            f"--image is '{text}'; expected 'sha256:' and 64 hex digits, or a whole reference that ends with them"
        )
    return reference
