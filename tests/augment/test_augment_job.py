"""`hubmap augment`: sheets of every method with outlines on them, from embedded slides and from a folder."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from hubmap_kit import experiment
from hubmap_kit.augment import preview as previews
from hubmap_kit.competition.tables import read_train
from hubmap_kit.errors import ConfigError, HubmapError, TableError
from hubmap_kit.jobs import augment
from hubmap_kit.report.overlays import TRUTH


def cells(path: Path) -> np.ndarray:
    return cv2.imread(str(path))[..., ::-1]


@pytest.mark.parametrize("name", previews.NAMES)
def test_every_name_draws_a_sheet_with_outlines(sample_data: Path, tmp_path: Path, name: str) -> None:
    out = tmp_path / "sheet.png"
    count = augment.preview(name, out, str(sample_data), size=96)
    sheet = cells(out)
    assert (
        count >= (2 if name == "none" else 3)
        and sheet.shape[1] == min(count, 4) * 492 + 12
        and sheet.shape[0] > (count + 3) // 4 * 480
    )
    assert (sheet == TRUTH).all(axis=2).sum() > 300 * count  # an outline on each


def test_without_data_embedded_slides_are_drawn_and_a_seed_repeats(tmp_path: Path) -> None:
    for number, seed in enumerate((1, 1, 2)):
        augment.preview("stain", tmp_path / f"{number}.png", size=96, seed=seed)
    first, again, other = ((tmp_path / f"{number}.png").read_bytes() for number in range(3))
    assert first == again != other


def test_each_step_of_a_pipeline_has_its_own_pictures(sample_data: Path) -> None:
    tiles = augment._tiles_of(sample_data, "", 96)
    items = previews.preview("first-team", tiles[0], tiles[1:], [])
    titles = [title for *_, title in items]
    for step in (
        "D4",
        "Affine",
        "RandomBrightnessContrast",
        "HueSaturationValue",
        "GaussianBlur",
        "GaussNoise",
        "GridDropout",
    ):
        own = [image for image, _, title in items if title == step]
        assert len(own) == 2 and any((image != tiles[0][0]).any() for image in own)
    assert titles[0] == "unchanged" and titles[-1] == "all of first-team, draw 6"


def test_steps_without_chance_are_drawn_once(sample_data: Path) -> None:
    tiles = augment._tiles_of(sample_data, "", 96)
    titles = [title for *_, title in previews.preview("flips", tiles[0], tiles[1:], [])]
    assert titles.count("HorizontalFlip") == titles.count("VerticalFlip") == 1
    assert [title for *_, title in previews.preview("none", tiles[0], tiles[1:], [])] == [
        "unchanged",
        "all of none, draw 1",
    ]


@pytest.mark.parametrize("name", previews.BATCHED)
def test_the_batched_engine_draws_what_it_does_to_a_batch(sample_data: Path, name: str) -> None:
    tile, *others = augment._tiles_of(sample_data, "", 96)
    items = previews.preview(name, tile, others, [], seed=4, engine="batched")
    titles = [title for *_, title in items]
    assert titles[0] == "unchanged" and titles[-1].endswith({"none": "draw 1", "jitter": "draw 4"}.get(name, "draw 6"))
    for image, mask, title in items[1:]:
        assert image.shape == tile[0].shape and image.dtype == mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}
        if title.startswith("mirrors"):  # of image and mask at once
            ways = [(np.rot90(part, times), np.rot90(part[:, ::-1], times)) for times in range(4) for part in tile]
            images, masks = ([way.tobytes() for pair in half for way in pair] for half in (ways[::2], ways[1::2]))
            assert images.index(image.tobytes()) in [
                place for place, other in enumerate(masks) if other == mask.tobytes()
            ]
        elif title in ("colours", "grey") or name == "jitter":
            np.testing.assert_array_equal(mask, tile[1])
            assert (image != tile[0]).any()
    assert [image.tobytes() for image, *_ in items] == [
        image.tobytes() for image, *_ in previews.preview(name, tile, others, [], 4, "batched")
    ]


def test_partners_take_turns(sample_data: Path) -> None:
    """Each draw shows another partner; flat pictures give themselves away by their level."""
    tile = np.zeros((64, 64, 3), np.uint8), np.zeros((64, 64), np.uint8)
    others = [(np.full((64, 64, 3), level, np.uint8), tile[1]) for level in (60, 120, 240)]
    pasted = [image.max() for image, _, title in previews.preview("cutmix", tile, others, []) if title != "unchanged"]
    assert pasted == [60, 120, 240]


def test_the_named_slide_is_the_one_that_is_drawn_with_partners_of_its_organ_first(sample_data: Path) -> None:
    slides = read_train(sample_data / "train.csv")
    wanted = slides[3]
    image, mask = augment._tiles_of(sample_data, wanted.id, 96)[0]
    pixels = augment.slide_files.read(wanted.path)
    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    small = cv2.resize(pixels[top : top + side, left : left + side], (96, 96), interpolation=cv2.INTER_AREA)
    np.testing.assert_array_equal(image, small)
    assert mask.shape == (96, 96) and set(np.unique(mask)) <= {0, 1}


def test_a_table_of_one_slide_is_mixed_with_itself(sample_data: Path, tmp_path: Path) -> None:
    (tmp_path / "train_images").mkdir()
    lines = (sample_data / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join(lines[:2]) + "\n")
    slide = read_train(sample_data / "train.csv")[0]
    (tmp_path / "train_images" / slide.path.name).symlink_to(slide.path)
    assert augment.preview("mixing", tmp_path / "sheet.png", str(tmp_path), size=96) == 13


def test_what_cannot_be_drawn_is_one_sentence(sample_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "sheet.png"
    with pytest.raises(ConfigError, match="no augmentation 'cutmx'.*did you mean 'cutmix'"):
        augment.preview("cutmx", out)
    with pytest.raises(TableError, match="has no slide nobody.*--slide"):
        augment.preview("flips", out, str(sample_data), "nobody")
    with pytest.raises(HubmapError, match="--slide 12 needs the folder"):
        augment.preview("flips", out, slide="12")
    with pytest.raises(HubmapError, match="--size is 10"):
        augment.preview("flips", out, size=10)
    with pytest.raises(ConfigError, match="no engine 'batch'.*did you mean 'batched'"):
        augment.preview("flips", out, engine="batch")
    with pytest.raises(ConfigError, match="'cutmix' is the same with either engine"):
        augment.preview("cutmix", out, engine="batched")
    with pytest.raises(HubmapError, match="is a folder.*name a PNG file"):
        augment.preview("flips", tmp_path)
    with pytest.raises(TableError, match="train.csv"):
        augment.preview("flips", out, str(tmp_path))
    assert not out.exists()


def test_mosaics_are_made_from_the_slides_of_an_experiment(sample_data: Path, tmp_path: Path) -> None:
    settings = experiment.load("baseline", ["tiles.size=64", "scale.reduce=2"], str(sample_data))
    table = augment.mosaics(settings, tmp_path / "mosaics", 3, 96, seed=1, same_organ=True)
    assert len(table.read_text().splitlines()) == 4
    assert (
        len(list((tmp_path / "mosaics" / "images").glob("*.png")))
        == len(list((tmp_path / "mosaics" / "masks").glob("*.png")))
        == 3
    )
    with pytest.raises(HubmapError, match="mosaics.csv is a file.*choose another with --out"):
        augment.mosaics(settings, table, 1, 96)
    with pytest.raises(HubmapError, match="name the folder of their train.csv with --data"):
        augment.mosaics(experiment.load("baseline", []), tmp_path / "no", 1, 96)
