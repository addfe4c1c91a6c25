"""Views in the colours of the training slides: what they show, when there are none, what they cost, and the file they
come from.
"""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis
from hypothesis import strategies as st
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.__main__ import main
from hubmap_kit.augment.stain import Reference, macenko, match_histograms, reinhard
from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import Slide, read_test
from hubmap_kit.errors import CheckpointError
from hubmap_kit.inference.ensemble import (
    Effort,
    Ensemble,
    full_effort,
    ladder,
    load_ensemble,
    load_fold,
    network_passes,
)
from hubmap_kit.inference.normalise import STAIN_FILE, as_plain, read_references, references_of, restained
from hubmap_kit.inference.predict import predict_slides
from hubmap_kit.sample.slide import SlideSpec, draw

CPU = torch.device("cpu")
BY_HAND = {"reinhard": reinhard, "macenko": macenko, "histogram": match_histograms}


def picture(organ: str, source: str, seed: int = 0, side: int = 256) -> np.ndarray:
    return draw(SlideSpec(organ, source, side, side, 1.0), np.random.default_rng(seed))[0]


PINK, REFERENCE = picture("spleen", "Hubmap"), Reference.of(picture("kidney", "HPA", 1), "7")


class Channel(nn.Module):
    """Says the level of one channel, and counts the windows it was shown."""

    def __init__(self, channel: int = 0) -> None:
        super().__init__()
        self.channel, self.seen = channel, 0

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.seen += len(inputs)
        return torch.logit(inputs[:, self.channel : self.channel + 1], eps=1e-7)


class Neighbours(nn.Module):
    """A network whose answer depends on all colours and on what lies around."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 5, padding=2), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.layers(inputs) * 5


def ensemble(network: nn.Module, *methods: str, scale: dict | None = None, views: str = "none") -> Ensemble:
    inference = {"window": 128, "views": views, "skip_background": False, "normalise": list(methods)}
    settings = experiment.parse(
        {"model": {"mean": [0.0] * 3, "std": [1.0] * 3}, "scale": scale or {}, "inference": inference}, "test"
    )
    return Ensemble(settings, [network.eval()], {}, CPU, references={"kidney": REFERENCE})


def lab(levels: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB levels 0..255 (N, 3), after IEC 61966-2-1 and CIE 15."""
    value = levels / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    scaled = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    cube = np.where(scaled > (6 / 29) ** 3, np.cbrt(scaled), scaled / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * cube[:, 1] - 16, 500 * (cube[:, 0] - cube[:, 1]), 200 * (cube[:, 1] - cube[:, 2])], axis=1)


def tissue(image: np.ndarray) -> np.ndarray:
    return np.linalg.norm(-np.log10(np.maximum(image.astype(np.float64), 1) / 255), axis=2) >= 0.15


def test_the_network_is_shown_tissue_in_the_colours_of_the_reference() -> None:
    """Three networks that tell what they see: the mean of two views gives the second view away."""
    planes = [
        ensemble(Channel(channel), "reinhard").plane(PINK, organ="kidney", source="Hubmap") for channel in range(3)
    ]
    shown = 2 * 255 * np.stack(planes, axis=2).astype(np.float64) - PINK
    where, training = tissue(PINK), picture("kidney", "HPA", 1)
    wanted = lab(training[tissue(training)].astype(np.float64)).mean(axis=0)
    before, after = (lab(np.clip(levels[where].astype(np.float64), 0, 255)).mean(axis=0) for levels in (PINK, shown))
    assert np.abs(before - wanted).max() > 10
    np.testing.assert_allclose(after, wanted, atol=1.5)  # levels are whole numbers and end at 255


@pytest.mark.parametrize("methods", [("macenko",), ("reinhard", "histogram"), ("histogram", "macenko", "reinhard")])
def test_views_are_averaged_equally(methods: tuple[str, ...]) -> None:
    """Against separate calls with pictures that were restained beforehand."""
    network, raw = Neighbours(), ensemble(Neighbours(), views="flips")
    expected = np.mean(
        [raw.plane(image) for image in (PINK, *(BY_HAND[method](PINK, REFERENCE) for method in methods))], axis=0
    )
    found = ensemble(network, *methods, views="flips").plane(PINK, organ="kidney", source="Hubmap")
    assert found.dtype == np.float32 and np.abs(expected - raw.plane(PINK)).max() > 0.02
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_slides_are_normalised_at_the_networks_scale() -> None:
    scale, large = {"reduce": 2}, cv2.resize(PINK, (500, 380))
    small = cv2.resize(large, (250, 190), interpolation=cv2.INTER_AREA)
    planes = [ensemble(Neighbours()).plane(image) for image in (small, reinhard(small, REFERENCE))]
    expected = cv2.resize(np.mean(planes, axis=0), (500, 380), interpolation=cv2.INTER_LINEAR)
    found = ensemble(Neighbours(), "reinhard", scale=scale).probability(large, 0.5, organ="kidney", source="Hubmap")
    np.testing.assert_allclose(found, expected, atol=2e-6)


@pytest.mark.parametrize(
    ("organ", "source"), [("kidney", "HPA"), ("kidney", ""), ("lung", "Hubmap"), ("", "Hubmap"), ("unknown", "Hubmap")]
)
def test_other_slides_are_left_alone_to_the_bit(organ: str, source: str) -> None:
    """HPA's, those that tell no source, and those of organs without a reference."""
    network = Neighbours()
    plain, normalised = ensemble(network), ensemble(network, "reinhard", "macenko", "histogram")
    np.testing.assert_array_equal(
        normalised.plane(PINK, organ=organ, source=source), plain.plane(PINK, organ=organ, source=source)
    )


def test_a_view_that_would_be_the_raw_one_again_is_not_predicted() -> None:
    glass = np.full((256, 256, 3), 244, np.uint8)
    one_stain = np.random.default_rng(0).integers(90, 110, (256, 256, 1)).repeat(3, axis=2).astype(np.uint8)
    for image, methods, views in [
        (glass, BY_HAND, 1),
        (one_stain, ["macenko"], 1),
        (one_stain, ["macenko", "reinhard"], 2),
        (PINK, BY_HAND, 4),
    ]:
        network = Channel()
        image.setflags(write=False)  # as slides in a store are
        ensemble(network, *methods).plane(image, organ="kidney", source="Hubmap")
        alone = Channel()
        ensemble(alone).plane(image)
        assert network.seen == views * alone.seen
        assert len(list(restained(image, REFERENCE, list(methods)))) == views - 1


def test_an_effort_may_give_methods_up() -> None:
    config = ensemble(Channel(), "reinhard", "macenko", "reinhard").experiment.inference
    assert full_effort(config, 2).normalise == ("reinhard", "macenko")  # a method counts once
    first = ladder(config, 2)[:4]
    assert [effort.normalise for effort in first] == [("reinhard", "macenko"), ("reinhard",), (), ()]
    assert first[2].overlap == config.overlap > first[3].overlap
    assert "normalised by reinhard and macenko" in str(first[0]) and "normalised" not in str(first[2])
    network = Neighbours()
    both, raw = ensemble(network, "reinhard", "macenko"), ensemble(network)
    less = both.plane(PINK, Effort(0.25, "none", 1, normalise=("reinhard",)), "kidney", "Hubmap")
    np.testing.assert_array_equal(less, ensemble(network, "reinhard").plane(PINK, organ="kidney", source="Hubmap"))
    np.testing.assert_array_equal(both.plane(PINK, Effort(0.25, "none", 1), "kidney", "Hubmap"), raw.plane(PINK))


@hypothesis(deadline=None, max_examples=30)
@given(
    methods=st.lists(st.sampled_from(list(BY_HAND)), unique=True),
    views=st.sampled_from(["none", "flips", "d4"]),
    side=st.integers(64, 700),
)
def test_what_a_slide_costs_is_what_the_network_sees(methods: list[str], views: str, side: int) -> None:
    small = cv2.resize(PINK, (side, side))
    for source in ("HPA", "Hubmap"):
        network = Channel()
        team = ensemble(network, *methods, views=views)
        team.plane(small, organ="kidney", source=source)
        slide = Slide("1", "kidney", source, side, side, 0.4, 4.0, Path("1.tiff"), None)
        assert network.seen == network_passes(slide, team.experiment, team.full_effort)


# ---------------------------------------------------------------- the file in a run folder


def test_one_fold_alone_never_uses_a_slide_that_it_holds_out(tiny_run: Path) -> None:
    """The tiny run has two folds, so the slides of one are the other's references."""
    with (tiny_run / "folds.csv").open(newline="") as handle:
        fold_of = {row["id"]: int(row["fold"]) for row in csv.DictReader(handle)}
    kept = read_references(tiny_run)
    assert len(kept) == 5
    for fold in (0, 1):
        assert {fold_of[reference.name] for reference in read_references(tiny_run, fold).values()} == {1 - fold}
    config = load_ensemble(tiny_run, CPU).experiment.inference
    assert references_of(tiny_run, config) == {}  # nobody wants any
    wanted = experiment.read(tiny_run / "config.yaml")
    wanted = wanted.model_copy(update={"inference": wanted.inference.model_copy(update={"normalise": ["macenko"]})})
    assert {key: value.name for key, value in load_fold(wanted, tiny_run / "fold1", CPU).references.items()} == {
        key: value.name for key, value in read_references(tiny_run, 1).items()
    }


def spoilt(entry: dict, key: str, value: object) -> dict:
    return {"format": 1, "organs": {"kidney": [{**entry, key: value}]}}


ENTRY = as_plain(REFERENCE, 0)
DAMAGED = {
    "no JSON": "{",
    "bytes": b"\xff\xfe\x00",
    "a list": [],
    "another format": {"format": 2, "organs": {}},
    "no organs": {"format": 1},
    "organs of numbers": {"format": 1, "organs": {"kidney": 3}},
    "an empty entry": {"format": 1, "organs": {"kidney": [{}]}},
    "a short mean": spoilt(ENTRY, "mean", [1, 2]),
    "words": spoilt(ENTRY, "std", ["a", "b", "c"]),
    "NaN": spoilt(ENTRY, "std", [1, 2, float("nan")]),
    "falling shares": spoilt(ENTRY, "shares", np.array(ENTRY["shares"])[:, ::-1].tolist()),
    "no fold": spoilt(ENTRY, "fold", None),
    "long vectors": spoilt(ENTRY, "vectors", (2 * np.array(ENTRY["vectors"])).tolist()),
    "no strength": spoilt(ENTRY, "strengths", [1, -1]),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_sentence(content: object, tmp_path: Path) -> None:
    data = (
        content
        if isinstance(content, bytes)
        else (content if isinstance(content, str) else json.dumps(content)).encode()
    )
    (tmp_path / STAIN_FILE).write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"stain_references\.json is damaged .*; delete it, 'hubmap evaluate .*' writes it anew"
    ) as error:
        read_references(tmp_path)
    assert "\n" not in str(error.value)


def test_what_was_written_is_read(tmp_path: Path) -> None:
    (tmp_path / STAIN_FILE).write_text(json.dumps({"format": 1, "organs": {"lung": [ENTRY]}}))
    assert list(read_references(tmp_path)) == ["lung"] and read_references(tmp_path, held_out=0) == {}
    found = read_references(tmp_path)["lung"]
    for key in ("vectors", "strengths", "mean", "std", "shares"):
        np.testing.assert_allclose(getattr(found, key), getattr(REFERENCE, key), atol=1e-6)
    for method in BY_HAND.values():
        assert np.abs(method(PINK, found).astype(int) - method(PINK, REFERENCE)).max() <= 1


# ---------------------------------------------------------------- the command line


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def test_table(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of each source."""
    folder = tmp_path_factory.mktemp("both")
    with (sample_data / "test.csv").open(newline="") as handle:
        rows = list(csv.DictReader(handle))
    chosen = [row for source in ("HPA", "Hubmap") for row in [row for row in rows if row["data_source"] == source][:2]]
    assert len(chosen) == 4
    (folder / "test_images").mkdir()
    for row in chosen:
        shutil.copy(sample_data / "test_images" / f"{row['id']}.tiff", folder / "test_images")
    with (folder / "test.csv").open("w", newline="") as handle:
        writer = csv.DictWriter(handle, list(rows[0]))
        writer.writeheader()
        writer.writerows(chosen)
    return folder / "test.csv"


PLAIN = ("inference.tune_speed=false", "inference.views=none")
WISH = "inference.normalise=[reinhard,histogram]"


def masks(path: Path) -> dict[str, str]:
    with path.open(newline="") as handle:
        return {row["id"]: row["rle"] for row in csv.DictReader(handle)}


def words(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def test_predict_normalises_hubmap_slides_only(tiny_run: Path, test_table: Path, tmp_path: Path) -> None:
    raw, references, slides = (
        load_ensemble(tiny_run, CPU, None, PLAIN),
        read_references(tiny_run),
        read_test(test_table),
    )
    pixels = {slide.id: slide_files.read(slide.path) for slide in slides}
    # The tiny networks know little: thresholds in the middle of what they say make masks of all that they say.
    middle = {slide.source: {} for slide in slides}
    for slide in slides:
        middle[slide.source][slide.organ] = round(
            float(np.median(raw.probability(pixels[slide.id], slide.um_per_px, organ=slide.organ))), 5
        )
    halves = (*PLAIN, f"inference.source_thresholds={json.dumps(middle)}")
    for name, more in (("plain", ()), ("normalised", (WISH,))):
        assert (
            run(
                "predict",
                tiny_run,
                "--test",
                test_table,
                "--out",
                tmp_path / f"{name}.csv",
                "--device",
                "cpu",
                *words(*halves, *more),
            )
            == 0
        )
    plain, normalised = (masks(tmp_path / f"{name}.csv") for name in ("plain", "normalised"))
    for slide in slides:
        if slide.source == "HPA":
            assert normalised[slide.id] == plain[slide.id]
            continue
        assert normalised[slide.id] != plain[slide.id]
        shape = pixels[slide.id].shape[:2]
        zoom = min(slide.um_per_px / 3.2, 4.0)  # this run's scale is 3.2 um a pixel, and 4 its max_zoom
        there, back = (cv2.INTER_AREA, cv2.INTER_LINEAR) if zoom < 1 else (cv2.INTER_LINEAR, cv2.INTER_AREA)
        small = cv2.resize(pixels[slide.id], tuple(round(length * zoom) for length in shape[::-1]), interpolation=there)
        views = [small, reinhard(small, references[slide.organ]), match_histograms(small, references[slide.organ])]
        plane = cv2.resize(
            np.mean([raw.plane(view, organ=slide.organ) for view in views], axis=0), shape[::-1], interpolation=back
        )
        wanted = plane >= np.float32(middle["Hubmap"][slide.organ])
        assert wanted.any() and (rle.decode(normalised[slide.id], *shape) != wanted).mean() < 1e-3


def test_a_governed_run_with_time_enough_gives_the_same(tiny_run: Path, test_table: Path, tmp_path: Path) -> None:
    team = [load_ensemble(tiny_run, CPU, None, [*PLAIN, WISH])]
    slides = read_test(test_table)
    for name, left in (("free", None), ("governed", lambda: 1e6)):
        assert predict_slides(slides, [team], tmp_path / name / "s.csv", left=left) == []
    assert (tmp_path / "free/s.csv").read_bytes() == (tmp_path / "governed/s.csv").read_bytes()
    assert "normalised by reinhard and histogram" in (tmp_path / "governed/governor.csv").read_text()


def test_a_run_without_the_file_says_who_writes_it_and_evaluate_does(
    tiny_run: Path, test_table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    (old / STAIN_FILE).unlink()
    predict = ("predict", old, "--test", test_table, "--out", tmp_path / "s.csv", "--device", "cpu", *words(*PLAIN))
    assert run(*predict, *words(WISH)) == 1
    said = capsys.readouterr().err
    assert f"{STAIN_FILE} is missing" in said and "hubmap evaluate" in said and "Traceback" not in said
    assert run(*predict) == 0  # who does not want it does not need it
    stores = tiny_run.parent / "stores"
    assert run("evaluate", old, "--device", "cpu", "--no-pictures", "--stores", stores, *words(*PLAIN, WISH)) == 0
    assert (old / STAIN_FILE).read_bytes() == (tiny_run / STAIN_FILE).read_bytes()
    assert run(*predict, *words(WISH)) == 0


def test_an_ensemble_with_other_networks_keeps_its_references(tiny_run: Path) -> None:
    team = load_ensemble(tiny_run, CPU, None, [*PLAIN, WISH])
    assert replace(team, networks=team.networks[:1]).references is team.references and len(team.references) == 5
