"""Where a network runs and in which number format."""

from __future__ import annotations

import torch

from hubmap_kit.errors import ConfigError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}
LEAST_BF16 = (8, 0)  # older cards, such as a T4 (7.5), only imitate bfloat16, slowly


def choose_device(name: str = "auto") -> torch.device:
    """The device of a name: auto (the first GPU, else the CPU), cpu, cuda, cuda:1.

    A GPU is proved with one real operation: torch lists cards that its build has no kernels for. Raises ConfigError.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            torch.cuda.set_device(device)  # pinned memory would otherwise open a context on the first card as well
        torch.ones(8, device=device).sum().item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"device '{name}' does not work here ({reason}); use --device cpu, or auto") from error
    return device


def choose_devices(names: str = "auto") -> list[torch.device]:
    """The devices of a comma-separated list such as cuda:0,cuda:1, each proved; the first one is the current card
    afterwards.

    The CPU may be named twice, for two folds side by side; a card may not. Raises ConfigError.
    """
    parts = [part.strip() for part in names.split(",")]
    twice = [part for part in parts if part != "cpu" and parts.count(part) > 1]
    if twice or (len(parts) > 1 and "auto" in parts):
        raise ConfigError(f"--device is '{names}'; name every card once, as in cuda:0,cuda:1, or auto alone")
    return [choose_device(part) for part in reversed(parts)][::-1]


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 itself."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= LEAST_BF16


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The half type to compute in, or None for float32.

    auto is fp16 on a GPU (a T4 has no bf16, a P100 gains little from fp16 but loses nothing) and fp32 on a CPU. A run
    that was trained in bf16 elsewhere is predicted in fp16 on a card without bf16.
    """
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else None
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(
            "training.precision is fp16 on a CPU, which computes it slowly and coarsely; use auto, fp32 or bf16"
        )
    if precision == "bf16" and not has_bf16(device):
        return torch.float16
    return DTYPES[precision]
