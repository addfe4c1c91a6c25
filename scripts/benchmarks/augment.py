"""Augmentation of a whole batch in fused passes, against the same list in albumentations, tile by tile, and in kornia,
step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import count

import albumentations as A
import cv2
import numpy as np
import torch

from benchmarks.material import MEAN, STD, tissue
from benchmarks.measure import Comparison, check_equal, compare, optional
from hubmap_kit.augment.batched import Batched, Ranges

SIZE, BATCH = 512, 8
KORNIA, ALBUMENTATIONS = "kornia", "albumentations, tile by tile"
TARGETS = {KORNIA: 3.0}
# Everything happens to every tile, so that no engine is lucky in what it draws.
LIST = Ranges(
    mirror=True,
    geometry=1,
    rotate=45,
    scale=(0.7, 1.4),
    shift=0.06,
    colour=1,
    brightness=(0.7, 1.3),
    contrast=(0.7, 1.3),
    saturation=(0.7, 1.3),
    hue=0.1,
)
STATISTICS = tuple(MEAN.tolist()), tuple(STD.tolist())
NOTES = {
    "from": "uint8 tiles with masks in, normalised floats out; on the CPU",
    "stain": "kornia has no stain augmentation; albumentations' is HEStain with preset matrices",
    "elastic": (
        "our displacement is drawn every 32 px and made smooth in between, the rivals' for every pixel and blurred"
    ),
}
Batch = tuple[torch.Tensor, torch.Tensor]


def run(quick: bool = False) -> list[Comparison]:
    """Flips, affine and colours; the same with stain jitter; the same with elastic displacement.

    Of 128 px when `quick`.
    """
    size = 128 if quick else SIZE
    tiles, masks = _material(size)
    expected = A.Normalize(*STATISTICS)(image=tiles[0].numpy())["image"]
    check_equal(
        "normalised tile",
        Batched("none", *STATISTICS)(tiles, masks, 0, 0)[0][0].permute(1, 2, 0).numpy(),
        expected,
        1e-4,
    )
    repeats = 2 if quick else 9
    plain, elastic = Batched(LIST, *STATISTICS), Batched(replace(LIST, elastic=1), *STATISTICS)
    stained = Batched(LIST, *STATISTICS, stain_share=1)
    bent = A.ElasticTransform(
        alpha=120, sigma=10, mask_interpolation=cv2.INTER_NEAREST, border_mode=cv2.BORDER_REFLECT_101, p=1
    )

    def compared(
        name: str, ours: Batched, steps: Sequence[A.BasicTransform], kornia: bool, note: str | None = None
    ) -> Comparison:
        rivals = {ALBUMENTATIONS: _albumentations(steps, tiles, masks)}
        if kornia:
            rivals[KORNIA] = _kornia(ours.ranges.elastic > 0, tiles, masks)
        notes = [NOTES["from"], *([NOTES[note]] if note else [])]
        return compare(
            f"a batch of {BATCH} at {size} px, {name}",
            _ours(ours, tiles, masks),
            rivals,
            TARGETS if kornia else {},
            repeats,
            notes,
        )

    return [
        compared("flips, affine, colours", plain, (), kornia=True),
        compared(
            "the same and stain jitter", stained, (A.HEStain(method="random_preset", p=1),), kornia=False, note="stain"
        ),
        compared("the same and elastic", elastic, (bent,), kornia=True, note="elastic"),
    ]


def _material(size: int) -> Batch:
    image, mask = tissue(size + 64)
    places = [(8 * place, 64 - 8 * place) for place in range(BATCH)]
    tiles, masks = (
        np.stack([part[row : row + size, col : col + size] for row, col in places]) for part in (image, mask)
    )
    return torch.from_numpy(tiles), torch.from_numpy(masks)


def _ours(engine: Batched, tiles: torch.Tensor, masks: torch.Tensor) -> Callable[[], Batch]:
    steps = count()
    return lambda: engine(tiles, masks, 0, next(steps))


def _albumentations(more: Sequence[A.BasicTransform], tiles: torch.Tensor, masks: torch.Tensor) -> Callable[[], Batch]:
    steps = A.Compose(
        [
            A.HorizontalFlip(p=0.5),
            A.VerticalFlip(p=0.5),
            A.Affine(
                scale=LIST.scale,
                translate_percent=(-LIST.shift, LIST.shift),
                rotate=(-LIST.rotate, LIST.rotate),
                border_mode=cv2.BORDER_REFLECT_101,
                mask_interpolation=cv2.INTER_NEAREST,
                p=1,
            ),
            *more,
            A.ColorJitter(
                brightness=LIST.brightness,
                contrast=LIST.contrast,
                saturation=LIST.saturation,
                hue=(-LIST.hue, LIST.hue),
                p=1,
            ),
            A.Normalize(*STATISTICS),
        ],
        strict=True,
        seed=0,
    )

    def batch() -> Batch:
        made = [steps(image=image, mask=mask) for image, mask in zip(tiles.numpy(), masks.numpy(), strict=True)]
        images = torch.from_numpy(np.stack([each["image"] for each in made])).permute(0, 3, 1, 2)
        return images, torch.from_numpy(np.stack([each["mask"] for each in made])).float()

    return batch


def _kornia(elastic: bool, tiles: torch.Tensor, masks: torch.Tensor) -> Callable[[], Batch] | None:
    if optional("kornia") is None:
        return None
    import kornia.augmentation as K

    steps = K.AugmentationSequential(
        K.RandomHorizontalFlip(p=0.5),
        K.RandomVerticalFlip(p=0.5),
        K.RandomAffine(LIST.rotate, (LIST.shift, LIST.shift), LIST.scale, padding_mode="reflection", p=1.0),
        *([K.RandomElasticTransform(alpha=(1.0, 1.0), padding_mode="reflection", p=1.0)] if elastic else []),
        K.ColorJiggle(LIST.brightness, LIST.contrast, LIST.saturation, (-LIST.hue, LIST.hue), p=1.0),
        K.Normalize(*STATISTICS),
        data_keys=["input", "mask"],
    )

    @torch.no_grad()
    def batch() -> Batch:
        images, moved = steps(tiles.permute(0, 3, 1, 2).float() / 255, masks[:, None].float())
        return images, moved[:, 0]

    return batch
