"""What a network costs: weights, multiply-adds, and the memory of training it.

Counted on tensors without data, so no card is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

SIDE = 512
MIB, GIB = 2**20, 2**30
# Of a card sold as 16 GB: a T4 and a P100 report 14.7 and 15.9 GiB. The smaller one counts.
CARD_GIB = 14.7
CONTEXT_GIB = 0.8  # CUDA context and workspaces of cuDNN; an assumption
SLACK = 1.1  # blocks of the allocator that lie idle between others; an assumption
COPIES = 5  # of the weights in float32: themselves, gradients, AdamW's two averages, the averaged weights (EMA)


@dataclass(frozen=True)
class Saved:
    """Bytes that a forward pass in train mode keeps for the backward pass, of one tile, and the largest tensor among
    them.
    """

    total: int
    largest: int


@dataclass(frozen=True)
class Size:
    """A network's cost for tiles of SIDE pixels: tensors of weights in numbers, one forward pass of one tile in
    multiply-adds.
    """

    parameters: int
    encoder_parameters: int
    multiply_adds: int
    saved_fp32: Saved
    saved_fp16: Saved

    def weights(self, half: bool, copies: int = COPIES) -> int:
        """Bytes of `copies` of the weights; autocast keeps half ones until the step."""
        return self.parameters * (4 * copies + (2 if half else 0))

    def saved(self, half: bool) -> Saved:
        """What the forward pass of one tile keeps, in half precision (autocast) or float32."""
        return self.saved_fp16 if half else self.saved_fp32

    def each(self, half: bool) -> float:
        """Bytes that one more tile in a batch takes."""
        saved = self.saved(half)
        # In the backward pass a gradient stands beside the tensor that it belongs to, and one beside the tensor before
        # that.
        return (saved.total + 2 * saved.largest) * SLACK

    def batch(self, half: bool, card_gib: float = CARD_GIB, copies: int = COPIES) -> int:
        """The largest batch whose training should fit a card: an ESTIMATE, that no card has confirmed.

        0 where one tile is too much.
        """
        return max(0, int((card_gib * GIB - self.weights(half, copies) - CONTEXT_GIB * GIB) // self.each(half)))


def measure(make: Callable[[], nn.Module], side: int = SIDE) -> Size:
    """Count a network that `make` builds on the CPU, in train mode, for one tile of `side` x `side` pixels.

    Multiply-adds are those of convolutions and matrix products (attention included), half of what torch's
    FlopCounterMode counts as floating point operations; norms, activations and resampling are left out, as is the
    custom.
    """
    network = make()
    encoder = network.get_submodule("encoder")
    counts = [sum(parameter.numel() for parameter in each.parameters()) for each in (network, encoder)]
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_data(network, torch.device("cuda"))
        saved = [_saved(network, side, half) for half in (False, True)]
        flops = _flops(network, side)
    return Size(counts[0], counts[1], flops // 2, *saved)


def multiply_adds(make: Callable[[], nn.Module], side: int) -> int:
    """Multiply-adds of one forward pass of a (1, 3, side, side) tensor through a network."""
    network = make()
    with FakeTensorMode(allow_non_fake_inputs=True):
        _without_data(network, torch.device("cpu"))
        return _flops(network, side) // 2


def _without_data(network: nn.Module, device: torch.device) -> None:
    """Put tensors that have a shape, a type and a device, but no memory, in the place of all weights and buffers.

    A whole build under FakeTensorMode would be simpler, but some networks read numbers out of tensors while they are
    built.
    """
    same: dict[int, torch.Tensor] = {}
    for module in network.modules():
        for store in (module._parameters, module._buffers):
            for name, value in store.items():
                if value is None:
                    continue
                if id(value) not in same:
                    empty = torch.empty_like(value, device=device)
                    same[id(value)] = (
                        nn.Parameter(empty, value.requires_grad) if isinstance(value, nn.Parameter) else empty
                    )
                store[name] = same[id(value)]


def _saved(network: nn.Module, side: int, half: bool) -> Saved:
    own = {value.untyped_storage()._cdata for value in [*network.parameters(), *network.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(value: torch.Tensor) -> torch.Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage
        return value

    network.train()
    # Two tiles, because batch norm behind a pooling to one pixel refuses one.
    tiles = torch.empty(2, 3, side, side, device=next(network.parameters()).device)
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value)
    with hooks, _MemoryEfficientAttention(), _cuda_autocast() if half else nullcontext():
        network(tiles)
    # Half copies of weights are saved as well; they are the weights' share, whatever the batch.
    sizes = [storage.nbytes() for storage in kept.values()]
    copies = sum(value.numel() * 2 for value in network.parameters() if value.ndim > 1) if half else 0
    return Saved(max(sum(sizes) - copies, 0) // 2, max(sizes) // 2)


def _flops(network: nn.Module, side: int) -> int:
    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.empty(1, 3, side, side, device=next(network.parameters()).device))
    return int(counter.get_total_flops())


class _MemoryEfficientAttention(TorchFunctionMode):
    """Attention by the kernel that cards of 16 GB take, which keeps no square of tokens; without data torch would take
    the plain one.
    """

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = dict(keywords or {})
        if function is not scaled_dot_product_attention:
            return function(*arguments, **keywords)
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, arguments, strict=False)) | keywords
        bias, query = given.get("attn_mask"), given["query"]
        if torch.is_autocast_enabled("cuda"):
            half = torch.get_autocast_dtype("cuda")
            given |= {name: given[name].to(half) for name in names[:3]}
            bias = None if bias is None else bias.to(half)
        if bias is not None:
            bias = bias.expand(*query.shape[:-1], given["key"].shape[-2])
        return torch.ops.aten._scaled_dot_product_efficient_attention(
            given["query"],
            given["key"],
            given["value"],
            bias,
            True,
            given.get("dropout_p", 0.0),
            given.get("is_causal", False),
            scale=given.get("scale"),
        )[0]


@contextmanager
def _cuda_autocast() -> Iterator[None]:
    """torch.autocast("cuda") without its check for a card: which operations run in half is a matter of the dispatcher
    alone.
    """
    former = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.float16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", former[0])
        torch.set_autocast_dtype("cuda", former[1])
