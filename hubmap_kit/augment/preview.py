"""What each augmentation does to one tile: the pictures of a contact sheet, with their masks and names."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import albumentations as A
import numpy as np

from hubmap_kit.augment import mixing, stain
from hubmap_kit.augment.classic import PIPELINES, apply, pipeline
from hubmap_kit.errors import ConfigError, did_you_mean

Tile = tuple[np.ndarray, np.ndarray]
Item = tuple[np.ndarray, np.ndarray, str]  # image (S, S, 3), mask (S, S) with units above 0, title
WHOLE = 6  # draws of a whole pipeline
ALONE = 2  # draws of each of its steps
GROUPS = {"mixing": tuple(mixing.METHODS), "stain": stain.METHODS[1:]}
NAMES = (*PIPELINES, *mixing.METHODS, *stain.METHODS[1:], *GROUPS)


def preview(name: str, tile: Tile, others: Sequence[Tile], references: Sequence[stain.Reference], seed: int = 0) -> list[Item]:
    """`tile` as it is, and under what `name` stands for: a pipeline, a mixing method, a stain method, "mixing" or "stain".

    Of a pipeline each step is drawn twice on its own, and then the whole list 6 times. `others` are partners for mixing, at
    least one; `references` those of the stain methods that need one. The same seed gives the same pictures. Raises ConfigError.
    """
    check(name)
    items: list[Item] = [(*tile, "unchanged")]
    for part in GROUPS.get(name, (name,)):
        if part in PIPELINES:
            items += _of_pipeline(part, tile, seed)
        elif part in mixing.METHODS:
            items += _of_mixing(part, tile, others, seed)
        else:
            items += _of_stain(part, tile, references, seed)
    return items


def check(name: str) -> None:
    """Raise ConfigError for a name that stands for nothing."""
    if name not in NAMES:
        raise ConfigError(f"there is no augmentation '{name}'; known are {', '.join(NAMES)}{did_you_mean(name, NAMES)}")


def _of_pipeline(name: str, tile: Tile, seed: int) -> Iterator[Item]:
    for step in _steps(pipeline(name).transforms):
        step.p = 1.0
        alone = A.Compose([step], strict=True)
        for draw in range(ALONE):
            yield *apply(alone, *tile, seed + draw), type(step).__name__
    whole = pipeline(name)
    for draw in range(WHOLE):
        yield *apply(whole, *tile, seed + draw), f"all of {name}, draw {draw + 1}"


def _steps(steps: Sequence[A.BasicTransform]) -> Iterator[A.BasicTransform]:
    for step in steps:
        if isinstance(step, A.OneOf):
            yield from _steps(step.transforms)
        else:
            yield step


def _of_mixing(name: str, tile: Tile, others: Sequence[Tile], seed: int) -> Iterator[Item]:
    random = np.random.default_rng((seed, 1))
    for draw in range(3):
        shift = random.permutation(len(others)).tolist()
        image, mask = mixing.METHODS[name](tile, _taking_turns([others[place] for place in shift]), random)
        yield image, mask, f"{name}, draw {draw + 1}"


def _taking_turns(tiles: Sequence[Tile]) -> Callable[[], Tile]:
    place = iter(range(len(tiles) * 4))
    return lambda: tiles[next(place) % len(tiles)]


def _of_stain(name: str, tile: Tile, references: Sequence[stain.Reference], seed: int) -> Iterator[Item]:
    image, mask = tile
    if name == "jitter":
        random = np.random.default_rng((seed, 2))
        for draw in range(4):
            yield stain.jitter(image, random), mask, f"jitter, draw {draw + 1}"
        return
    for reference in references:
        yield stain.TRANSFERS[name](image, reference), mask, f"{name} to {reference.name}"
