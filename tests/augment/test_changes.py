"""Zoom, stains and detail of a tile by organ: shares, ranges, and that nothing is drawn where nothing is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from hubmap_kit.augment.batched import from_settings
from hubmap_kit.augment.changes import Changes, drawn, embedded_references, jitter_on_device
from hubmap_kit.augment.stain import stain_matrix
from hubmap_kit.config import AugmentConfig
from hubmap_kit.errors import ConfigError

GREY = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def tissue() -> np.ndarray:
    return drawn("kidney", "HPA", 160, (3, 1))[0]


def test_without_changes_nothing_is_drawn(tissue: np.ndarray) -> None:
    changes, random = Changes(AugmentConfig()), np.random.default_rng(0)
    assert not changes
    assert changes.side("lung", 64, random) == 64
    assert changes(tissue, "lung", 0.4, random) is tissue
    assert random.random() == np.random.default_rng(0).random()


def test_zoom_is_even_in_the_logarithm_and_the_organs_own() -> None:
    changes, random = (
        Changes(
            AugmentConfig(zoom=(0.5, 2.0), organs={"prostate": {"zoom": (0.1, 0.2)}, "lung": {"zoom": (1.0, 1.0)}})
        ),
        np.random.default_rng(0),
    )
    sides = np.array([changes.side("spleen", 256, random) for _ in range(2000)])
    assert 128 <= sides.min() < 135 and 490 < sides.max() <= 512
    assert abs(np.mean(sides > 256) - 0.5) < 0.04  # as often smaller as larger, which an even draw of the factor is not
    assert abs(np.mean(sides > 256 * 2**0.5) - 0.25) < 0.04
    prostate = [changes.side("prostate", 256, random) for _ in range(200)]
    assert min(prostate) >= 1280 and max(prostate) <= 2560
    assert {changes.side("lung", 256, random) for _ in range(20)} == {256}


def test_stains_by_organ(tissue: np.ndarray) -> None:
    changes = Changes(AugmentConfig(stain="jitter", stain_probability=1.0, organs={"kidney": {"stain": "none"}}))
    random = np.random.default_rng(1)
    assert changes(tissue, "kidney", 0.4, random) is tissue
    assert not np.array_equal(changes(tissue, "lung", 0.4, random), tissue)


def test_mixed_stains_take_drawn_references_where_no_folder_is_named(tissue: np.ndarray) -> None:
    changes, random = Changes(AugmentConfig(stain="mixed", stain_probability=1.0)), np.random.default_rng(2)
    made = [changes(tissue, "lung", 0.4, random) for _ in range(40)]
    assert len({image.tobytes() for image in made}) > 12  # 4 x 2 references by three methods, and jitter
    eosin = [reference for reference in embedded_references(480, 0, 4) if "eosin" in reference.name]
    assert len(eosin) == 4 and len({reference.strengths.tobytes() for reference in eosin}) == 4
    # Some now have the pink that a slide of brown and blue cannot have by jitter: more green than blue absorbed by the
    # second stain.
    second = [found[1] for found in map(stain_matrix, made) if found is not None]
    own = stain_matrix(tissue)
    assert own is not None and own[1, 2] > own[1, 1]  # DAB takes most of the blue
    assert sum(vector[1] > vector[2] for vector in second) > 8


def test_a_folder_without_references_is_one_sentence(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ConfigError, match="no tif, jpg or png was found"):
        Changes(AugmentConfig(stain="mixed", stain_references=str(tmp_path)))


def test_stains_are_shaken_once_by_either_engine(tissue: np.ndarray) -> None:
    alike = AugmentConfig(engine="batched", stain="jitter", stain_probability=1.0)
    assert jitter_on_device(alike) == 1.0
    assert Changes(alike)(tissue, "lung", 0.4, np.random.default_rng(0)) is tissue  # the network's device does it
    by_organ = AugmentConfig(
        engine="batched", stain="jitter", stain_probability=1.0, organs={"lung": {"stain_probability": 0.5}}
    )
    assert jitter_on_device(by_organ) == 0.0
    assert not np.array_equal(Changes(by_organ)(tissue, "spleen", 0.4, np.random.default_rng(0)), tissue)
    for config, share in ((alike, 1.0), (by_organ, 0.0)):
        batched = from_settings(config, GREY, GREY, 0)
        assert batched is not None and batched.stain_share == share
