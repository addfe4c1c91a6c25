"""Encoders that smp cannot build from timm itself: plain vision transformers and CoaT, as pyramids; and windows that
fit any tile.

Each gives what smp's encoders give: the image, then feature maps at strides 2, 4, 8, 16 and 32, and `out_channels`.
Like smp's encoders of transformers they have no map at stride 2, but one without channels in its place.
"""

from __future__ import annotations

import math
from typing import Any

import timm
import torch
from segmentation_models_pytorch import encoders as smp_encoders
from timm.models import is_model_in_modules
from torch import nn

# Of timm's modules: one stride from first to last, and position embeddings that can be resized.
VITS = ("vision_transformer", "deit", "eva")
SWINS = ("swin_transformer", "swin_transformer_v2")
SMALLEST = 3  # maps that a pyramid must have: strides 2, 4, 8


class VitEncoder(nn.Module):
    """A vision transformer of timm, whose position embeddings are resized to the input: [the image, the last map at the
    patches' stride].
    """

    model: Any  # of timm
    out_channels: list[int]

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = timm.create_model(name, pretrained=False, num_classes=0, dynamic_img_size=True)
        if getattr(self.model, "attn_pool", None) is not None:
            self.model.attn_pool = None  # reads all tokens for a classifier
        self.model.fc_norm = nn.Identity()
        patch = self.model.patch_embed.patch_size
        self.patch: int = patch if isinstance(patch, int) else patch[0]
        self.multiple = math.lcm(32, self.patch)
        self.out_channels = [3, self.model.embed_dim]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (N, 3, H, W) -> [images, (N, C, H/patch, W/patch)]."""
        return [images, *self.model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True)]


class VitPyramid(VitEncoder):
    """A vision transformer with patches of 16 px as a pyramid: maps of four depths, the first two enlarged by
    transposed convolutions, the last halved.

    As Li et al. 2021 (arXiv:2111.11429) and BEiT's UPerNet do it.
    """

    def __init__(self, name: str, depth: int = 5, **_: object) -> None:
        super().__init__(name)
        if self.patch != 16:
            raise ValueError(
                f"a pyramid needs a transformer with patches of 16 px, and tu-{name} has {self.patch}; arch segmenter"
                " takes it"
            )
        width, blocks = self.model.embed_dim, len(self.model.blocks)
        self.model.norm = nn.Identity()  # maps are taken before it
        self.indices = [blocks * number // 4 - 1 for number in range(1, 5)][: _levels(depth)]
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width, 2, 2),
                    nn.GroupNorm(1, width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, 2),
                ),
                nn.ConvTranspose2d(width, width, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2),
            ][: _levels(depth)]
        )
        self.out_channels = [3, 0, *[width] * _levels(depth)]
        self.output_stride = 2**depth

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (N, 3, H, W) -> [images, nothing at stride 2, maps at strides 4, 8, 16, 32]."""
        maps = self.model.forward_intermediates(images, indices=self.indices, intermediates_only=True)
        return [images, _no_channels(images), *(scale(each) for scale, each in zip(self.scales, maps, strict=True))]

    def set_in_channels(self, channels: int, pretrained: bool = True) -> None:
        """Smp calls this; the kit's networks see RGB."""

    def make_dilated(self, output_stride: int) -> None:
        """Smp calls this for dilated encoders."""
        raise ValueError(f"a vision transformer cannot be dilated to stride {output_stride}")


class CoatEncoder(nn.Module):
    """CoaT and CoaT-Lite of timm, which themselves take one image size only, at any multiple of 32.

    Strides 4, 8, 16, 32.
    """

    model: Any  # of timm

    def __init__(self, name: str, depth: int = 5, **_: object) -> None:
        super().__init__()
        self.model = timm.create_model(name, pretrained=False, num_classes=0, return_interm_layers=True)
        if depth < 5 and self.model.parallel_blocks is not None:
            raise ValueError(f"tu-{name} joins all its levels, so encoder_depth must be 5")
        self.levels = range(1, _levels(depth) + 1)
        for level in range(1, 5):
            getattr(self.model, f"patch_embed{level}").strict_img_size = False
            if level not in self.levels:
                for part in ("patch_embed", "serial_blocks", "cpe", "crpe", "cls_token"):
                    delattr(self.model, f"{part}{level}")
        _name_once(self.model)
        self.out_channels = [3, 0, *self.model.embed_dims[: _levels(depth)]]
        self.output_stride = 2**depth

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Images (N, 3, H, W) -> [images, nothing at stride 2, maps at strides 4, 8, 16, 32]."""
        tokens, sizes, current = [], [], images
        for level in self.levels:
            embed = getattr(self.model, f"patch_embed{level}")
            sizes.append((current.shape[-2] // embed.patch_size[0], current.shape[-1] // embed.patch_size[1]))
            found = embed(current)
            found = torch.cat(
                [getattr(self.model, f"cls_token{level}").expand(len(found), -1, -1).to(found.dtype), found], dim=1
            )
            for block in getattr(self.model, f"serial_blocks{level}"):
                found = block(found, size=sizes[-1])
            tokens.append(found)
            current = _as_map(found, sizes[-1])
        for block in self.model.parallel_blocks or ():
            late = [getattr(self.model, f"cpe{level}")(tokens[level - 1], sizes[level - 1]) for level in (2, 3, 4)]
            tokens = list(block(tokens[0], *late, sizes=sizes))
        return [images, _no_channels(images), *(_as_map(each, size) for each, size in zip(tokens, sizes, strict=True))]

    def set_in_channels(self, channels: int, pretrained: bool = True) -> None:
        """Smp calls this; the kit's networks see RGB."""

    def make_dilated(self, output_stride: int) -> None:
        """Smp calls this for dilated encoders."""
        raise ValueError(f"CoaT cannot be dilated to stride {output_stride}")


def is_vit(name: str) -> bool:
    """Whether an encoder's name is that of a plain vision transformer of timm."""
    return name.startswith("tu-") and is_model_in_modules(_bare(name), VITS)


def smp_name(name: str) -> str:
    """The name under which smp builds an encoder: the kit's own ones are made known to it first, as its documentation
    describes.
    """
    if not name.startswith("tu-"):
        return name
    kind = VitPyramid if is_vit(name) else CoatEncoder if is_model_in_modules(_bare(name), ("coat",)) else None
    if kind is None:
        return name
    known = f"kit-{name.removeprefix('tu-')}"
    smp_encoders.encoders[known] = {
        "encoder": kind,
        "params": {"name": name.removeprefix("tu-")},
        "pretrained_settings": {},
    }
    return known


def extras(name: str) -> dict[str, bool]:
    """Further arguments of timm with which an encoder takes images of any size."""
    return {"strict_img_size": False} if name.startswith("tu-") and is_model_in_modules(_bare(name), SWINS) else {}


def takes_image_size(name: str) -> bool:
    """Whether timm sizes an encoder's windows by its image size: MaxViT and its relatives."""
    return name.startswith("tu-") and is_model_in_modules(_bare(name), ("maxxvit",))


def multiple_of(encoder: nn.Module) -> int:
    """Sides that an encoder takes are multiples of this: 32, or more where windows must divide the deepest map (MaxViT:
    224 as a rule).
    """
    windows = [side for module in encoder.modules() for side in getattr(module, "partition_size", None) or ()]
    return math.lcm(getattr(encoder, "multiple", 32), *(32 * window for window in windows))


def _levels(depth: int) -> int:
    if not SMALLEST <= depth <= 5:
        raise ValueError(f"encoder_depth must be {SMALLEST} to 5 here, got {depth}")
    return depth - 1


def _bare(name: str) -> str:
    """Timm's name without smp's prefix and without the tag of its weights."""
    return name.removeprefix("tu-").split(".")[0]


def _name_once(module: nn.Module, seen: set[nn.Module] | None = None) -> None:
    """Parts that blocks share stay the first one's only, the others merely keep them: safetensors refuses a tensor with
    two names.
    """
    seen = {module} if seen is None else seen
    for name, child in [*module._modules.items()]:  # named_children leaves out the very ones that matter here
        if child in seen:
            delattr(module, name)
            object.__setattr__(module, name, child)
        elif child is not None:
            seen.add(child)
            _name_once(child, seen)


def _no_channels(images: torch.Tensor) -> torch.Tensor:
    return images.new_empty(len(images), 0, images.shape[-2] // 2, images.shape[-1] // 2)


def _as_map(tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, *size)
