"""What a run ran on: versions, commit, BUILD_ID, processor and accelerator.

No environment values but the image id, no secrets.
"""

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
