"""One line of facts about the machine, for the top of a log.

Of the environment it tells names, and one value: the image's id.
"""

from __future__ import annotations

import os
import platform
import shutil
from datetime import UTC, datetime
from pathlib import Path

import torch

IMAGE = "KAGGLE_DOCKER_IMAGE"


def facts_line(working: Path) -> str:
    """UTC time, image, Python, torch and its kernels, cards, processors, memory, free space in `working`, names of
    KAGGLE_* variables.
    """
    names = sorted(name for name in os.environ if name.startswith("KAGGLE_"))
    parts = [
        f"utc {datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
        f"image {os.environ.get(IMAGE, 'none')}",
        f"python {platform.python_version()}",
        f"torch {torch.__version__} for {' '.join(arch_list()) or 'cpu'}",
        f"cards {', '.join(_cards()) or 'none'}",
        f"cpus {cpu_count()}",
        f"memory {_memory_gib():.1f} GiB",
        f"free {shutil.disk_usage(working).free / 2**30:.1f} GiB in {working}",
        f"variables {' '.join(names) or 'none'}",
    ]
    return "; ".join(parts)


def arch_list() -> list[str]:
    """The card generations that this torch has kernels for, such as sm_75; empty without a usable card."""
    return torch.cuda.get_arch_list()


def cpu_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cards() -> list[str]:
    found = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    return [f"{card.name} sm_{card.major}{card.minor} {card.total_memory / 2**30:.1f} GiB" for card in found]


def _memory_gib() -> float:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (ValueError, OSError):
        return float("nan")
