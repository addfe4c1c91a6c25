"""What a card is doing, from NVIDIA's own library: use, memory and temperature as columns of the metrics."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

log = logging.getLogger(__name__)


class GpuFacts:
    """Readings of the card that a torch device is.

    On a CPU, without nvidia-ml-py or without a driver there are none; nothing raises.

    They are of the whole card, other processes included, at the moment of reading.
    """

    def __init__(self, device: torch.device) -> None:
        self._nvml: Any = None
        self._card: Any = None
        if device.type != "cuda":
            return
        try:
            import pynvml

            pynvml.nvmlInit()
            self._card = _find(pynvml, device)
            self._nvml = pynvml
        except Exception as error:  # a driver that is absent, too old or refuses is no reason not to train
            log.debug("no readings of %s: %s: %s", device, type(error).__name__, error)

    def read(self) -> dict[str, float]:
        """gpu_percent (share of the last moment in which the card worked), gpu_memory_gib and gpu_celsius, as far as
        the card tells.
        """
        nvml, card = self._nvml, self._card
        if nvml is None:
            return {}
        sources: dict[str, Callable[[], float]] = {
            "gpu_percent": lambda: nvml.nvmlDeviceGetUtilizationRates(card).gpu,
            "gpu_memory_gib": lambda: round(nvml.nvmlDeviceGetMemoryInfo(card).used / 2**30, 3),
            "gpu_celsius": lambda: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
        }
        found = {}
        for name, source in sources.items():
            try:
                found[name] = float(source())
            except Exception as error:  # a part of a shared card has no use of its own, for instance
                log.debug("no %s: %s: %s", name, type(error).__name__, error)
        return found


def line(facts: Mapping[str, float]) -> str:
    """Readings as words for a progress bar or a log; empty without any."""
    forms = {"gpu_percent": "GPU {:.0f} %", "gpu_memory_gib": "{:.1f} GiB", "gpu_celsius": "{:.0f} °C"}
    return ", ".join(form.format(facts[name]) for name, form in forms.items() if name in facts)


def _find(nvml: Any, device: torch.device) -> Any:
    """The library's handle of a torch device. torch counts the cards that CUDA_VISIBLE_DEVICES names, the library
    counts all.
    """
    number = device.index if device.index is not None else torch.cuda.current_device()
    try:
        # The card's own mark, where torch tells it: CUDA may count cards by speed, the library counts them by slot.
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(number).uuid}")
    except Exception as error:
        log.debug("card %d by its number: %s: %s", number, type(error).__name__, error)
    mark = visible(number, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if isinstance(mark, int):
        return nvml.nvmlDeviceGetHandleByIndex(mark)
    if mark.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(mark)
    # CUDA takes the beginning of a mark, the library only a whole one.
    for index in range(nvml.nvmlDeviceGetCount()):
        card = nvml.nvmlDeviceGetHandleByIndex(index)
        if _text(nvml.nvmlDeviceGetUUID(card)).startswith(mark):
            return card
    raise LookupError(f"no card has the mark {mark}")


def visible(number: int, names: str | None) -> int | str:
    """The card that CUDA calls `number` where CUDA_VISIBLE_DEVICES is `names`: its number among all cards, or its mark
    (GPU-..., MIG-...).

    Raises LookupError for a card that is not visible. CUDA stops reading at the first name that is no card.
    """
    if names is None:
        return number
    parts = [part.strip() for part in names.split(",")]
    usable = next(
        (n for n, part in enumerate(parts) if not (part.isdecimal() or part.startswith(("GPU-", "MIG-")))), len(parts)
    )
    if number >= usable:
        raise LookupError(f"card {number} is not among the {usable} visible ones")
    return int(parts[number]) if parts[number].isdecimal() else parts[number]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
