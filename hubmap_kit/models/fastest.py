"""Which form of a network is fastest on this device, measured once and remembered."""

from __future__ import annotations

import json
import logging
import platform
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn

from hubmap_kit.config import ModelConfig
from hubmap_kit.files import write_json
from hubmap_kit.models.build import normalise
from hubmap_kit.models.fuse import agrees, fuse

log = logging.getLogger(__name__)
ROUNDS, SECONDS = 5, 4.0  # measure until either is reached, two rounds at least
CLEAR = 0.9  # another form must take at most this share of the preferred one's time: a choice that noise makes is none


@dataclass(frozen=True)
class Form:
    """How a network computes: with batch norms folded into its convolutions or not, and in which order of memory."""

    folded: bool
    channels_last: bool

    def __str__(self) -> str:
        return f"{'folded' if self.folded else 'eager'}, {'channels last' if self.channels_last else 'contiguous'}"

    def of(self, network: nn.Module, folded: nn.Module | None) -> nn.Module:
        """The network in this form; `folded` is its folded copy.

        Works in place, beside the copying that memory order needs.
        """
        chosen = folded if self.folded and folded is not None else network
        return chosen.to(memory_format=torch.channels_last if self.channels_last else torch.contiguous_format)


# The first one is taken unless another one is clearly faster: on most machines it is the fastest.
FORMS = (Form(True, True), Form(True, False), Form(False, True), Form(False, False))
UNTUNED = Form(False, True)


@dataclass
class Tuner:
    """Brings networks into their fastest form, once. `memory` is the file that keeps choices, if it can be written."""

    memory: Path
    device: torch.device
    settled: bool = field(default=False, init=False)

    def settle(
        self, networks: list[nn.Module], window: torch.Tensor, model: ModelConfig, dtype: torch.dtype | None
    ) -> None:
        """Replace the networks of the list by their fastest form for windows such as `window` (1, T, T, 3) uint8 on the
        device.

        A folded network must give the probabilities of the one it was made from on this window; otherwise it is not
        used. All networks have one architecture, so the first one decides for all.
        """
        if self.settled:
            return
        self.settled = True
        inputs = normalise(window, model).contiguous()
        key = (
            f"{device_name(self.device)}, torch {torch.__version__}, {torch.get_num_threads()} threads, window"
            f" {window.shape[1]}, {dtype or 'fp32'}"
        )
        known = self._read()
        form = _form(known.get(key))
        first = _checked_copy(networks[0], inputs)
        if form is None:
            form = self._measure(networks[0], first, inputs, dtype, key, known)
        for number, network in enumerate(networks):
            folded = (first if number == 0 else _checked_copy(network, inputs)) if form.folded else None
            networks[number] = form.of(network, folded)

    def _measure(
        self,
        network: nn.Module,
        folded: nn.Module | None,
        inputs: torch.Tensor,
        dtype: torch.dtype | None,
        key: str,
        known: dict[str, object],
    ) -> Form:
        seconds = measure(network, folded, inputs, dtype)
        form = choose(seconds)
        log.info(
            "fastest on %s: %s (%s)",
            key,
            form,
            "; ".join(f"{each} {value * 1e3:.3g} ms" for each, value in seconds.items()),
        )
        try:
            write_json(
                self.memory,
                known
                | {key: {**asdict(form), "ms": {str(each): round(value * 1e3, 3) for each, value in seconds.items()}}},
            )
        except OSError as error:
            log.debug("%s cannot be written (%s); the next run measures again", self.memory, error)
        return form

    def _read(self) -> dict[str, object]:
        try:
            known = json.loads(self.memory.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}


def choose(seconds: dict[Form, float]) -> Form:
    """The first form, unless the fastest one is clearly faster."""
    preferred, best = next(iter(seconds)), min(seconds, key=lambda form: seconds[form])
    return best if seconds[best] <= CLEAR * seconds[preferred] else preferred


def measure(
    network: nn.Module, folded: nn.Module | None, inputs: torch.Tensor, dtype: torch.dtype | None = None
) -> dict[Form, float]:
    """Seconds of a forward pass in each form: the forms take turns, the best of a few passes counts."""
    forms = [form for form in FORMS if folded is not None or not form.folded]
    best: dict[Form, float] = {}
    start = time.perf_counter()
    for number in range(ROUNDS + 1):
        for form in forms:
            taken = _seconds(form.of(network, folded), inputs, dtype)
            if number:  # the first round fills caches
                best[form] = min(taken, best.get(form, taken))
        if number and time.perf_counter() - start > SECONDS:
            break
    return best


@torch.inference_mode()
def _seconds(network: nn.Module, inputs: torch.Tensor, dtype: torch.dtype | None) -> float:
    is_cuda = inputs.is_cuda
    with torch.autocast(inputs.device.type, dtype=dtype, enabled=dtype is not None):
        if is_cuda:
            torch.cuda.synchronize(inputs.device)  # no GPU has run this line
        start = time.perf_counter()
        network(inputs)
        if is_cuda:
            torch.cuda.synchronize(inputs.device)  # no GPU has run this line
        return time.perf_counter() - start


def device_name(device: torch.device) -> str:
    """The name of a card or processor, as a key."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _checked_copy(network: nn.Module, inputs: torch.Tensor) -> nn.Module | None:
    """The folded copy of a network, or None where it is not the same function."""
    try:
        folded = fuse(network, inputs)
        if agrees(network, folded, inputs):
            return folded
        log.warning("folding batch norms changes the network's probabilities; it stays as it is")
    except (RuntimeError, AttributeError, TypeError) as error:
        log.warning(
            "batch norms cannot be folded (%s); the network stays as it is",
            (str(error).splitlines() or [type(error).__name__])[0],
        )
    return None


def _form(value: object) -> Form | None:
    if isinstance(value, dict) and {"folded", "channels_last"} <= value.keys():
        return Form(bool(value["folded"]), bool(value["channels_last"]))
    return None
