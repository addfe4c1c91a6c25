"""kernel-metadata.json: a kernel's template with the account, the sources and the machine filled in, and refused where
Kaggle would take it without a word and do something else.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubmap_kit.errors import PublishError
from hubmap_kit.publish.metadata import slug as dataset_slug
from hubmap_kit.runtime.build_id import KINDS

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
