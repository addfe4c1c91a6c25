"""Counts of tiles: the first team's published ones from the real sizes, and our own conversions."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubmap_kit.competition.tables import read_train
from hubmap_kit.tiles.conversion import convert
from hubmap_kit.tiles.convert_config import ConvertConfig
from hubmap_kit.tiles.writers import PUBLISHED, count, count_table, count_text


def test_the_published_counts(shared_data: Path) -> None:
    rows = {
        row.name: row for row in count_table(read_train(shared_data / "hubmap-2022/train.csv.gz", check_files=False))
    }
    assert sum(row.published is not None for row in rows.values()) == len(PUBLISHED) == 7
    for name in ("3000-768-r2", "2048-512-r2"):
        assert rows[name].padded == rows[name].published == 1404 == 351 * 4 and rows[name].filtered == 0
    others = [
        row for name, row in rows.items() if row.published is not None and name not in ("3000-768-r2", "2048-512-r2")
    ]
    for row in others:
        assert row.published is not None and row.padded > row.published
        # A filter only takes tiles away: where the edge was dropped there would have been too few to begin with.
        assert row.dropped < row.published or row.dropped == row.padded
    assert 0.18 < max(row.filtered or 0 for row in others) < 0.19
    # 326 slides of 3000 px, and 25 others.
    assert 36 * 326 < rows["3000-512-r1"].padded < 36 * 351


def test_other_slides_have_no_published_counts(shared_data: Path) -> None:
    slides = read_train(shared_data / "hubmap-mini/train.csv")
    assert all(row.published is None and row.filtered is None for row in count_table(slides))
    assert "this table has 26" in count_text(slides)


@pytest.mark.parametrize(
    "values",
    [
        {"size": 256, "edge": "shift"},
        {"size": 256, "edge": "drop", "overlap": 0.5},
        {"size": 96, "reduce": 2, "format": "png"},
        {"kind": "crop+grid", "size": 128, "canvas": 500, "format": "png"},
        {"kind": "resize", "size": 64},
        {"kind": "pad", "size": 256},
    ],
)
def test_a_count_is_what_a_conversion_makes(shared_data: Path, tmp_path: Path, values: dict) -> None:
    slides = read_train(shared_data / "hubmap-mini/train.csv")[:5]
    config = ConvertConfig(**values)
    assert convert(slides, tmp_path / "out", config).counts.tiles == count(slides, config)
