"""What each augmentation does to one tile: the pictures of a contact sheet, with their masks and names."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import albumentations as A
import numpy as np

from hubmap_kit.augment import mixing, stain
from hubmap_kit.augment.classic import PIPELINES, apply, pipeline
from hubmap_kit.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from hubmap_kit.augment.batched import Ranges

Tile = tuple[np.ndarray, np.ndarray]
Item = tuple[np.ndarray, np.ndarray, str]  # image (S, S, 3), mask (S, S) with units above 0, title
WHOLE = 6  # draws of a whole pipeline
ALONE = 2  # draws of each of its steps
DRAWS = 3  # draws of a mixing method
GROUPS = {"mixing": tuple(mixing.METHODS), "stain": stain.MIXED}
NAMES = (*PIPELINES, *mixing.METHODS, *stain.MIXED, *GROUPS)
ENGINES = ("classic", "batched")
BATCHED = (*PIPELINES, "jitter")  # what the engine for whole batches does itself


def preview(
    name: str,
    tile: Tile,
    others: Sequence[Tile],
    references: Sequence[stain.Reference],
    seed: int = 0,
    engine: str = "classic",
) -> list[Item]:
    """`tile` as it is, and under what `name` stands for: a pipeline, a mixing method, a stain method, "mixing" or
    "stain".

    Of a pipeline each step is drawn twice on its own, once where both are the same, and then the whole list 6 times;
    `engine` is that of `augment.engine`. `others` are partners for mixing, at least one; `references` those of the
    stain methods that need one. The same seed gives the same pictures. Raises ConfigError.
    """
    check(name, engine)
    if engine == "batched":
        return [(*tile, "unchanged"), *_of_batched(name, tile, seed)]
    items: list[Item] = [(*tile, "unchanged")]
    for part in GROUPS.get(name, (name,)):
        if part in PIPELINES:
            items += _of_pipeline(part, tile, seed)
        elif part in mixing.METHODS:
            items += _of_mixing(part, tile, others, seed)
        else:
            items += _of_stain(part, tile, references, seed)
    return items


def check(name: str, engine: str = "classic") -> None:
    """Raise ConfigError for a name that stands for nothing, or for nothing that the engine does."""
    if engine not in ENGINES:
        raise ConfigError(
            f"there is no engine '{engine}'; known are {', '.join(ENGINES)}{did_you_mean(engine, ENGINES)}"
        )
    if name not in NAMES:
        raise ConfigError(f"there is no augmentation '{name}'; known are {', '.join(NAMES)}{did_you_mean(name, NAMES)}")
    if engine == "batched" and name not in BATCHED:
        raise ConfigError(f"'{name}' is the same with either engine; engine batched has {', '.join(BATCHED)}")


def needs_references(name: str) -> bool:
    """Whether a name stands for a stain method that needs reference pictures."""
    return any(part in stain.TRANSFERS for part in GROUPS.get(name, (name,)))


def _of_pipeline(name: str, tile: Tile, seed: int) -> Iterator[Item]:
    for step in _steps(pipeline(name).transforms):
        step.p = 1.0
        alone = A.Compose([step], strict=True)
        yield from _distinct((*apply(alone, *tile, seed + draw), type(step).__name__) for draw in range(ALONE))
    whole = pipeline(name)
    for draw in range(WHOLE if whole.transforms else 1):
        yield *apply(whole, *tile, seed + draw), f"all of {name}, draw {draw + 1}"


def _of_batched(name: str, tile: Tile, seed: int) -> Iterator[Item]:
    """As `_of_pipeline`, by the engine for whole batches; of jitter 4 draws."""
    from hubmap_kit.augment.batched import RANGES, Ranges  # loads torch, which nothing else here needs

    if name == "jitter":
        yield from _as_batch(Ranges(), tile, seed, 4, "jitter, draw {}", stains=1.0)
        return
    ranges = RANGES[name]
    still = replace(ranges, mirror=False, quarters=False, geometry=0.0, elastic=0.0, colour=0.0, grey=0.0)
    turns = "mirrors and quarters" if ranges.quarters else "mirrors"
    titles = {
        "mirror": turns,
        "geometry": "rotate, scale, shift, shear",
        "elastic": "elastic",
        "colour": "colours",
        "grey": "grey",
    }
    for part, title in titles.items():
        if getattr(ranges, part):
            changes: dict[str, Any] = {"mirror": True, "quarters": ranges.quarters} if part == "mirror" else {part: 1.0}
            alone = replace(still, **changes)
            yield from _distinct(_as_batch(alone, tile, seed, ALONE, title))
    yield from _as_batch(
        ranges, tile, seed, WHOLE if ranges.moves or ranges.recolours else 1, f"all of {name}, draw {{}}"
    )


def _as_batch(ranges: Ranges, tile: Tile, seed: int, count: int, title: str, stains: float = 0.0) -> Iterator[Item]:
    import torch

    from hubmap_kit.augment.batched import Batched

    # With this mean and deviation, what the network sees is the picture in 0..1.
    change = Batched(ranges, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), seed, stains)
    tiles, truth = (torch.from_numpy(np.stack([part] * count)) for part in tile)
    images, masks = change(tiles, truth, 0, 0)
    pictures = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    for number, (image, mask) in enumerate(zip(pictures, masks.to(torch.uint8).numpy(), strict=True)):
        yield image, mask, title.format(number + 1)


def _distinct(items: Iterable[Item]) -> Iterator[Item]:
    """Leave out what looks like the one before: a mirror has one picture."""
    last = None
    for item in items:
        if last is None or not np.array_equal(item[0], last):
            yield item
        last = item[0]


def _steps(steps: Sequence[A.BasicTransform]) -> Iterator[A.BasicTransform]:
    for step in steps:
        if isinstance(step, A.OneOf):
            yield from _steps(step.transforms)
        else:
            yield step


def _of_mixing(name: str, tile: Tile, others: Sequence[Tile], seed: int) -> Iterator[Item]:
    random = np.random.default_rng((seed, 1))
    for draw in range(DRAWS):
        first = (
            draw * len(others) // DRAWS
        )  # of all partners in turn, or by chance the same one would be drawn each time
        image, mask = mixing.METHODS[name](tile, _taking_turns([*others[first:], *others[:first]]), random)
        idle = name == "copy_paste" and np.array_equal(image, tile[0])
        yield image, mask, f"{name}, draw {draw + 1}{': no whole unit fits' if idle else ''}"


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
