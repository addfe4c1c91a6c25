"""Batch norms folded into the convolutions before them: the same function with fewer passes over memory."""

from __future__ import annotations

import copy
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from timm.layers import BatchNormAct2d
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

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
        rest = nn.Sequential(norm.drop, norm.act) if type(norm) is BatchNormAct2d else nn.Identity()
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


def _fold(convolution: nn.Module, norm: nn.Module) -> None:
    """In float64: the quotient by a small standard deviation would cost a digit."""
    values = (convolution.weight, convolution.bias, norm.running_mean, norm.running_var)
    weight, bias, mean, variance = (None if value is None else value.detach().double() for value in values)
    scale, shift = (None if value is None else value.detach().double() for value in (norm.weight, norm.bias))
    fused = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, scale, shift)
    kind = convolution.weight.dtype
    # They keep requiring gradients, although nothing trains them: autocast keeps the casts of such weights only.
    convolution.weight, convolution.bias = (nn.Parameter(value.detach().to(kind)) for value in fused)
