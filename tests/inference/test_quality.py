"""What a step down costs, measured on slides with known masks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import read_test, read_train
from hubmap_kit.errors import TableError
from hubmap_kit.inference.ensemble import Effort, load_ensemble
from hubmap_kit.inference.predict import segment
from hubmap_kit.inference.quality import quality_table


def test_each_step_is_measured_against_the_known_masks(sample_data: Path, tiny_run: Path) -> None:
    ensemble = load_ensemble(
        tiny_run, torch.device("cpu"), None, ["inference.overlap=0.25", "inference.tune_speed=false"]
    )
    slides = read_train(sample_data / "train.csv")[:3]
    # A slide whose known mask is what the config's own effort gives has a Dice of 1 there, and none but there for
    # certain.
    own = [replace(slide, rle=rle.encode(segment(slide, slide_files.read(slide.path), [ensemble]))) for slide in slides]
    table = quality_table(ensemble, own)
    assert table["effort"].iloc[0] == str(ensemble.full_effort) and table["effort"].iloc[-1] == str(
        Effort(0.0, "none", 1, 4)
    )
    assert list(table["step"]) == list(range(len(table))) and table["dice"].iloc[0] == 1 and table["lost"].iloc[0] == 0
    assert (table["dice"].iloc[1:] < 1).any() and table["lost"].to_numpy() == pytest.approx(1 - table["dice"])
    assert (
        table["cost"].iloc[0] == table["passes"].iloc[0] == 1
        and table["passes"].is_monotonic_decreasing
        and (table["seconds"] > 0).all()
    )
    cheapest = Effort(0.0, "none", 1, 4)
    masks = [rle.encode(segment(slide, slide_files.read(slide.path), [ensemble], (cheapest,))) for slide in own]
    assert table["dice"].iloc[-1] == pytest.approx(
        sum(rle.dice(mask, slide.rle) for mask, slide in zip(masks, own, strict=True)) / 3
    )


def test_slides_without_masks_are_refused(sample_data: Path, tiny_run: Path) -> None:
    with pytest.raises(TableError, match="none of the .* slides has a mask"):
        quality_table(load_ensemble(tiny_run, torch.device("cpu")), read_test(sample_data / "test.csv"))
