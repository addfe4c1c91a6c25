"""The accelerators that kernels run on: what each one is, which one is here, and a proof that it computes."""

from __future__ import annotations

import logging
import os
import platform
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

from hubmap_kit.config import Experiment
from hubmap_kit.errors import KernelError

# One line of facts about the machine, for the top of a log.

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


log = logging.getLogger(__name__)
SIDE = 256  # of the matrices that prove a card
TOLERANCE = 1e-2  # cards with TF32 keep 10 bits of a factor; a card that does not compute is off by far more


@dataclass(frozen=True)
class Profile:
    """One kind of session. `memory_gib` is that of one card, `precision` what training.precision auto means there.

    `batch_scale` multiplies the windows of a batch at inference.
    """

    name: str
    machine_shape: str | None  # Kaggle's name
    devices: int
    precision: str
    memory_gib: float
    batch_scale: float


PROFILES = {
    "t4x2": Profile("t4x2", "NvidiaTeslaT4", 2, "fp16", 15.0, 2.0),
    "p100": Profile("p100", "NvidiaTeslaP100", 1, "fp16", 16.0, 2.0),
    "cuda": Profile("cuda", None, 1, "fp16", 0.0, 2.0),
    "cpu": Profile("cpu", None, 1, "fp32", 0.0, 1.0),
}


def profile(name: str) -> Profile:
    """The profile of a name. Raises KernelError for another name."""
    if name not in PROFILES:
        raise KernelError(f"accelerator is '{name}'; expected one of {', '.join(PROFILES)}")
    return PROFILES[name]


def detect() -> Profile:
    """The profile of what is here; `devices` and `memory_gib` are those found."""
    if not torch.cuda.is_available():
        return PROFILES["cpu"]
    cards = [torch.cuda.get_device_properties(number) for number in range(torch.cuda.device_count())]
    kinds = {(card.major, card.minor) for card in cards}
    name = (
        {(7, 5): "t4x2" if len(cards) == 2 else "cuda", (6, 0): "p100"}.get(kinds.pop(), "cuda")
        if len(kinds) == 1
        else "cuda"
    )
    known, memory = PROFILES[name], min(card.total_memory for card in cards) / 2**30
    return Profile(name, known.machine_shape, len(cards), known.precision, round(memory, 1), known.batch_scale)


def prove(name: str) -> list[torch.device]:
    """The devices of the accelerator that was asked for, each after one real operation whose result is that of the CPU.

    Another card than asked for is taken with a warning: Kaggle replaces retired ones. Raises KernelError where there is
    none, or where torch cannot compute on it.
    """
    wanted = profile(name)
    if wanted.name == "cpu":
        prove_device(torch.device("cpu"))
        return [torch.device("cpu")]
    if not torch.cuda.is_available():
        raise KernelError(
            f"the accelerator {name} was asked for, but this session has no card that torch sees; choose a GPU, such as"
            " NvidiaTeslaT4"
        )
    found = detect()
    if name not in (found.name, "cuda"):
        log.warning(
            "the accelerator %s was asked for, the session has %d x %s",
            name,
            found.devices,
            torch.cuda.get_device_name(0),
        )
    devices = [torch.device("cuda", number) for number in range(found.devices)]
    for device in devices[::-1]:  # so that the first card is the current one afterwards
        check_supported(
            torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
        )
        prove_device(device)
    return devices


def check_supported(card: str, capability: tuple[int, int], arches: Sequence[str]) -> None:
    """Raise KernelError where none of torch's builds (`torch.cuda.get_arch_list()`) runs on a card of this compute
    capability.
    """
    if any(_runs_on(arch, capability) for arch in arches):
        return
    raise KernelError(
        f"the card is {card}, sm_{capability[0]}{capability[1]}, and this torch {torch.__version__} has no kernels for"
        f" it, only {', '.join(arches) or 'none'}; choose NvidiaTeslaT4"
    )


def _runs_on(arch: str, capability: tuple[int, int]) -> bool:
    """sm_XY is machine code for cards X.Y and later X.Z, sm_XYa for X.Y alone; compute_XY is compiled on any later
    card.
    """
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    if match is None:
        return False
    built = (int(match[2]), int(match[3]))
    if match[4] == "a":
        return built == capability
    return built <= capability and (match[1] == "compute" or built[0] == capability[0])


def prove_device(device: torch.device) -> None:
    """Multiply two matrices on the device and compare with the CPU. Raises KernelError."""
    factors = torch.randn(2, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    expected = factors[0] @ factors[1]
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device)
        found = factors.to(device)[0] @ factors.to(device)[1]
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        error = float((found.cpu() - expected).abs().max() / expected.abs().max())
    except RuntimeError as failure:
        reason = (str(failure).strip().splitlines() or ["no reason given"])[0]
        raise KernelError(
            f"{device} cannot multiply two matrices ({reason}); choose NvidiaTeslaT4, or run the kernel again"
        ) from failure
    if not error <= TOLERANCE:
        raise KernelError(
            f"{device} multiplies two matrices with a relative error of {error:.2g}; run the kernel again, on another"
            " machine"
        )


def adapt(settings: Experiment, found: Profile, side_by_side: int) -> Experiment:
    """The settings with the profile's choices where the experiment makes none; only such that no number of a training
    depends on.

    Beside every one of the `side_by_side` folds there is a process that computes; the other processors cut tiles.
    `training.precision: auto` needs no help: models.device decides it by the card.
    """
    training, inference = settings.training, settings.inference
    if found.name != "cpu" and "workers" not in training.model_fields_set:
        training = training.model_copy(update={"workers": max(1, cpu_count() // side_by_side - 1)})
    if "batch_size" not in inference.model_fields_set:
        inference = inference.model_copy(update={"batch_size": max(1, round(inference.batch_size * found.batch_scale))})
    return settings.model_copy(update={"training": training, "inference": inference})
