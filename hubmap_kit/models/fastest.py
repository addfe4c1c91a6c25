"""Which form of a network is fastest on this device, measured once and remembered."""

from __future__ import annotations

import copy
import json
import logging
import platform
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from hubmap_kit.config import ModelConfig
from hubmap_kit.files import write_json
from hubmap_kit.models.build import normalise

# Batch norms folded into the convolutions before them: the same function with fewer passes over memory.

# Exactly these, of torch, timm and smp: another subclass may do more with its weights or statistics than the formula
# knows of.
CONVOLUTIONS = {"Conv2d", "Conv2dSame", "Conv2dStaticSamePadding"}
NORMS = (nn.BatchNorm2d, BatchNormAct2d)
# Of a probability, between the folded network and the one it was made from. A wrong fold is off by far more; float32
# itself is off by a few 1e-6 in trained networks and a few 1e-5 in random ones, which must not decide.
TOLERANCE = 1e-4
SAMPLE_SIDE = 64


def fuse(network: nn.Module, sample: torch.Tensor | None = None) -> nn.Module:
    """A copy of a network in eval mode in which every convolution with a batch norm right after it has taken that one
    in.

    Which pairs follow each other is seen in one pass of `sample` (N, 3, H, W), by default random; what cannot be folded
    stays. An activation that timm keeps inside a batch norm is kept. The caller compares, see `agrees`.
    """
    folded = copy.deepcopy(network)
    parameter = next(folded.parameters())
    if sample is None:
        sample = torch.randn(1, 3, SAMPLE_SIDE, SAMPLE_SIDE, generator=torch.Generator().manual_seed(0)).to(
            parameter.device
        )
    names = defaultdict(list)
    for name, module in folded.named_modules(remove_duplicate=False):
        names[module].append(name)
    for convolution, norm in _pairs(folded, sample):
        _fold(convolution, norm)
        rest: nn.Module = nn.Sequential(norm.drop, norm.act) if type(norm) is BatchNormAct2d else nn.Identity()
        for name in names[norm]:
            folded.set_submodule(name, rest.eval())
    return folded


@torch.inference_mode()
def agrees(one: nn.Module, other: nn.Module, inputs: torch.Tensor) -> bool:
    """Whether two networks give the same probabilities for `inputs` in float32, to TOLERANCE.

    NaN agrees with nothing.
    """
    # Without TF32, which newer cards take for float32 and which has three digits.
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        difference = torch.sigmoid(one(inputs).float()) - torch.sigmoid(other(inputs).float())
    return bool(difference.abs().max() <= TOLERANCE)


def _pairs(network: nn.Module, sample: torch.Tensor) -> list[tuple[nn.Module, nn.Module]]:
    """Convolutions and the batch norms that read their output, untouched; each of both runs once in a pass."""
    runs: Counter[nn.Module] = Counter()
    sources: dict[nn.Module, nn.Module] = {}

    def after_convolution(module: nn.Module, _: object, output: torch.Tensor) -> None:
        runs[module] += 1
        # The tensor carries its maker on; its version tells whether something has changed it in place since.
        output.made_by = (module, output._version)  # type: ignore[attr-defined]

    def before_norm(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        runs[module] += 1
        made_by, version = getattr(inputs[0], "made_by", (None, None))
        if made_by is not None and inputs[0]._version == version:
            sources[module] = made_by

    with _hooks(network, after_convolution, before_norm), torch.no_grad():
        network(sample)
    shared = Counter(sources.values())
    return [
        (convolution, norm)
        for norm, convolution in sources.items()
        if runs[norm] == runs[convolution] == shared[convolution] == 1
    ]


@contextmanager
def _hooks(
    network: nn.Module, after_convolution: Callable[..., None], before_norm: Callable[..., None]
) -> Iterator[None]:
    handles = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and type(module).__name__ in CONVOLUTIONS:
            handles.append(module.register_forward_hook(after_convolution))
        elif type(module) in NORMS and module.running_var is not None and not module.training:
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _fold(convolution: Any, norm: Any) -> None:
    """In float64: the quotient by a small standard deviation would cost a digit."""
    weight: Any  # all but the bias and the scale and shift of the norm are there
    mean: Any
    variance: Any
    values = (convolution.weight, convolution.bias, norm.running_mean, norm.running_var)
    weight, bias, mean, variance = (None if value is None else value.detach().double() for value in values)
    scale, shift = (None if value is None else value.detach().double() for value in (norm.weight, norm.bias))
    fused = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    kind = convolution.weight.dtype
    # They keep requiring gradients, although nothing trains them: autocast keeps the casts of such weights only.
    convolution.weight, convolution.bias = (nn.Parameter(value.detach().to(kind)) for value in fused)


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
        order = torch.channels_last if self.channels_last else torch.contiguous_format
        return chosen.to(memory_format=order)  # type: ignore[call-overload]  # torch's stubs lack this form


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
