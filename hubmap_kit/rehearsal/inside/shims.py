"""What a rehearsal can play from inside: faults, and the passing of time.

Chosen by HUBMAP_REHEARSAL_SHIM from SHIMS: name -> (module to wait for, what to do to it).
"""

from __future__ import annotations

from contextlib import suppress
from glob import glob
from types import ModuleType, SimpleNamespace
from typing import Any

# The processors that the CUDA 12.8 build of torch 2.11 holds code for: the P100's sm_60 is not among them.
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]
CAPABILITY = (6, 0)
CHECKPOINTS, LOOK_S, DAY_S = "/kaggle/working/*/fold*/last.ckpt", 0.05, 86400.0


def p100(torch: ModuleType) -> None:
    """A P100 beside a torch that was not built for it: it is found, and every operation on it fails."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device")

    facts = SimpleNamespace(
        name="Tesla P100-PCIE-16GB", major=6, minor=0, total_memory=16 << 30, multi_processor_count=56
    )
    for name, value in (
        ("is_available", True),
        ("device_count", 1),
        ("get_device_capability", CAPABILITY),
        ("get_device_name", facts.name),
        ("get_device_properties", facts),
        ("get_arch_list", ARCHITECTURES),
        ("current_device", 0),
        ("is_initialized", True),
    ):
        setattr(torch.cuda, name, lambda *_, _value=value, **__: _value)
    torch.cuda.init = torch.cuda._lazy_init = refuse
    for name in ("zeros", "ones", "rand", "randn", "tensor", "full", "empty", "arange", "eye"):
        setattr(torch, name, _on_cuda(getattr(torch, name), refuse))


def _on_cuda(make: Any, refuse: Any) -> Any:
    def made(*arguments: Any, **options: Any) -> Any:
        return refuse() if str(options.get("device") or "").startswith("cuda") else make(*arguments, **options)

    return made


def network(_: ModuleType) -> None:
    """A library that asks for a newer version of itself and says nothing when it gets no answer."""
    from urllib.request import urlopen

    with suppress(OSError):
        urlopen("http://updates.example.org/latest", timeout=2)


def impatient(time: ModuleType) -> None:
    """Waiting takes no time, for a kernel that waits for a mount that never comes."""
    time.sleep = lambda _: None  # type: ignore[attr-defined]


def leap(time: ModuleType) -> None:
    """The session's clock leaps a day ahead once a training has its first checkpoint, as if the rest of the session had
    gone by.
    """
    real, seen = time.monotonic, {"leapt": False, "looked": 0.0}

    def monotonic() -> float:
        now = real()
        if not seen["leapt"] and now - seen["looked"] > LOOK_S:
            seen.update(looked=now, leapt=bool(glob(CHECKPOINTS)))
        return now + (DAY_S if seen["leapt"] else 0.0)

    time.monotonic = monotonic  # type: ignore[attr-defined]


SHIMS = {
    "leap": ("time", leap),
    "impatient": ("time", impatient),
    "p100": ("torch", p100),
    "network": ("hubmap_kit", network),
}
