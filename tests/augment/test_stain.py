"""Stain methods: they reach what they promise on real slides, leave glass and shapes alone, and touch nothing without
tissue.

Statistics are computed here from textbook formulas on every pixel, not by the library.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from hubmap_kit.augment import stain
from hubmap_kit.augment.stain import (
    Reference,
    StainChange,
    jitter,
    macenko,
    match_histograms,
    read_references,
    reinhard,
    stain_matrix,
)
from hubmap_kit.competition import slides
from hubmap_kit.errors import ConfigError, SlideError
from hubmap_kit.sample.slide import SlideSpec, draw

Method = Callable[..., np.ndarray]
METHODS = (reinhard, macenko, match_histograms)
SLIDES = (
    "hubmap-mini/train_images/7359",
    "hubmap-mini/train_images/20955",
    "hubmap-mini/train_images/8876",
    "glas/train_images/30",
)


def od(image: np.ndarray) -> np.ndarray:
    return -np.log10(np.maximum(image.astype(np.float64), 1) / 255)


def tissue_of(image: np.ndarray) -> np.ndarray:
    return np.linalg.norm(od(image), axis=2) >= 0.15


def lab(image: np.ndarray) -> np.ndarray:
    """CIE Lab (D65) of sRGB pixels (N, 3), after IEC 61966-2-1 and CIE 15."""
    value = image.astype(np.float64) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    matrix = np.array(
        [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]
    )
    scaled = linear @ matrix.T / np.array([0.95047, 1.0, 1.08883])
    cube = np.where(scaled > (6 / 29) ** 3, np.cbrt(scaled), scaled / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.stack([116 * cube[:, 1] - 16, 500 * (cube[:, 0] - cube[:, 1]), 200 * (cube[:, 1] - cube[:, 2])], axis=1)


def svd_vectors(image: np.ndarray) -> np.ndarray:
    """Macenko's vectors by a full singular value decomposition and percentiles of angles in degrees, all tissue
    pixels.
    """
    densities = od(image)[tissue_of(image) & (image.max(axis=2) >= 16)]
    _, _, rows = np.linalg.svd(densities, full_matrices=False)
    plane = rows[:2] * np.where(rows[:2].sum(axis=1, keepdims=True) < 0, -1, 1)
    phi = np.degrees(np.arctan2(densities @ plane[1], densities @ plane[0]))
    found = []
    for angle in np.radians(np.percentile(phi, [1, 99])):
        vector = np.clip(np.cos(angle) * plane[0] + np.sin(angle) * plane[1], 0, None)
        found.append(vector / np.linalg.norm(vector))
    return np.array(sorted(found, key=lambda vector: -vector[0]))


def degrees(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.degrees(np.arccos(np.clip((first * second).sum(axis=1), -1, 1)))


@pytest.fixture(scope="module")
def embedded() -> np.ndarray:
    """A synthetic slide, so that most of this runs without real tissue."""
    return draw(SlideSpec("kidney", "HPA", 256, 256, 1.0), np.random.default_rng(4))[0]


@pytest.fixture(scope="module")
def eosin() -> np.ndarray:
    return draw(SlideSpec("spleen", "Hubmap", 256, 256, 1.0), np.random.default_rng(4))[0]


@pytest.fixture(scope="module")
def references(shared_data: Path) -> list[Reference]:
    return read_references(shared_data / "stain-references")


def real(shared_data: Path, name: str) -> np.ndarray:
    return np.ascontiguousarray(slides.read(shared_data / f"{name}.tiff")[:512, :512])


def test_every_real_reference_is_read(references: list[Reference], shared_data: Path) -> None:
    assert len(references) == 10
    assert {Path(item.name).name for item in references} == {
        path.name for path in (shared_data / "stain-references").glob("*.[tj]*")
    }


@pytest.mark.parametrize("name", SLIDES)
def test_stain_vectors_are_those_of_a_full_svd(shared_data: Path, name: str) -> None:
    image = real(shared_data, name)
    found = stain_matrix(image)
    assert found is not None and found.shape == (2, 3)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1)
    assert degrees(found, svd_vectors(image)).max() < 1.0  # the library takes a sample of the pixels


def test_known_stains_are_found_again() -> None:
    random = np.random.default_rng(1)
    vectors = np.array([[0.65, 0.70, 0.29], [0.27, 0.57, 0.78]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    amounts = np.where(random.random((128, 128, 1)) < 0.5, [1.0, 0.0], [0.0, 1.0]) * random.uniform(
        0.4, 0.9, (128, 128, 1)
    )
    image = np.rint(255 * 10 ** -(amounts @ vectors)).astype(np.uint8)
    assert degrees(stain_matrix(image), vectors).max() < 1.5


@pytest.mark.parametrize("name", SLIDES)
def test_reinhard_brings_lab_statistics_to_those_of_the_reference(
    shared_data: Path, references: list[Reference], name: str
) -> None:
    image = real(shared_data, name)
    target = next(item for item in references if item.name.endswith("target_HE.jpg"))
    picture = slides.read(target.name)
    wanted, found = lab(picture[tissue_of(picture)]), lab(reinhard(image, target)[tissue_of(image)])
    np.testing.assert_allclose(found.mean(axis=0), wanted.mean(axis=0), atol=0.6)
    # A stretch of more than 4 is cut, and so are colours outside of sRGB.
    np.testing.assert_allclose(found.std(axis=0), wanted.std(axis=0), rtol=0.04)
    before = np.abs(lab(image[tissue_of(image)]).mean(axis=0) - wanted.mean(axis=0)).max()
    assert before > 8


@pytest.mark.parametrize("name", SLIDES)
def test_macenko_brings_stain_vectors_and_strengths_to_those_of_the_reference(
    shared_data: Path, references: list[Reference], name: str
) -> None:
    image = real(shared_data, name)
    target = next(item for item in references if item.name.endswith("2f7fe5d89a6f.tif"))
    wanted = svd_vectors(slides.read(target.name))
    out = macenko(image, target)
    assert degrees(svd_vectors(out), wanted).max() < 4.0 < degrees(svd_vectors(image), wanted).max()
    strengths = np.percentile(od(out)[tissue_of(image)] @ np.linalg.pinv(wanted), 99, axis=0)
    np.testing.assert_allclose(strengths, target.strengths, rtol=0.1)


@pytest.mark.parametrize("name", SLIDES)
def test_histograms_become_those_of_the_reference(shared_data: Path, references: list[Reference], name: str) -> None:
    image = real(shared_data, name)
    for target in (references[0], references[8]):
        picture = slides.read(target.name)
        out, wanted = match_histograms(image, target)[tissue_of(image)], picture[tissue_of(picture)]
        for channel in range(3):
            shares = [
                np.searchsorted(np.sort(levels[:, channel]), np.arange(256), side="right") / len(levels)
                for levels in (out, wanted)
            ]
            # Kolmogorov's distance; levels that share one value in the slide cannot be told apart again.
            assert np.abs(shares[0] - shares[1]).max() < 0.06
            before = (
                np.searchsorted(np.sort(image[tissue_of(image)][:, channel]), np.arange(256), side="right")
                / tissue_of(image).sum()
            )
            assert np.abs(shares[0] - shares[1]).max() < 0.3 * np.abs(before - shares[1]).max()


@pytest.mark.parametrize("method", [*METHODS, jitter])
def test_glass_and_the_input_stay_as_they_are(embedded: np.ndarray, eosin: np.ndarray, method: Method) -> None:
    image = embedded.copy()
    image[:40] = 250
    image[-8:] = 0
    kept = image.copy()
    out = method(image, np.random.default_rng(0) if method is jitter else eosin)
    np.testing.assert_array_equal(image, kept)
    same = (image.min(axis=2) >= 246) | (image.max(axis=2) < 16)
    assert same.any() and (out[same] == image[same]).all()
    assert (out[tissue_of(image) & ~same] != image[tissue_of(image) & ~same]).any(axis=1).mean() > 0.9
    assert out.shape == image.shape and out.dtype == np.uint8 and out.flags.c_contiguous


def poor_tiles() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    white, few = np.full((96, 96, 3), 255, np.uint8), np.full((96, 96, 3), 244, np.uint8)
    few[:4, :90] = random.integers(60, 200, (4, 90, 3))  # 3.9 % of the pixels
    return {
        "white": white,
        "black": np.zeros_like(white),
        "glass": random.integers(243, 256, (96, 96, 3)).astype(np.uint8),
        "few": few,
        "tiny": random.integers(60, 200, (8, 8, 3)).astype(np.uint8),
    }


@pytest.mark.parametrize("kind", poor_tiles())
@pytest.mark.parametrize("method", [*METHODS, jitter])
def test_tiles_with_too_little_tissue_are_returned_unchanged(eosin: np.ndarray, method: Method, kind: str) -> None:
    image = poor_tiles()[kind]
    assert method(image, np.random.default_rng(0) if method is jitter else eosin) is image
    assert stain_matrix(image) is None


def test_one_stain_alone_has_no_two_vectors(eosin: np.ndarray) -> None:
    ramp = np.repeat(np.linspace(60, 200, 64 * 64).reshape(64, 64, 1), 3, axis=2).astype(np.uint8)
    assert stain_matrix(ramp) is None
    assert macenko(ramp, eosin) is ramp
    for method in (reinhard, match_histograms):
        assert np.isfinite(method(ramp, eosin)).all()


def test_a_picture_becomes_itself(embedded: np.ndarray) -> None:
    for method in (reinhard, match_histograms):
        assert np.abs(method(embedded, embedded).astype(int) - embedded).max() <= 2
    # Two stains cannot hold all that three channels do; what is left out is little.
    assert np.abs(macenko(embedded, embedded).astype(int) - embedded)[tissue_of(embedded)].mean() < 6


def test_jitter_scales_each_stain_along_its_own_vector() -> None:
    vectors = np.array([[0.650, 0.704, 0.286], [0.268, 0.570, 0.776]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    image = np.empty((64, 64, 3), np.uint8)
    image[:, :32], image[:, 32:] = (np.rint(255 * 10 ** (-0.6 * vector)).astype(np.uint8) for vector in vectors)
    factors = []
    for seed in range(60):
        out = od(jitter(image, np.random.default_rng(seed), strength=0.3, offset=0.0))
        for place in (0, 63):
            ratio = out[0, place] / od(image)[0, place]
            np.testing.assert_allclose(ratio, ratio[0], rtol=0.05)  # along the vector: colours keep their tone
            factors.append(ratio.mean())
    pairs = np.array(factors).reshape(-1, 2)
    assert 0.69 < pairs.min() < 0.8 and 1.2 < pairs.max() < 1.31
    assert abs(np.corrcoef(pairs.T)[0, 1]) < 0.4  # each stain for itself


def test_jitter_without_strength_changes_nothing(embedded: np.ndarray) -> None:
    out = jitter(embedded, np.random.default_rng(0), strength=0.0, offset=0.0)
    assert np.abs(out.astype(int) - embedded).max() <= 1


def test_one_seed_one_result(embedded: np.ndarray) -> None:
    change = StainChange("jitter", 0.7)
    results = [[change(embedded, np.random.default_rng(seed)).tobytes() for seed in range(12)] for _ in range(2)]
    assert results[0] == results[1]
    untouched = sum(result == embedded.tobytes() for result in results[0])
    assert 0 < untouched < 12 and len(set(results[0])) == 13 - untouched


def test_reference_methods_of_an_experiment(tmp_path: Path, embedded: np.ndarray, eosin: np.ndarray) -> None:
    cv2.imwrite(str(tmp_path / "eosin.PNG"), eosin[..., ::-1])
    (tmp_path / "readme.txt").write_text("no picture")
    references = read_references(tmp_path)
    for name, method in stain.TRANSFERS.items():
        change = StainChange(name, 1.0, references)
        np.testing.assert_array_equal(change(embedded, np.random.default_rng(0)), method(embedded, Reference.of(eosin)))
        assert StainChange(name, 0.0, references)(embedded, np.random.default_rng(0)) is embedded
    random = np.random.default_rng(0)
    assert StainChange("none", 1.0)(embedded, random) is embedded
    assert random.random() == np.random.default_rng(0).random()  # and nothing was drawn


def test_what_cannot_be_a_method_or_a_reference_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="augment.stain is 'macenk'.*did you mean 'macenko'"):
        StainChange("macenk", 1.0)
    with pytest.raises(ConfigError, match="reinhard needs reference pictures"):
        StainChange("reinhard", 1.0)
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ConfigError, match="no tif, jpg or png was found"):
            read_references(folder)
    cv2.imwrite(str(tmp_path / "white.png"), np.full((64, 64, 3), 255, np.uint8))
    with pytest.raises(ConfigError, match="white.png shows too little tissue"):
        read_references(tmp_path)
    (tmp_path / "white.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(SlideError, match="white.png"):
        read_references(tmp_path)
