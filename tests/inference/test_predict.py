"""A submission from the pipeline is, byte for byte, that of a plain loop; faults of slides and of devices cost no more
than they must.
"""

from __future__ import annotations

import csv
import math
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.submission import SubmissionWriter
from hubmap_kit.competition.tables import Slide, read_test
from hubmap_kit.errors import SubmissionError
from hubmap_kit.inference.ensemble import Effort, Ensemble, load_ensemble, network_passes
from hubmap_kit.inference.predict import duration, predict_slides, segment

CPU = torch.device("cpu")
PLAIN = ["inference.tune_speed=false", "inference.views=none"]


@pytest.fixture(scope="module")
def slides(sample_data: Path) -> list[Slide]:
    return read_test(sample_data / "test.csv")[:7]


@pytest.fixture(scope="module")
def team(tiny_run: Path) -> list[Ensemble]:
    """Two ensembles of one fold each, with different thresholds."""
    one, two = (
        load_ensemble(tiny_run, CPU, [0], PLAIN),
        load_ensemble(tiny_run, CPU, [1], [*PLAIN, "inference.thresholds={kidney: 0.4}"]),
    )
    return [one, replace(two, thresholds={**two.thresholds, "lung": 0.3})]


@pytest.fixture(scope="module")
def plain(slides: list[Slide], team: list[Ensemble], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The submission of a plain loop: read, mean, threshold, encode, one slide after the other."""
    out = tmp_path_factory.mktemp("plain") / "submission.csv"
    with SubmissionWriter(out, [slide.id for slide in slides]) as writer:
        for slide in slides:
            pixels = slide_files.read(slide.path)
            plane = (team[0].probability(pixels, slide.um_per_px) + team[1].probability(pixels, slide.um_per_px)) / 2
            fitted = [each.thresholds[slide.organ] for each in team]
            if slide.organ == "kidney":
                fitted[1] = 0.4
            writer.add(slide.id, rle.encode(plane >= np.float32(sum(fitted) / 2)))
    return out


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("governed", [False, True])
def test_the_pipeline_gives_what_a_plain_loop_gives(
    devices: int, governed: bool, slides: list[Slide], team: list[Ensemble], plain: Path, tmp_path: Path
) -> None:
    seen, threads = {}, set()

    def on_mask(slide: Slide, pixels: np.ndarray, mask: np.ndarray) -> None:
        threads.add(threading.current_thread().name)
        seen[slide.id] = (np.array_equal(pixels, slide_files.read(slide.path)), rle.encode(mask))

    out = tmp_path / "s.csv"
    failures = predict_slides(slides, [team] * devices, out, on_mask=on_mask, left=(lambda: 1e6) if governed else None)
    assert failures == [] and out.read_bytes() == plain.read_bytes()
    assert seen == {
        slide.id: (True, rle.encode(segment(slide, slide_files.read(slide.path), team))) for slide in slides
    }
    assert len(threads) == 1 and (tmp_path / "governor.csv").is_file() == governed


def test_a_slide_that_cannot_be_read_ends_a_run_after_the_rows_before_it(
    slides: list[Slide], team: list[Ensemble], plain: Path, tmp_path: Path
) -> None:
    broken = [*slides[:4], replace(slides[4], path=tmp_path / "none.tiff"), *slides[5:]]
    rows = plain.read_text().splitlines()
    for devices in (1, 2):
        with pytest.raises(slide_files.SlideError, match="none.tiff"):
            predict_slides(broken, [team] * devices, tmp_path / "s.csv")
        assert (tmp_path / "s.csv.partial").read_text().splitlines() == rows[:5] and not (tmp_path / "s.csv").exists()
    failures = predict_slides(broken, [team] * 2, tmp_path / "s.csv", on_error="degrade", left=lambda: 1e6)
    assert [failure.id for failure in failures] == [slides[4].id]
    assert (tmp_path / "s.csv").read_text().splitlines() == [*rows[:5], f"{slides[4].id},", *rows[6:]]
    assert "it could not be read" in (tmp_path / "governor.csv").read_text()


class Card(nn.Module):
    """A network on a card that takes `seconds` for a pass, and breaks after so many passes, with the words that torch
    has for it.
    """

    def __init__(self, network: nn.Module, passes: float = math.inf, seconds: float = 0.0) -> None:
        super().__init__()
        self.network, self.passes, self.seconds, self.done = network, passes, seconds, 0

    def forward(self, tiles: torch.Tensor) -> torch.Tensor:
        if self.done >= self.passes:
            raise RuntimeError(
                "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported elsewhere"
            )
        self.done += 1
        time.sleep(self.seconds)
        return self.network(tiles)


def breaking(team: list[Ensemble], passes: float) -> list[Ensemble]:
    return [replace(team[0], networks=[Card(team[0].networks[0], passes)]), team[1]]


@pytest.mark.parametrize("devices", [1, 2])
def test_a_card_that_breaks_is_replaced(
    devices: int,
    slides: list[Slide],
    team: list[Ensemble],
    plain: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, made = breaking(team, math.inf), []
    segment(slides[0], slide_files.read(slides[0].path), whole)
    few = whole[0].networks[0].done + 1  # enough for the first slide, too few for the second

    def spare() -> list[Ensemble]:
        made.append(1)
        return team

    teams = [breaking(team, few), team][:devices]
    assert predict_slides(slides, teams, tmp_path / "s.csv", on_error="degrade", left=lambda: 1e6, spare=spare) == []
    assert (tmp_path / "s.csv").read_bytes() == plain.read_bytes() and made == [1]
    assert "illegal memory access" in caplog.text and "is given up" in caplog.text
    # Without another device each slide fails for itself; in a run that shall raise, the first one ends it.
    failures = predict_slides(slides, [breaking(team, few)], tmp_path / "s.csv", on_error="degrade")
    assert [failure.id for failure in failures] == [slide.id for slide in slides[1:]]
    assert {failure.reason for failure in failures} == {"CUDA error: an illegal memory access was encountered"}
    with pytest.raises(RuntimeError, match="illegal memory"):
        predict_slides(slides, [breaking(team, few)], tmp_path / "s.csv", spare=spare)


def test_effort_reaches_every_ensemble(slides: list[Slide], team: list[Ensemble]) -> None:
    pixels = slide_files.read(slides[0].path)
    less = (Effort(0.0, "none", 1, 2), Effort(0.5, "flips", 1))
    plane = (
        sum(each.probability(pixels, slides[0].um_per_px, effort) for each, effort in zip(team, less, strict=True)) / 2
    )
    fitted = (
        sum(
            each.experiment.inference.thresholds.get(slides[0].organ, each.thresholds[slides[0].organ]) for each in team
        )
        / 2
    )
    assert np.array_equal(segment(slides[0], pixels, team, less), plane >= np.float32(fitted))
    assert not np.array_equal(plane, sum(each.probability(pixels, slides[0].um_per_px) for each in team) / 2)


def test_a_tight_deadline_takes_effort_away_and_says_so(
    slides: list[Slide], tiny_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ensemble = load_ensemble(
        tiny_run,
        CPU,
        None,
        ["inference.tune_speed=false", "inference.views=d4", "inference.overlap=0.5", "inference.batch_size=1"],
    )
    ensemble = replace(ensemble, networks=[Card(network, seconds=0.002) for network in ensemble.networks])
    passes = sum(network_passes(slide, ensemble.experiment, ensemble.full_effort) for slide in slides)
    end = time.monotonic() + passes * 0.002 / 3  # however fast the machine is, the cards alone take three times that
    with suppress(SubmissionError):  # on a machine that is busy enough not one slide may be done
        predict_slides(
            slides, [[ensemble]], tmp_path / "s.csv", left=lambda: end - time.monotonic(), on_error="degrade"
        )
    with (tmp_path / "governor.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["slide"] for row in rows] == [slide.id for slide in slides]
    assert {row["effort"] for row in rows} - {str(ensemble.full_effort)}
    assert all(float(row["measured_s"]) > 0 for row in rows if row["effort"])
    assert "in the network" in caplog.text and "slides with" in caplog.text
    written = [line.split(",") for line in (tmp_path / "s.csv").read_text().splitlines()[1:]]
    assert [slide_id for slide_id, _ in written] == [slide.id for slide in slides]
    assert all(not text for (_, text), row in zip(written, rows, strict=True) if not row["effort"])


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (59.7, "59.7 s"),
        (60, "1 min 0 s"),
        (723.4, "12 min 3 s"),
        (3599.6, "1 h 0 min"),
        (28_920, "8 h 2 min"),
    ],
)
def test_durations_are_said_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_pixel_size_that_cannot_be_true_is_told_and_costs_nothing(
    slides: list[Slide], team: list[Ensemble], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = replace(slides[0], um_per_px=slides[0].um_per_px / 100)
    assert predict_slides([one], [team], tmp_path / "s.csv") == []
    told = [record.getMessage() for record in caplog.records if "pixel_size" in record.getMessage()]
    assert len(told) == 1 and f"pixel_size of slide {one.id}" in told[0] and "mm of tissue" in told[0]
