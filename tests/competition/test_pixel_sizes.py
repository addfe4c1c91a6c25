"""Pixel sizes that files state, and the warnings where they and the table, or the extent of a slide, cannot both be
true.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hubmap_kit.competition.pixel_sizes import PixelSizeWatch, odd_extent, odd_file
from hubmap_kit.competition.slides import stated_um_per_px
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.config import ScaleConfig, TilesConfig
from hubmap_kit.report.eda_oddities import _extents
from hubmap_kit.tiles.store import open_or_build

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def write(path: Path, **tags: object) -> Path:
    tifffile.imwrite(path, PIXELS, photometric="rgb", **tags)
    return path


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    um=st.floats(0.06, 9.9),
    unit=st.sampled_from(["CENTIMETER", "INCH"]),
    big=st.booleans(),
    order=st.sampled_from("<>"),
)
def test_what_a_tiff_states(tmp_path: Path, um: float, unit: str, big: bool, order: str) -> None:
    density = {"CENTIMETER": 10_000, "INCH": 25_400}[unit] / um
    path = tmp_path / "a.tif"
    tifffile.imwrite(
        path,
        PIXELS,
        photometric="rgb",
        resolution=(density, density),
        resolutionunit=unit,
        bigtiff=big,
        byteorder=order,
    )
    assert stated_um_per_px(path) == pytest.approx(um, rel=1e-4)


@pytest.mark.parametrize(
    ("size", "unit", "um"),
    [(0.65, "\u00b5m", 0.65), (650, "nm", 0.65), (0.00065, "mm", 0.65), (0.3, None, 0.3), (3, "pixel", None)],
)
def test_what_ome_states(tmp_path: Path, size: float, unit: str | None, um: float | None) -> None:
    metadata = {"axes": "YXS", "PhysicalSizeX": size, "PhysicalSizeY": 77} | (
        {} if unit is None else {"PhysicalSizeXUnit": unit}
    )
    found = stated_um_per_px(write(tmp_path / "a.ome.tif", metadata=metadata))
    assert found is None if um is None else found == pytest.approx(um)


@pytest.mark.parametrize(
    "tags",
    [
        {},
        {"resolution": (72, 72), "resolutionunit": "INCH"},
        {"resolution": (300, 300), "resolutionunit": "INCH"},
        {"resolution": (1200, 1200), "resolutionunit": "INCH"},
        {"resolution": (1, 1), "resolutionunit": "CENTIMETER"},
        {"resolution": (25_000, 25_000), "resolutionunit": "NONE"},
        {"resolution": (0, 0), "resolutionunit": "CENTIMETER"},
    ],
)
def test_what_writers_put_there_by_themselves_is_no_pixel_size(tmp_path: Path, tags: dict) -> None:
    assert stated_um_per_px(write(tmp_path / "a.tif", **tags)) is None


def test_files_that_state_nothing_raise_nothing(tmp_path: Path, shared_data: Path) -> None:
    whole = write(tmp_path / "a.tif", resolution=(25_000, 25_000), resolutionunit="CENTIMETER").read_bytes()
    for cut in (0, 3, 8, 20, len(whole) // 2):
        (tmp_path / "b.tif").write_bytes(whole[:cut])
        assert stated_um_per_px(tmp_path / "b.tif") in (None, pytest.approx(0.4))
    assert stated_um_per_px(tmp_path / "missing.tif") is None and stated_um_per_px(tmp_path) is None
    assert stated_um_per_px(shared_data / "stain-references/target_PAS.jpg") is None
    real = read_train(shared_data / "hubmap-mini/train.csv")
    assert not [slide.id for slide in real if odd_file(slide) or odd_extent(slide, slide.height, slide.width)]


def a_slide(path: Path, um_per_px: float) -> Slide:
    return Slide(path.stem, "kidney", "HPA", 40, 30, um_per_px, 4.0, path, "5 3")


@pytest.mark.parametrize(
    ("height", "width", "um", "odd"),
    [
        (3000, 3000, 0.4, False),
        (160, 160, 6.263, False),
        (4500, 4500, 0.229, False),
        (775, 522, 0.62, False),
        (100, 1000, 0.4, False),
        (3000, 3000, 40.0, True),
        (160, 160, 0.4, True),
        (10, 12000, 0.5, True),
    ],
)
def test_extents(height: int, width: int, um: float, odd: bool) -> None:
    found = odd_extent(a_slide(Path("a.tiff"), um), height, width)
    assert bool(found) == odd and (not odd or f"{height} x {width} px of {um:g} um are" in found)


def test_the_watch_names_both_sizes_in_a_few_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tags = {"resolution": (10_000 / 3.3, 10_000 / 3.3), "resolutionunit": "CENTIMETER"}
    slides = [a_slide(write(tmp_path / f"s{number}.tif", **tags), 3.0 if number % 2 else 6.6) for number in range(20)]
    watch = PixelSizeWatch()
    for slide in [*slides, *slides]:
        watch.look(slide, 40, 30)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 6 and len(set(told)) == 6
    assert (
        told[0]
        == "pixel_size of slide s0 (kidney of HPA): the table says 6.6 um a pixel, s0.tif says 3.3 um; the table is"
        " believed"
    )
    assert not any(" s1 " in line for line in told), "10 % apart is no oddity"


def test_a_store_is_built_with_the_tables_size_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tags = {"resolution": (25_000, 25_000), "resolutionunit": "CENTIMETER"}
    wrong, right = a_slide(write(tmp_path / "wrong.tif", **tags), 8.0), a_slide(write(tmp_path / "right.tif"), 8.0)
    caplog.set_level(logging.WARNING)
    store = open_or_build(
        tmp_path / "stores", [wrong, right], ScaleConfig(policy="physical", um_per_px=16.0), TilesConfig(size=64)
    )
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [
        "pixel_size of slide wrong (kidney of HPA)"
    ]
    assert "the table says 8 um a pixel, wrong.tif says 0.4 um" in caplog.text
    np.testing.assert_array_equal(store.slides[["rows", "cols"]], [[20, 15], [20, 15]])
    assert list(_extents([wrong, right])) == [("pixel size of table and file", "wrong", odd_file(wrong))]
    assert [kind for kind, _, _ in _extents([replace(right, um_per_px=0.4)])] == ["extent of tissue"]
