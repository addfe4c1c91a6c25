"""Test-time views: the symmetries of the square, as a tour that turns a picture from one to the next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import cv2
import torch
import ttach

# What each name means: ttach's own transforms. The tests hold the tours below to them.
VIEWS = {
    "none": lambda: ttach.Compose([]),
    "flips": lambda: ttach.Compose([ttach.HorizontalFlip(), ttach.VerticalFlip()]),
    "d4": ttach.aliases.d4_transform,
}
Move = Literal["across", "down", "transpose"]


@dataclass(frozen=True)
class Tour:
    """All views of a picture: it starts as it is, and each of `moves` makes the next view of the last; `home` leads
    back.

    Every move costs one pass over memory, in place, where ttach makes each view anew from the picture and turns by
    copying twice. Probabilities added up on the way make the same moves, so nothing is turned back but their sum.
    """

    moves: tuple[Move, ...]
    home: tuple[Move, ...]


FOUR: tuple[Move, ...] = ("across", "down", "across")
TOURS = {
    "none": Tour((), ()),
    "flips": Tour(FOUR, ("down",)),
    "d4": Tour((*FOUR, "transpose", *FOUR), ("down", "transpose", "down")),
}


def view_transforms(name: str) -> ttach.Compose:
    """The views of a name: none (1), flips (4: as it is, both flips, both at once) or d4 (8: all symmetries of the
    square).
    """
    return VIEWS[_known(name)]()


def tour(name: str) -> Tour:
    """The same views, without ttach's cost."""
    return TOURS[_known(name)]


def moved(pictures: torch.Tensor, move: Move) -> torch.Tensor:
    """Contiguous float pictures (..., H, W) after a move: flipped across (columns) or down (rows), or transposed.

    In place, and the same tensor, unless transposing changes the shape.
    """
    height, width = pictures.shape[-2:]
    if move == "transpose" and height != width:
        return pictures.transpose(-1, -2).contiguous()
    if pictures.device.type != "cpu":
        return moved_by_torch(pictures, move)
    for picture in pictures.view(-1, height, width).numpy():  # several times faster than torch's copies
        if move == "transpose":
            cv2.transpose(picture, picture)
        else:
            cv2.flip(picture, 1 if move == "across" else 0, picture)
    return pictures


def moved_by_torch(pictures: torch.Tensor, move: Move) -> torch.Tensor:
    """`moved` on any device, for squares where it transposes."""
    if move == "transpose":
        return pictures.copy_(pictures.transpose(-1, -2).contiguous())
    return pictures.copy_(pictures.flip(-1 if move == "across" else -2))


def _known(name: str) -> str:
    if name not in VIEWS:
        raise ValueError(f"inference.views is '{name}'; known are {', '.join(VIEWS)}")
    return name
