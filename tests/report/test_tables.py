"""The table of an experiment by organ says what inference and training will do."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from hubmap_kit import experiment
from hubmap_kit.cli.registry import app
from hubmap_kit.competition.organs import ORGANS


def rows(*words: str) -> dict[str, list[str]]:
    done = CliRunner().invoke(app, ["config", *words, "--organs"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()[2:]
    return {line.split()[0]: [cell for cell in line.split("  ") if cell.strip()] for line in lines}


@pytest.mark.parametrize("name", sorted(experiment.shipped()))
def test_every_shipped_experiment_has_a_row_for_each_organ(name: str) -> None:
    assert list(rows(name)) == list(ORGANS)


def test_scales_by_hand() -> None:
    cells = {organ: [cell.strip() for cell in row[1:3]] for organ, row in rows("robust").items()}
    # 6.263 um per px enlarged four times is 1.57, finer than the 1.6 that was asked for, which is therefore reached.
    assert cells["prostate"] == ["1.6", "1.6"]
    assert cells["kidney"] == cells["lung"] == cells["largeintestine"] == ["0.8", "0.8"]
    plain = {organ: [cell.strip() for cell in row[1:3]] for organ, row in rows("baseline").items()}
    assert plain["prostate"] == ["0.4", "6.26"]
    assert plain["largeintestine"] == ["0.4", "0.229"]


def test_what_is_different_for_one_organ_shows_there_alone() -> None:
    found = rows(
        "baseline",
        "--set",
        "augment.organs.lung.zoom=[0.7, 1.3]",
        "--set",
        "inference.thresholds.lung=0.1",
        "--set",
        "training.organ_shares.lung=2",
        "--set",
        "inference.source_thresholds.HPA.spleen=0.5",
        "--set",
        "inference.postprocess.organs.lung.shrink=10",
    )
    assert [cell.strip() for cell in found["lung"][3:]] == ["0.7-1.3", "0", "none", "2", "0.1", "0", "0", "10"]
    assert [cell.strip() for cell in found["kidney"][3:]] == ["1-1", "0", "none", "1", "fitted", "0", "0", "0"]
    assert found["spleen"][7].strip() == "0.5"
