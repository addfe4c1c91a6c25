"""Whatever can be wrong with an experiment, found before anything is written or tiled."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import hubmap_kit
from hubmap_kit.augment.changes import Changes
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import Experiment
from hubmap_kit.errors import ConfigError, HubmapError
from hubmap_kit.models.build import build
from hubmap_kit.models.device import autocast_dtype, has_bf16
from hubmap_kit.training.losses import About, Objective, logits_of
from hubmap_kit.training.run import check_conversion
from hubmap_kit.training.sinks import check_sinks


def check_experiment(settings: Experiment, device: torch.device, pretrained: bool = True) -> None:
    """Build the loss and the network, weights included, and put one batch of zeros through both, as training and
    inference will.

    Catches misspelt names, weights of another encoder, networks that need another tile size, and batches too small for
    batch norm. With `pretrained` off the encoder's weights file is not asked for: a run that goes on may not need it
    any more. Raises ConfigError and WeightsError.
    """
    loss = Objective(settings)
    if settings.augment.mixing.get("mixup") and "lovasz" in settings.training.loss.lower():
        raise ConfigError(
            "augment.mixing has mixup, whose masks are soft, but training.loss has lovasz, which takes hard ones; drop"
            " one of them"
        )
    if settings.augment.mixing.get("mixup") and settings.model.classes == "organs":
        raise ConfigError(
            "augment.mixing has mixup, whose masks are shares of a unit, but model.classes is organs, whose masks are"
            " indices; drop one"
        )
    Changes(settings.augment)
    autocast_dtype(settings.training.precision, device)
    check_conversion(settings)
    check_sinks(settings.training.sinks)
    if settings.training.precision == "bf16" and not has_bf16(device):
        name = torch.cuda.get_device_name(device)
        raise ConfigError(f"training.precision is bf16, which {name} only imitates, slowly; use auto or fp16")
    network, loss = build(settings.model, pretrained).to(device), loss.to(device)
    batch, size, window = min(settings.training.batch_size, 2), settings.tiles.size, settings.inference.window
    try:
        with torch.no_grad():
            outputs = network.train()(torch.zeros(batch, 3, size, size, device=device))
            channels = len(ORGANS) + 1 if settings.model.classes == "organs" else 1
            _check_shape(logits_of(outputs), (batch, channels, size, size))
            about = About(torch.zeros(batch, dtype=torch.int64, device=device), torch.zeros(batch, device=device))
            loss(outputs, torch.zeros(batch, 1, size, size, device=device), about)
            _check_shape(
                network.eval()(torch.zeros(1, 3, window, window, device=device)), (1, channels, window, window)
            )
    except HubmapError:
        raise
    except Exception as error:
        # Networks refuse a size or a batch in as many ways as there are networks.
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"{settings.model.arch} on {settings.model.encoder} cannot take batches of {batch} tiles of {size} px and"
            f" windows of {window} px ({reason}); change tiles.size, inference.window, training.batch_size or the"
            " network"
        ) from error


def _check_shape(logits: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(logits.shape) != expected:
        raise ConfigError(
            f"the network turns input into logits of shape {tuple(logits.shape)} where {expected} is needed; mend"
            " model.options"
        )


# What a run ran on: versions, commit, BUILD_ID, processor and accelerator.

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "segmentation-models-pytorch",
    "albumentations",
    "opencv-python-headless",
    "tifffile",
    "imagecodecs",
    "ttach",
    "numpy",
    "pandas",
    "scikit-learn",
    "safetensors",
)


def describe(device: torch.device) -> dict[str, Any]:
    """Everything that environment.json holds."""
    return {
        "time_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "hubmap_kit": hubmap_kit.__version__,
        "git_sha": _git_sha(),
        "build_id": _build_id(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "accelerator": _accelerator(device),
        "kaggle_image": os.environ.get("KAGGLE_DOCKER_IMAGE"),
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_sha() -> str | None:
    """The commit of the source tree, with +changes where files differ from it; None for an installed wheel."""
    root = Path(hubmap_kit.__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    try:
        sha = _git(root, "rev-parse", "HEAD")
        return sha + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    result = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return result.stdout.strip()


def _build_id() -> str | None:
    """The id of the published bundle that the kernel's script installed; None outside a kernel."""
    return os.environ.get("HUBMAP_BUILD_ID") or None


def _accelerator(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"type": device.type, "threads": torch.get_num_threads()}
    facts = torch.cuda.get_device_properties(device)
    return {
        "type": "cuda",
        "name": facts.name,
        "memory_gib": round(facts.total_memory / 2**30, 2),
        "capability": f"{facts.major}.{facts.minor}",
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }
