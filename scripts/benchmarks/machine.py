"""What a figure depends on beside the code: the machine and the versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RIVALS = ("pycocotools", "rlemasklib", "monai", "pytorch-toolbelt", "patchly", "albumentations", "kornia")


def machine() -> str:
    """Processor, cores that this process may use, and the card, if there is one."""
    import torch

    card = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ", no GPU"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores{card}; {platform.system()}"


def versions() -> str:
    """One line: Python, the libraries that ours stands on, and the rivals that are installed."""
    import cv2
    import numpy
    import torch

    own = {
        "Python": platform.python_version(),
        "numpy": numpy.__version__,
        "torch": torch.__version__,
        "OpenCV": cv2.__version__,
    }
    return ", ".join(f"{name} {number}" for name, number in (own | _installed()).items())


def _installed() -> dict[str, str]:
    found = {}
    for name in RIVALS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """The processor's model name; on Linux platform.processor() is empty or only the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
