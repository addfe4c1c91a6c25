"""Every job that predicts tells the source of its slides, so that inference.normalise reaches those of HuBMAP, and only
those.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tqdm import tqdm

from hubmap_kit.build_id import unfold
from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.external import TEST, read_table
from hubmap_kit.competition.folds import read_folds
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.competition.tables import Slide, read_test, read_train
from hubmap_kit.inference.ensemble import load_ensemble, load_fold, run_settings
from hubmap_kit.jobs import predict
from hubmap_kit.jobs.blend import Member, gather
from hubmap_kit.jobs.labellers import Rules
from hubmap_kit.jobs.pseudo import pseudo
from hubmap_kit.publish.staging import stage_weights
from hubmap_kit.tiles.scaling import resize_plane
from hubmap_kit.tiles.store import TileStore, decode_for, open_or_build
from hubmap_kit.training.counts import read_counts, threshold_counts
from hubmap_kit.training.oof import predict_fold

CPU = torch.device("cpu")
PLAIN = ["inference.tune_speed=false", "inference.views=none"]
WISH = [*PLAIN, "inference.normalise=[reinhard]"]
ALL = Rules(0, 0, 0, dict.fromkeys(("kidney", "prostate", "largeintestine", "spleen", "lung"), (0.0, 1.0)))


@pytest.fixture(scope="module")
def slides(sample_data: Path) -> list[Slide]:
    """Training slides of which every second one is taken for HuBMAP's."""
    found = read_train(sample_data / "train.csv")
    return [replace(slide, source="Hubmap" if place % 2 else "HPA") for place, slide in enumerate(found)]


@pytest.fixture
def store(slides: list[Slide], tiny_run: Path, sample_data: Path) -> TileStore:
    settings = run_settings(tiny_run)
    found = open_or_build(
        tiny_run.parent / "stores", read_train(sample_data / "train.csv"), settings.scale, settings.tiles
    )
    found.slides["data_source"] = [slide.source for slide in slides]
    return found


def test_out_of_fold_slides(tiny_run: Path, slides: list[Slide], store: TileStore, tmp_path: Path) -> None:
    ensemble, raw = (load_fold(run_settings(tiny_run, words), tiny_run / "fold0", CPU) for words in (WISH, PLAIN))
    predict_fold(ensemble, store, slides, [2, 3], tmp_path / "counts.parquet")
    ids, counts = read_counts(tmp_path / "counts.parquet")
    assert list(ids) == [slides[2].id, slides[3].id] and (slides[2].source, slides[3].source) == ("HPA", "Hubmap")
    for row, found in zip((2, 3), counts, strict=True):
        slide, shape = slides[row], (slides[row].height, slides[row].width)
        for each, same in ((ensemble, True), (raw, slide.source == "HPA")):
            plane = resize_plane(each.plane(store.image(row), organ=slide.organ, source=slide.source), shape)
            assert np.array_equal(threshold_counts(plane, decode_for(slide, *shape)), found) == same


def test_planes_of_a_blend(tiny_run: Path, slides: list[Slide], store: TileStore, tmp_path: Path) -> None:
    folds, two = read_folds(tiny_run / "folds.csv", slides), slides[2:4]
    read = {}
    for words in (PLAIN, WISH):
        member = Member("run", tiny_run, run_settings(tiny_run, words), store, frozenset(ORGANS))
        with tqdm(disable=True) as progress:
            planes = gather(tmp_path, [member], two, folds, 128, CPU, progress)
        read[words is WISH] = {slide.id: planes.read(slide.id)[0][0] for slide in two}
    hpa, hubmap = two
    assert np.array_equal(read[True][hpa.id], read[False][hpa.id])
    ensemble = load_fold(run_settings(tiny_run, WISH), tiny_run / f"fold{folds[hubmap.id]}", CPU)
    expected = resize_plane(
        ensemble.plane(store.image(3), organ=hubmap.organ, source="Hubmap"), read[True][hubmap.id].shape
    )
    np.testing.assert_allclose(read[True][hubmap.id] / 255, expected, atol=0.5 / 255 + 1e-5)
    assert not np.array_equal(read[True][hubmap.id], read[False][hubmap.id])


def middles(run: Path, slides: list[Slide]) -> str:
    """Thresholds in the middle of what the networks say, by which masks tell planes apart."""
    team, found = load_ensemble(run, CPU, None, PLAIN), {}
    for slide in slides:
        plane = team.probability(slide_files.read(slide.path), slide.um_per_px, organ=slide.organ)
        found.setdefault(slide.source, {})[slide.organ] = round(float(np.median(plane)), 5)
    return f"inference.source_thresholds={found}".replace("'", '"')


def test_pseudo_labels(tiny_run: Path, sample_data: Path, tmp_path: Path) -> None:
    slides = read_test(sample_data / TEST)
    threshold, masks = middles(tiny_run, slides), []
    for words in (PLAIN, WISH, PLAIN):  # in one folder, where labels of other settings lie already
        pseudo([tiny_run], sample_data / TEST, tmp_path / "out", ALL, overrides=[*words, threshold], device="cpu")
        masks.append({row["id"]: row["rle"] for row in read_table(tmp_path / "out/train.csv")})
    plain, normalised, again = masks
    assert again == plain and {slide.id for slide in slides if normalised[slide.id] != plain[slide.id]} == {
        slide.id for slide in slides if slide.source == "Hubmap"
    }
    one = next(slide for slide in slides if slide.source == "Hubmap")
    pixels, team = slide_files.read(one.path), load_ensemble(tiny_run, CPU, None, [*WISH, threshold])
    plane = team.probability(pixels, one.um_per_px, organ=one.organ, source="Hubmap")
    found = rle.decode(normalised[one.id], *pixels.shape[:2])
    assert (
        found != (plane >= np.float32(team.experiment.inference.source_thresholds["Hubmap"][one.organ]))
    ).mean() < 1e-3


def test_a_published_run_normalises_as_the_run_does(tiny_run: Path, sample_data: Path, tmp_path: Path) -> None:
    """What a kernel does: the staged files, unfolded somewhere else, and the infer job; nothing of the training is
    there.
    """
    tree = unfold(stage_weights([tiny_run], tmp_path / "weights", ["mine"]), tmp_path / "tree")
    words = [*WISH, middles(tiny_run, read_test(sample_data / "test.csv"))]
    for name, run in (("here", tiny_run), ("there", tree / "mine")):
        predict.predict(
            [run], sample_data / "test.csv", tmp_path / f"{name}.csv", overrides=words, device="cpu", on_error="degrade"
        )
    assert (tmp_path / "here.csv").read_bytes() == (tmp_path / "there.csv").read_bytes()
    predict.predict(
        [tiny_run], sample_data / "test.csv", tmp_path / "plain.csv", overrides=[*PLAIN, words[-1]], device="cpu"
    )
    assert (tmp_path / "here.csv").read_bytes() != (tmp_path / "plain.csv").read_bytes()
