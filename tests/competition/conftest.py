"""The slide reader, once as installed and once as on a machine without imagecodecs."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
from slide_pictures import HAS_IMAGECODECS, NO_CODECS

READER_MODULES = ("tifffile", "hubmap_kit.competition.slides", "hubmap_kit.competition.tiff_segments")


def drop(prefixes: tuple[str, ...]) -> dict[str, ModuleType]:
    """Forget imported modules, in the package that holds them too; returns them for `sys.modules.update`."""
    dropped = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith(prefixes)}
    for name in dropped:
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            vars(sys.modules[parent]).pop(child, None)
    return dropped


@pytest.fixture(params=["with imagecodecs", "without imagecodecs"], scope="module")
def slides(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The reader, imported afresh; in the second run the import system refuses imagecodecs, as on Kaggle."""
    if request.param == "with imagecodecs" and not HAS_IMAGECODECS:
        pytest.skip(NO_CODECS)
    kept = drop((*READER_MODULES, "imagecodecs"))
    if request.param == "without imagecodecs":
        sys.modules["imagecodecs"] = None  # type: ignore[assignment]
    module = importlib.import_module("hubmap_kit.competition.slides")
    assert (5 in module.tifffile.TIFF.DECOMPRESSORS) == (request.param == "with imagecodecs")
    yield module
    drop((*READER_MODULES, "imagecodecs"))
    sys.modules.update(kept)
    for name in kept.keys() & set(READER_MODULES) - {"tifffile"}:
        setattr(sys.modules["hubmap_kit.competition"], name.rpartition(".")[2], kept[name])
