"""The networks that the kit ships an experiment for: whose they were, what they cost, what fits a card.

The costs stand in catalog.csv, which `scripts/models_table.py` counts anew.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from hubmap_kit import experiment
from hubmap_kit.config import Experiment, ModelConfig
from hubmap_kit.errors import ConfigError, did_you_mean
from hubmap_kit.files import atomic_path

PREFIX = "net-"
FILE = "catalog.csv"
FIRST_TEAM, WINNERS, OURS = "first team", "winners", "ours"
ESTIMATE = "ESTIMATE"


@dataclass(frozen=True)
class Network:
    """A network: its short name, its family, and what those called it who used it before.

    Its experiment is `net-NAME`.
    """

    name: str
    family: str
    whose: str
    theirs: str

    @property
    def config(self) -> str:
        """The name of its shipped experiment."""
        return PREFIX + self.name

    def settings(self) -> Experiment:
        """Its shipped experiment. Raises ConfigError where that is damaged."""
        return experiment.load(self.config)


NETWORKS: tuple[Network, ...] = (
    *(Network(f"unet-b{k}", "U-Net", FIRST_TEAM, f"U-Net EfficientNet-b{k} (fastai)") for k in range(6)),
    Network("unet-b1-fastai", "U-Net", FIRST_TEAM, "U-Net EfficientNet-b1 (fastai, DynamicUnet)"),
    Network("unext50", "UneXt50", FIRST_TEAM, "UneXt50 (fastai)"),
    Network("unet-fcn", "U-Net", FIRST_TEAM, "Unet-FCN (MMSegmentation)"),
    Network("deeplabv3-r50c", "DeepLabv3", FIRST_TEAM, "DeepLabv3 (MMSegmentation, ResNetV1c)"),
    Network("deeplabv3plus-r50c", "DeepLabv3+", FIRST_TEAM, "DeepLabv3+ (MMSegmentation, ResNetV1c)"),
    Network("deeplabv3plus-r50d", "DeepLabv3+", OURS, "the same on a newer stem"),
    *(Network(f"segformer-b{k}", "SegFormer", FIRST_TEAM, f"SegFormer MiT-b{k} (MMSegmentation)") for k in range(6)),
    Network("segformer-b5-gn", "SegFormer", WINNERS, "SegFormer b5 with GroupNorm, batch 1"),
    Network("upernet-r50", "UPerNet", FIRST_TEAM, "UPerNet ResNet50 (MMSegmentation)"),
    Network("upernet-vit-b16", "UPerNet", FIRST_TEAM, "UPerNet ViT-B/16 (MMSegmentation)"),
    Network("upernet-swin-t", "UPerNet", FIRST_TEAM, "UPerNet Swin-T (MMSegmentation)"),
    Network("upernet-swin-b", "UPerNet", FIRST_TEAM, "UPerNet Swin-B (MMSegmentation)"),
    Network("segmenter-s16", "Segmenter", FIRST_TEAM, "Segmenter ViT-S/16 (MMSegmentation)"),
    Network("segmenter-b16", "Segmenter", FIRST_TEAM, "Segmenter ViT-B/16 (MMSegmentation)"),
    Network("erfnet", "ERFNet", FIRST_TEAM, "ERFNet (MMSegmentation)"),
    Network("unet-coat-lite-small", "U-Net", WINNERS, "U-Net CoaT-Lite Small"),
    Network("daformer-coat-lite-small", "DAFormer", WINNERS, "DAFormer CoaT-Lite Small"),
    Network("unet-coat-lite-medium", "U-Net", WINNERS, "U-Net CoaT-Lite Medium"),
    Network("daformer-coat-lite-medium", "DAFormer", WINNERS, "DAFormer CoaT-Lite Medium"),
    Network("unet-convnext-t", "U-Net", WINNERS, "U-Net ConvNeXt (larger there)"),
    Network("daformer-convnext-t", "DAFormer", OURS, "the same with DAFormer's decoder"),
    Network("unet-effv2-s", "U-Net", WINNERS, "U-Net EfficientNetV2 (larger there)"),
    Network("daformer-effv2-s", "DAFormer", OURS, "the same with DAFormer's decoder"),
    Network("unet-pvtv2-b2", "U-Net", WINNERS, "U-Net PVTv2"),
    Network("daformer-pvtv2-b2", "DAFormer", WINNERS, "DAFormer PVTv2"),
    Network("unet-maxvit-t", "U-Net", WINNERS, "U-Net MaxViT"),
    Network("daformer-maxvit-t", "DAFormer", OURS, "the same with DAFormer's decoder"),
)


@dataclass(frozen=True)
class Cost:
    """A row of catalog.csv.

    One tile is SIDE x SIDE pixels; batches are ESTIMATES for a 16 GB card, 0 where one tile does not fit.
    """

    parameters: int
    encoder_parameters: int
    multiply_adds: int
    saved_fp32_mib: int
    saved_fp16_mib: int
    batch_fp32: int
    batch_fp16: int


def find(name: str) -> Network:
    """The network NAME or net-NAME. Raises ConfigError."""
    wanted = name.removeprefix(PREFIX)
    known = {network.name: network for network in NETWORKS}
    if wanted not in known:
        raise ConfigError(
            f"no network '{name}' in the catalog; 'hubmap models' lists them{did_you_mean(wanted, known)}"
        )
    return known[wanted]


def cost(model: ModelConfig) -> Cost:
    """Count the network of a config now; takes a second or a few. Raises ConfigError."""
    from hubmap_kit.models.build import build

    size = measure(lambda: build(model, pretrained=False))
    return Cost(
        size.parameters,
        size.encoder_parameters,
        size.multiply_adds,
        round(size.saved_fp32.total / MIB),
        round(size.saved_fp16.total / MIB),
        size.batch(half=False),
        size.batch(half=True),
    )


@lru_cache(maxsize=1)
def costs() -> Mapping[str, Cost]:
    """The costs of catalog.csv by name.

    A network that the file lacks is not in it. Raises ConfigError where the file is damaged.
    """
    path = shipped_csv()
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.DictReader(file)
            if rows.fieldnames != ["name", *Cost.__annotations__]:
                raise ValueError
            return {row["name"]: Cost(**{key: int(row[key]) for key in Cost.__annotations__}) for row in rows}
    except (OSError, csv.Error, ValueError, TypeError) as error:
        raise ConfigError(
            f"{path} is missing or damaged ({type(error).__name__}); install the kit again, or run"
            " scripts/models_table.py"
        ) from error


def shipped_csv() -> Path:
    """Where catalog.csv lies in the package."""
    return Path(str(resources.files("hubmap_kit") / "models" / FILE))


def write_costs(found: Mapping[str, Cost], path: Path) -> None:
    """Write costs in the catalog's order, atomically."""
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["name", *Cost.__annotations__], lineterminator="\n")
        writer.writeheader()
        writer.writerows(
            {"name": network.name, **vars(found[network.name])} for network in NETWORKS if network.name in found
        )


HEADER = (
    "network",
    "was",
    "encoder",
    "weights, M",
    "GMAC",
    "GFLOP",
    "fp32 MiB",
    "fp16 MiB",
    "batch fp32",
    "batch fp16",
)


def table_row(network: Network, found: Cost | None) -> list[str]:
    """The cells of HEADER; empty ones where nothing was counted."""
    start = [network.name, network.theirs, network.settings().model.encoder]
    if found is None:
        return start + [""] * (len(HEADER) - len(start))
    numbers = [
        f"{found.parameters / 1e6:.1f}",
        f"{found.multiply_adds / 1e9:.0f}",
        f"{2 * found.multiply_adds / 1e9:.0f}",
    ]
    memory = [found.saved_fp32_mib, found.saved_fp16_mib, found.batch_fp32, found.batch_fp16]
    return [*start, *numbers, *(str(value) for value in memory)]


def markdown(header: Iterable[str], rows: Iterable[Iterable[str]], text_columns: int = 1) -> str:
    """A Markdown table; all columns after the first ones are numbers."""
    names = list(header)
    rule = ["---" if column < text_columns else "--:" for column in range(len(names))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (names, rule, *(list(row) for row in rows)))


# What a network costs: weights, multiply-adds, and the memory of training it.

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
    stores: list[dict[str, Any]]
    for module in network.modules():
        stores = [module._parameters, module._buffers]
        for store in stores:
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
