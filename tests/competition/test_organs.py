"""The organ facts against the competition's own tables."""

from __future__ import annotations

import csv
import gzip
import io
from pathlib import Path

import pytest

from hubmap_kit.competition.organs import FACTS, ORGANS, SOURCES


def test_indices_leave_zero_to_the_background() -> None:
    assert [FACTS[organ].index for organ in ORGANS] == [1, 2, 3, 4, 5]
    assert all(FACTS[organ].name == organ and set(FACTS[organ].um_per_px) == set(SOURCES) for organ in ORGANS)


def test_facts_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        FACTS["lung"].um_per_px["HPA"] = 1.0  # type: ignore[index]


def test_facts_are_those_of_the_competition_tables(shared_data: Path) -> None:
    train = gzip.decompress((shared_data / "hubmap-2022" / "train.csv.gz").read_bytes()).decode()
    test = (shared_data / "hubmap-2022" / "test.csv").read_text()
    before = csv.field_size_limit(10**9)
    try:
        rows = [row for text in (train, test) for row in csv.DictReader(io.StringIO(text, newline=""))]
    finally:
        csv.field_size_limit(before)
    assert {row["organ"] for row in rows} == set(ORGANS) and {row["data_source"] for row in rows} == set(SOURCES)
    for row in rows:
        facts, source = FACTS[row["organ"]], row["data_source"]
        assert float(row["pixel_size"]) == facts.um_per_px[source]
        assert float(row["tissue_thickness"]) == facts.thickness_um[source]
