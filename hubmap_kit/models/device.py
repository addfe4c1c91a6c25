"""Where a network runs and in which number format."""

from __future__ import annotations

import torch

from hubmap_kit.errors import ConfigError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": None}


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


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The half type to compute in, or None for float32.

    auto is fp16 on a GPU (a T4 has no bf16, a P100 gains little from fp16 but loses nothing) and fp32 on a CPU.
    """
    if precision == "auto":
        return torch.float16 if device.type == "cuda" else None
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError("training.precision is fp16 on a CPU, which computes it slowly and coarsely; use auto, fp32 or bf16")
    return DTYPES[precision]
