"""Shifts of a slide: the mask follows the pixels, sizes are HuBMAP's, an id and a name say everything, and plain is
plain.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hubmap_kit.augment.shift import HUBMAP, PLAIN, SHIFTS, STEPS, Looks, names_of, preview_shift, shifted
from hubmap_kit.augment.stain import Reference, amount, density, light, stain_matrix
from hubmap_kit.competition.organs import FACTS, ORGANS
from hubmap_kit.errors import ConfigError
from hubmap_kit.jobs.augment import embedded_references
from hubmap_kit.sample.slide import SlideSpec, draw
from hubmap_kit.tiles.scaling import resize_image, resize_mask

Pixels = tuple[np.ndarray, np.ndarray]
UM = 1.0


@pytest.fixture(scope="module")
def looks() -> Looks:
    return Looks.of(embedded_references(160, 0))


@pytest.fixture(scope="module")
def tissue() -> Pixels:
    return draw(SlideSpec("kidney", "HPA", 150, 130, UM), np.random.default_rng(4))


def keep(pixels: Pixels) -> Pixels:
    return pixels[0].copy(), pixels[1].copy()


def test_plain_is_the_slide_itself(tissue: Pixels, looks: Looks) -> None:
    made = shifted(PLAIN, *tissue, "lung", 0.37, "7", looks)
    assert np.array_equal(made.image, tissue[0])
    assert np.array_equal(made.mask, tissue[1])
    assert made.um_per_px == 0.37


@pytest.mark.parametrize("name", SHIFTS)
def test_an_id_and_a_name_say_everything_and_the_input_stays(tissue: Pixels, looks: Looks, name: str) -> None:
    before = keep(tissue)
    first, again = (shifted(name, *tissue, "kidney", UM, "62", looks) for _ in range(2))
    assert np.array_equal(first.image, again.image)
    assert np.array_equal(tissue[0], before[0]) and np.array_equal(tissue[1], before[1])
    if name in (PLAIN, "scale"):
        return  # these have nothing to draw
    others = [shifted(name, *tissue, "kidney", UM, str(number), looks).image for number in range(8)]
    assert any(not np.array_equal(first.image, other) for other in others)
    assert not np.array_equal(first.image.mean(), tissue[0].mean())


@pytest.mark.parametrize("name", [name for name in STEPS if name != "scale"])
def test_what_changes_colours_or_sharpness_leaves_mask_and_size(tissue: Pixels, looks: Looks, name: str) -> None:
    made = shifted(name, *tissue, "spleen", UM, "9", looks)
    assert made.image.shape == tissue[0].shape and made.image.dtype == np.uint8
    assert np.array_equal(made.mask, tissue[1]) and made.um_per_px == UM


@settings(deadline=None, max_examples=60)
@given(
    organ=st.sampled_from(ORGANS),
    height=st.integers(40, 260),
    width=st.integers(40, 260),
    um=st.floats(0.2, 6.5),
    name=st.sampled_from(["scale", HUBMAP]),
)
def test_slides_take_the_size_that_hubmap_would_have_given_them(
    organ: str, height: int, width: int, um: float, name: str
) -> None:
    target = FACTS[organ].um_per_px["Hubmap"]
    if max(height, width) * um / target > 1500:
        return  # the same at a larger size, slowly
    random = np.random.default_rng(height * width)
    mask = (random.random((height, width)) < 0.3).astype(np.uint8)
    made = shifted(name, random.integers(0, 256, (height, width, 3), np.uint8), mask, organ, um, "1", SOME)
    assert made.um_per_px == target
    assert made.image.shape[:2] == made.mask.shape
    for new, old in zip(made.mask.shape, mask.shape, strict=True):
        assert abs(new - old * um / target) <= 0.5 or new == 1  # the field stays, within half a pixel
    assert set(np.unique(made.mask)) <= {0, 1} and made.mask.dtype == np.uint8
    assert made.mask.any() == mask.any()


SOME = Looks.of(embedded_references(96, 1))


@settings(deadline=None, max_examples=30)
@given(organ=st.sampled_from(ORGANS), side=st.integers(20, 200), um=st.floats(0.2, 2.0), seed=st.integers(0, 99))
def test_slides_are_resized_as_the_network_resizes_them(organ: str, side: int, um: float, seed: int) -> None:
    random = np.random.default_rng(seed)
    image, mask = (
        random.integers(0, 256, (side, side + 7, 3), np.uint8),
        (random.random((side, side + 7)) < 0.6).astype(np.uint8),
    )
    made = shifted("scale", image, mask, organ, um, "1", SOME)
    assert np.array_equal(made.image, resize_image(image, made.mask.shape))
    wanted = resize_mask(mask, made.mask.shape)
    assert np.array_equal(made.mask, wanted) or not wanted.any()


def test_a_prostate_of_the_contest_has_192_pixels() -> None:
    mask = np.zeros((3000, 3000), np.uint8)
    mask[1200:1800, 900:1500] = 1
    made = shifted("scale", mask[..., None].repeat(3, 2) * 255, mask, "prostate", 0.4, "1", SOME)
    assert made.mask.shape == (192, 192)
    assert abs(made.mask.mean() - mask.mean()) < 2e-3


@settings(deadline=None, max_examples=50)
@given(
    organ=st.sampled_from(ORGANS),
    um=st.floats(0.3, 4.0),
    name=st.sampled_from(SHIFTS),
    top=st.integers(5, 120),
    left=st.integers(5, 150),
    size=st.integers(24, 60),
    seed=st.integers(0, 99),
)
def test_a_marker_stays_under_its_mask(
    organ: str, um: float, name: str, top: int, left: int, size: int, seed: int
) -> None:
    """A dark unit on pale tissue: wherever the shift puts it and whatever colours it takes, dark is where the mask
    is.
    """
    grow = um / FACTS[organ].um_per_px["Hubmap"]
    if name in ("scale", HUBMAP) and (grow > 5 or size * grow < 8):
        return  # slow, or too small to have an inside
    image, mask = np.full((190, 220, 3), (215, 190, 205), np.uint8), np.zeros((190, 220), np.uint8)
    image[top : top + size, left : left + size], mask[top : top + size, left : left + size] = (90, 60, 110), 1
    image = np.clip(image.astype(int) + np.random.default_rng(seed).integers(-6, 7, image.shape), 0, 255).astype(
        np.uint8
    )
    made = shifted(name, image, mask, organ, um, str(seed), SOME)
    dense = cv2.GaussianBlur(amount(made.image), (3, 3), 0)
    inside, outside = cv2.erode(made.mask, np.ones((3, 3))), 1 - cv2.dilate(made.mask, np.ones((13, 13)))
    assert inside.any() and outside.any()
    middle = (np.median(dense[inside > 0]) + np.median(dense[outside > 0])) / 2
    assert np.median(dense[inside > 0]) > np.median(dense[outside > 0])
    agreed = (
        2
        * np.count_nonzero((dense > middle) & (made.mask > 0))
        / (np.count_nonzero(dense > middle) + np.count_nonzero(made.mask))
    )
    assert agreed > 0.75


def test_stains_come_from_the_reference_that_is_named_for_them(tissue: Pixels) -> None:
    """Blood red and grass green as references: whose colour the tissue takes is seen at once."""
    red = Reference.of(recoloured(tissue[0], (0.3, 1.5, 1.2)), "red he.png")
    green = Reference.of(recoloured(tissue[0], (1.5, 0.3, 1.2)), "green pas.png")
    looks = Looks.of([green, red])
    assert (looks.he, looks.pas) == ((red,), (green,))
    for number in range(12):
        he, pas = (
            shifted(name, *tissue, "kidney", UM, str(number), looks).image.astype(float) for name in ("he", "pas")
        )
        stained = amount(tissue[0]) > 0.15
        assert (he - pas)[stained][:, 0].mean() > 10
        assert (he - pas)[stained][:, 1].mean() < -10


def recoloured(image: np.ndarray, gains: tuple[float, float, float]) -> np.ndarray:
    return light(density(image) * np.array(gains, np.float32))


def test_thick_organs_are_blurred_and_darkened_more(tissue: Pixels, looks: Looks) -> None:
    def over_ids(name: str, organ: str, measure: str) -> float:
        images = [shifted(name, *tissue, organ, 0.4, str(number), looks).image for number in range(24)]
        if measure == "density":
            return float(np.mean([amount(image).mean() for image in images]))
        return float(
            np.mean([cv2.Laplacian(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.CV_64F).var() for image in images])
        )

    assert over_ids("contrast", "kidney", "density") > 1.1 * over_ids("contrast", "spleen", "density")
    assert over_ids("blur", "kidney", "sharp") < 0.8 * over_ids("blur", "spleen", "sharp")


def test_glass_stays_glass(looks: Looks) -> None:
    image = np.full((80, 80, 3), 252, np.uint8)
    for name in SHIFTS:
        made = shifted(name, image, np.zeros((80, 80), np.uint8), "kidney", UM, "3", looks)
        assert np.abs(made.image.astype(int) - 252).max() <= 2
        assert not made.mask.any()


def test_names_of_pictures_tell_their_stain_and_a_missing_one_is_said() -> None:
    one = embedded_references(96, 0)[0]

    def named(*names: str) -> Looks:
        return Looks.of([Reference(name, one.vectors, one.strengths, one.mean, one.std, one.shares) for name in names])

    found = named("pas/kidney_PAS_1.tif", "pas/target_HE.jpg", "the other.png")
    assert [reference.name for reference in found.pas] == ["pas/kidney_PAS_1.tif", "the other.png"]
    assert [reference.name for reference in found.he] == ["pas/target_HE.jpg", "the other.png"]
    only = named("kidney_pas.tif")
    only.check([PLAIN, "pas", "scale"])
    for shift in ("he", HUBMAP):
        with pytest.raises(ConfigError, match="the shift he needs"):
            only.check([shift])


def test_names_of_shifts() -> None:
    assert names_of() == list(SHIFTS)
    assert names_of(" hubmap, scale") == ["scale", HUBMAP]
    with pytest.raises(ConfigError, match="did you mean 'scale'"):
        names_of("scael")


def test_a_preview_shows_every_shift_with_its_size(tissue: Pixels, looks: Looks) -> None:
    items = preview_shift(*tissue, "prostate", UM, "5", looks)
    assert [title.partition(":")[0] for *_, title in items] == list(SHIFTS)
    assert all(image.shape[:2] == mask.shape for image, mask, _ in items)
    assert "24 x 21 px at 6.263 um" in items[-1][2]


def test_real_references_give_real_stains(shared_data: Path) -> None:
    from hubmap_kit.augment.stain import read_references
    from hubmap_kit.competition import slides

    looks = Looks.of(read_references(shared_data / "stain-references"))
    assert len(looks.pas) == 9 and len(looks.he) == 1
    image = slides.read(shared_data / "hubmap-mini" / "train_images" / "6611.tiff")
    mask = np.zeros(image.shape[:2], np.uint8)
    made = shifted("he", image, mask, "largeintestine", 0.4, "6611", looks).image
    before, after = (stain_matrix(picture) for picture in (image, made))
    assert before is not None and after is not None
    # Eosin lets blue through and DAB does not; the second stain of the result is the pink one.
    assert after[1][2] < before[1][2] - 0.1
    assert after[1][1] > 0.8
