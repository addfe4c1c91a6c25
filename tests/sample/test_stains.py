"""Staining obeys Beer and Lambert."""

from __future__ import annotations

import numpy as np
import pytest

from hubmap_kit.sample import slide
from hubmap_kit.sample.fields import Layers

SHAPE = (64, 96)


def density(component: str, amount: float, stain: str) -> np.ndarray:
    """Mean optical density per channel of a slide filled with one component, above that of bare glass."""
    light = []
    for filled in (0.0, amount):
        rng = np.random.default_rng(5)
        layers = Layers(rng, np.ones(SHAPE, np.float32), 1.0)
        layers.add(component, np.full(SHAPE, filled, np.float32))
        how = slide.recipe(rng, stain)
        light.append(slide.stained(layers, how, np.zeros(SHAPE, np.float32)))
    return -np.log10(light[1] / light[0]).mean(axis=(0, 1))


@pytest.mark.parametrize("stain", ["dab", "eosin", "pas"])
def test_density_grows_with_concentration(stain: str) -> None:
    assert density("fibre", 0.8, stain) == pytest.approx(2 * density("fibre", 0.4, stain), rel=1e-3)


@pytest.mark.parametrize(("component", "stain"), [("blood", "eosin"), ("mucin", "pas")])
def test_pink_stains_absorb_green(component: str, stain: str) -> None:
    red, green, blue = density(component, 1.0, stain)
    assert green > 1.3 * max(red, blue)


def test_brown_absorbs_blue_most_and_red_least() -> None:
    red, green, blue = density("marker", 1.0, "dab")
    assert blue > green > red


def test_nuclei_are_blue_in_every_stain() -> None:
    for stain in ("eosin", "pas"):
        red, green, blue = density("nuclei", 1.0, stain)
        assert blue < red < green


def test_bare_glass_stays_bright() -> None:
    rng = np.random.default_rng(0)
    layers = Layers(rng, np.zeros(SHAPE, np.float32), 1.0)
    layers.add("nuclei", np.ones(SHAPE, np.float32))
    how = slide.recipe(rng, "eosin")
    image = slide.exposed(rng, slide.stained(layers, how, np.zeros(SHAPE, np.float32)), how)
    assert image.dtype == np.uint8 and image.min() > 220


def test_two_slides_of_one_stain_differ() -> None:
    rng = np.random.default_rng(0)
    first, second = slide.recipe(rng, "eosin"), slide.recipe(rng, "eosin")
    assert first.other != second.other and first.second != second.second
