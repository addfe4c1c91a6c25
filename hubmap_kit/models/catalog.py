"""The networks that the kit ships an experiment for: whose they were, what they cost, what fits a card.

The costs stand in catalog.csv, which `scripts/models_table.py` counts anew.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path

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
    from hubmap_kit.models.sizes import MIB, measure

    size = measure(lambda: build(model, pretrained=False))
    mib = [round(saved.total / MIB) for saved in (size.saved_fp32, size.saved_fp16)]
    return Cost(
        size.parameters,
        size.encoder_parameters,
        size.multiply_adds,
        *mib,
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
