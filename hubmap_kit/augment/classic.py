"""Augmentation of a tile and its mask with albumentations 2.0.8.

Randomness is the caller's: `apply` seeds the pipeline for each tile. Left alone, albumentations 2.0.8 repeats one
stream in every worker process and in every epoch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from types import MappingProxyType

import albumentations as A
import cv2
import numpy as np

# Mirrored tissue is tissue; a black corner after a rotation would be there in every other tile.
EDGE = cv2.BORDER_REFLECT_101


def pipeline(name: str) -> A.Compose:
    """A pipeline by name, one of PIPELINES.

    Takes image (H, W, 3) uint8 and mask (H, W) uint8, keeps both shapes and types.

    `strict=True` makes a misspelt argument an error; by default albumentations only warns and goes on without it.
    """
    if name not in PIPELINES:
        raise ValueError(f"augment.pipeline is '{name}'; known are {', '.join(PIPELINES)}")
    return A.Compose(PIPELINES[name](), strict=True)


def apply(compose: A.Compose, image: np.ndarray, mask: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Run a pipeline on one tile with its own seed (0 <= seed < 2**32): the same seed gives the same tile anywhere."""
    # set_random_seed would give every step the same seed, so that all of them happen to a tile or none does. One
    # generator is shared instead, and the steps draw from it one after the other.
    compose.set_random_state(np.random.default_rng(seed), random.Random(seed))
    result = compose(image=image, mask=mask)
    return np.ascontiguousarray(result["image"]), np.ascontiguousarray(result["mask"])


def _flips() -> list[A.BasicTransform]:
    return [A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.5)]


def _light() -> list[A.BasicTransform]:
    return [
        A.D4(p=1.0),
        A.RandomBrightnessContrast(brightness_limit=0.2, contrast_limit=0.2, p=0.5),
        A.HueSaturationValue(hue_shift_limit=15, sat_shift_limit=35, val_shift_limit=15, p=0.6),
    ]


def _first_team() -> list[A.BasicTransform]:
    """The first team's list: flips, rotate, shift-scale-rotate, blur, brightness-contrast, hue, noise, GridDropout."""
    return [
        A.D4(p=1.0),
        A.Affine(
            # Shift-scale-rotate keeps proportions; without keep_ratio height and width would be scaled each on its own.
            scale=(0.7, 1.4),
            keep_ratio=True,
            translate_percent=(-0.06, 0.06),
            rotate=(-45, 45),
            border_mode=EDGE,
            interpolation=cv2.INTER_LINEAR,
            mask_interpolation=cv2.INTER_NEAREST,
            p=0.5,
        ),
        A.RandomBrightnessContrast(brightness_limit=0.25, contrast_limit=0.25, p=0.5),
        A.HueSaturationValue(hue_shift_limit=20, sat_shift_limit=30, val_shift_limit=20, p=0.5),
        A.OneOf([A.GaussianBlur(blur_limit=(3, 5)), A.GaussNoise(std_range=(0.02, 0.08))], p=0.3),
        A.GridDropout(ratio=0.3, unit_size_range=(16, 48), random_offset=True, fill=0, p=0.2),
    ]


def _colour() -> list[A.BasicTransform]:
    """Strong colour changes, so that the network looks at shape: stains of unseen slides differ more than those of the
    seen.
    """
    return [
        A.D4(p=1.0),
        A.ColorJitter(brightness=(0.7, 1.3), contrast=(0.7, 1.4), saturation=(0.3, 1.8), hue=(-0.12, 0.12), p=0.8),
        A.RGBShift(r_shift_limit=20, g_shift_limit=20, b_shift_limit=20, p=0.4),
        A.ToGray(p=0.15),
        A.GaussianBlur(blur_limit=(3, 5), p=0.2),
    ]


def _strong() -> list[A.BasicTransform]:
    """What winners of the competition used: half to twice the scale, elastic tissue, heavy colour, spoilt focus,
    cutout.
    """
    return [
        A.D4(p=1.0),
        A.Affine(
            # Balanced: half of the draws shrink and half enlarge, where an even draw from 0.5 to 2 would mostly
            # enlarge.
            scale=(0.5, 2.0),
            balanced_scale=True,
            keep_ratio=True,
            translate_percent=(-0.1, 0.1),
            rotate=(-45, 45),
            shear=(-8, 8),
            border_mode=EDGE,
            interpolation=cv2.INTER_LINEAR,
            mask_interpolation=cv2.INTER_NEAREST,
            p=0.7,
        ),
        # Tissue moves by 3 px, smoothly over 10: enough to bend a gland, too little to fold it.
        A.ElasticTransform(
            alpha=120,
            sigma=10,
            border_mode=EDGE,
            interpolation=cv2.INTER_LINEAR,
            mask_interpolation=cv2.INTER_NEAREST,
            p=0.25,
        ),
        A.ColorJitter(brightness=(0.65, 1.35), contrast=(0.6, 1.5), saturation=(0.2, 2.0), hue=(-0.15, 0.15), p=0.8),
        A.RGBShift(r_shift_limit=30, g_shift_limit=30, b_shift_limit=30, p=0.4),
        A.RandomGamma(gamma_limit=(70, 140), p=0.3),
        A.ToGray(p=0.1),
        A.OneOf(
            [
                A.GaussianBlur(blur_limit=(3, 7)),
                A.GaussNoise(std_range=(0.02, 0.1)),
                A.ImageCompression(quality_range=(40, 90)),
            ],
            p=0.4,
        ),
        A.CoarseDropout(
            num_holes_range=(1, 6), hole_height_range=(0.05, 0.25), hole_width_range=(0.05, 0.25), fill=0, p=0.4
        ),
    ]


# `classic` was the first name of the first team's list, and runs of old keep it in their config.yaml.
PIPELINES: Mapping[str, Callable[[], list[A.BasicTransform]]] = MappingProxyType(
    {
        "none": list,
        "flips": _flips,
        "light": _light,
        "first-team": _first_team,
        "classic": _first_team,
        "colour": _colour,
        "strong": _strong,
    }
)
