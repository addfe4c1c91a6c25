"""The five organs of the competition: names, class indices, the unit to find, and the physical scale of each source.

Source of every figure: the competition's data page, https://www.kaggle.com/competitions/hubmap-organ-segmentation/data
(columns `pixel_size` and `tissue_thickness`). HuBMAP slides come at a scale of their own per organ, HPA slides share
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

# Class index = position + 1; 0 is background.
ORGANS: tuple[str, ...] = ("kidney", "prostate", "largeintestine", "spleen", "lung")
SOURCES: tuple[str, ...] = ("HPA", "Hubmap")  # spelled as in the column data_source

HPA_UM_PER_PX = 0.4
HPA_THICKNESS_UM = 4.0


@dataclass(frozen=True)
class OrganFacts:
    """One organ: class index (1..5), functional tissue unit (the target), pixel size and section thickness in um per
    source.
    """

    name: str
    index: int
    ftu: str
    um_per_px: Mapping[str, float]
    thickness_um: Mapping[str, float]


def _facts(name: str, ftu: str, hubmap_um_per_px: float, hubmap_thickness_um: float) -> OrganFacts:
    return OrganFacts(
        name=name,
        index=ORGANS.index(name) + 1,
        ftu=ftu,
        um_per_px=MappingProxyType({"HPA": HPA_UM_PER_PX, "Hubmap": hubmap_um_per_px}),
        thickness_um=MappingProxyType({"HPA": HPA_THICKNESS_UM, "Hubmap": hubmap_thickness_um}),
    )


FACTS: Mapping[str, OrganFacts] = MappingProxyType(
    {
        "kidney": _facts("kidney", "glomerulus", 0.5, 10.0),
        "prostate": _facts("prostate", "glandular acinus", 6.263, 5.0),
        "largeintestine": _facts("largeintestine", "crypt", 0.2290, 8.0),
        "spleen": _facts("spleen", "white pulp", 0.4945, 4.0),
        "lung": _facts("lung", "alveolus", 0.7562, 5.0),
    }
)
