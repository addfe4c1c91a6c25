"""Stains: bring a tile to the colours of a reference slide, or shake its stains, without touching its shapes.

Everything works on the tissue alone: glass stays as it is, and a tile with too little tissue is returned unchanged,
because a few pixels say nothing about a staining. All pictures are (H, W, 3) uint8 RGB; results are new arrays or the
unchanged input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from hubmap_kit.competition import slides
from hubmap_kit.errors import ConfigError, did_you_mean

# Optical density: what a stain takes from the light, in decades, and the two stains that a picture is made of.

HAEMATOXYLIN = (0.650, 0.704, 0.286)
EOSIN = (0.072, 0.990, 0.105)
DAB = (0.268, 0.570, 0.776)
STAINED = 0.15  # density (length of the three channels') from which a pixel is tissue: Macenko's beta
GLASS = 0.05  # density up to which a pixel is bare glass: 245 of 255 in every channel
BLACK = 16  # of 255
LEAST_SHARE = 0.05  # of a picture's pixels must be tissue before anything is said about its stains
LEAST_PIXELS = 100
# Pixels, about, that stain vectors are taken from. Over 56 real pictures, those from all pixels lie 0.05 degrees off,
# at worst 2.
SAMPLE = 1 << 16
APART = np.sin(np.radians(4.0))  # vectors nearer than this are one stain twice, and cannot be told apart again
# An absent pixel value of 0 counts as 1: the density of no light at all is infinite.
_TABLE = -np.log10(np.maximum(np.arange(256), 1) / 255.0).astype(np.float32)
_SQUARES, _SUM = _TABLE**2, np.ones((1, 3), np.float32)


def density(image: np.ndarray) -> np.ndarray:
    """Optical density (H, W, 3) float32, 0 (white) to 2.41 (black), of an image (H, W, 3) uint8 RGB."""
    return cv2.LUT(image, _TABLE)


def light(densities: np.ndarray) -> np.ndarray:
    """The image (H, W, 3) uint8 that has these densities; those below 0 become white."""
    levels = cv2.exp(np.maximum(densities, 0) * np.float32(-np.log(10.0)))
    return cv2.convertScaleAbs(levels, alpha=255.0)


def amount(image: np.ndarray) -> np.ndarray:
    """Length (H, W) float32 of the three densities of each pixel: how much stain there is, of whatever colour."""
    return np.sqrt(cv2.transform(cv2.LUT(image, _SQUARES), _SUM))


def tissue(image: np.ndarray) -> np.ndarray | None:
    """Where an image (H, W, 3) shows stained tissue, (H, W) bool; None when that is too little (5 % of it, or 100
    pixels) to go by.
    """
    stained = (amount(image) >= STAINED) & ~is_black(image)
    found = int(np.count_nonzero(stained))
    return stained if found >= max(LEAST_PIXELS, LEAST_SHARE * stained.size) else None


def tissue_densities(image: np.ndarray) -> np.ndarray | None:
    """Densities (N, 3) float64 of the tissue pixels among an even sample of the image; None when there is too little
    tissue.
    """
    # An odd stride over rows laid end to end meets every place in the 8 x 8 blocks of a JPEG; a grid of every second
    # row and column would meet a quarter of them, whose colours are not those of the rest.
    stride = image.shape[0] * image.shape[1] // SAMPLE | 1
    sample = np.ascontiguousarray(image.reshape(-1, 1, 3)[::stride])
    stained = tissue(sample)
    return None if stained is None else density(sample)[stained].astype(np.float64)


def stain_matrix(image: np.ndarray) -> np.ndarray | None:
    """The two stain vectors of an image (H, W, 3) uint8 RGB: (2, 3) float64 of length 1, haematoxylin (more red
    density) first.

    None when there is too little tissue, or only one stain. After Macenko et al., A method for normalizing histology
    slides for quantitative analysis, ISBI 2009: the plane of the two largest singular vectors of the tissue's
    densities, in it the angles at the 1st and 99th percentile; here a pixel counts as tissue by the length of its
    densities, because eosin hardly darkens red.
    """
    densities = tissue_densities(image)
    return None if densities is None else matrix_of(densities)


def matrix_of(densities: np.ndarray) -> np.ndarray | None:
    """The two stain vectors (2, 3) of tissue densities (N, 3), as in `stain_matrix`; None when there is only one
    stain.
    """
    # The eigenvectors of the 3 x 3 matrix of second moments are the right singular vectors, without decomposing N rows.
    plane = np.linalg.eigh(densities.T @ densities)[1][:, [2, 1]]
    plane *= np.where(plane.sum(axis=0) < 0, -1.0, 1.0)
    across = densities @ plane
    angles = np.percentile(np.arctan2(across[:, 1], across[:, 0]), (1, 99))
    vectors = np.maximum(np.stack([np.cos(angles), np.sin(angles)], axis=1) @ plane.T, 0.0)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    if np.linalg.norm(np.cross(*vectors)) < APART:
        return None
    return vectors if vectors[0, 0] >= vectors[1, 0] else vectors[::-1].copy()


def keep_glass(image: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """`changed` where there is tissue, `image` where there is glass or black, and a blend of the two in between.

    Colour transfer knows nothing of glass: left alone it tints it, as no slide is tinted.
    """
    share = np.clip((amount(image) - GLASS) * np.float32(1 / (STAINED - GLASS)), 0, 1)
    share[is_black(image)] = 0
    return cv2.blendLinear(changed, image, share, 1 - share)


def is_black(image: np.ndarray) -> np.ndarray:
    """Where every channel is nearly black, (H, W) bool: ink, a hole of a dropout or a frame, and no stain."""
    red, green, blue = cv2.split(image)
    return cv2.max(cv2.max(red, green), blue) < BLACK


__all__ = [
    "METHODS",
    "Reference",
    "StainChange",
    "jitter",
    "macenko",
    "match_histograms",
    "read_references",
    "reinhard",
    "stain_matrix",
]
SUFFIXES = (".tif", ".tiff", ".jpg", ".jpeg", ".png")
FULL = 99  # percentile of a stain's concentrations that counts as its full strength (Macenko et al. 2009)
STRETCH = (
    4.0  # Reinhard's factor at most: in a tile that is nearly grey, more would turn the noise of a JPEG into a rainbow
)


@dataclass(frozen=True)
class Reference:
    """What is kept of a reference picture.

    `vectors` (2, 3) and `strengths` (2,) are its stains and their full concentrations, `mean` and `std` (3,) the CIE
    Lab statistics of its tissue, `shares` (3, 256) the share of its tissue up to each grey level in red, green and
    blue.
    """

    name: str
    vectors: np.ndarray
    strengths: np.ndarray
    mean: np.ndarray
    std: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, picture: np.ndarray, name: str = "the reference") -> Reference:
        """Measure a picture. Raises ConfigError when it shows too little tissue, or one stain only."""
        stained, densities = tissue(picture), tissue_densities(picture)
        vectors = None if densities is None else matrix_of(densities)
        if stained is None or densities is None or vectors is None:
            raise ConfigError(
                f"{name} shows too little tissue, or one stain only, to be a stain reference; choose a picture full of"
                " tissue"
            )
        mean, std = _lab_statistics(_lab(picture), stained)
        return cls(name, vectors, _strengths(densities, vectors), mean, std, _shares(picture, stained))

    @property
    def packed(self) -> bytes:
        """All its numbers, rounded to nine digits, to be hashed."""
        return b"".join(
            np.round(values, 9).tobytes() for values in (self.vectors, self.strengths, self.mean, self.std, self.shares)
        )


def read_references(folder: str | Path) -> list[Reference]:
    """Measure the reference pictures (tif, jpg, png) of a folder.

    Raises ConfigError for a folder without pictures or with one that cannot be a reference, SlideError for a damaged
    one.
    """
    folder = Path(folder)
    paths = sorted(
        path for path in folder.glob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")
    )
    if not paths:
        raise ConfigError(
            f"the folder of stain references is '{folder}', where no tif, jpg or png was found; name a folder of"
            " reference pictures"
        )
    return [Reference.of(slides.read(path), str(path)) for path in paths]


def reinhard(image: np.ndarray, reference: Reference | np.ndarray) -> np.ndarray:
    """Give the tissue the reference's mean and standard deviation in each channel of CIE Lab.

    After Reinhard, Ashikhmin, Gooch and Shirley, Color transfer between images, IEEE Comput Graph Appl 21(5):34-41
    (2001), there in the space l-alpha-beta; CIE Lab is what stain normalisation commonly puts in its place.
    """
    stained = tissue(image)
    if stained is None:
        return image
    target, lab = _measured(reference), _lab(image)
    mean, std = _lab_statistics(lab, stained)
    factor = np.minimum(target.std / np.maximum(std, 1e-3), STRETCH)
    lab = lab * factor.astype(np.float32) + (target.mean - mean * factor).astype(np.float32)
    lab[..., 0] = np.clip(lab[..., 0], 0, 100)
    levels = cv2.cvtColor(lab, cv2.COLOR_Lab2RGB)
    return keep_glass(image, np.rint(np.clip(levels, 0, 1) * 255).astype(np.uint8))


def macenko(image: np.ndarray, reference: Reference | np.ndarray) -> np.ndarray:
    """Take the image apart into its two stains and mix it again from the reference's, at the reference's full
    strengths.

    Macenko et al., ISBI 2009: C = D pinv(V), C' = C s_ref / s, D' = C' V_ref, with densities D, stain vectors V and the
    99th percentiles s of the concentrations. An image that shows one stain only is returned unchanged.
    """
    densities = tissue_densities(image)
    vectors = None if densities is None else matrix_of(densities)
    if densities is None or vectors is None:
        return image
    target = _measured(reference)
    factor = target.strengths / np.maximum(_strengths(densities, vectors), 1e-3)
    apart = (np.linalg.pinv(vectors) * factor).T.astype(np.float32)
    concentrations = np.maximum(cv2.transform(density(image), apart), 0)
    return keep_glass(image, light(cv2.transform(concentrations, target.vectors.T.astype(np.float32))))


def match_histograms(image: np.ndarray, reference: Reference | np.ndarray) -> np.ndarray:
    """Give the tissue the reference's distribution of grey levels, in red, green and blue on their own.

    Histogram specification, as in Gonzalez and Woods, Digital Image Processing, section 3.3: level ->
    F_ref^-1(F(level)).
    """
    stained = tissue(image)
    if stained is None:
        return image
    target = _measured(reference)
    table = np.stack(
        [_level_table(*shares) for shares in zip(_shares(image, stained), target.shares, strict=True)], axis=1
    )
    return keep_glass(image, cv2.LUT(image, table[:, None]))


def jitter(image: np.ndarray, random: np.random.Generator, strength: float = 0.25, offset: float = 0.03) -> np.ndarray:
    """Make each stain stronger or weaker by a random factor 1 +- `strength`, and add +- `offset` of density to the
    tissue.

    Colour deconvolution after Ruifrok and Johnston (2001) into haematoxylin, a second stain and what neither explains
    (which stays); the second is eosin or DAB, whichever leaves less unexplained. The random factors and offsets are the
    augmentation of Tellez et al., Whole-slide mitosis detection in H&E breast histology, IEEE Trans Med Imaging
    37:2126-2136 (2018).
    """
    factors, offsets = random.uniform(1 - strength, 1 + strength, 2), random.uniform(-offset, offset, 2)
    densities = tissue_densities(image)
    if densities is None:
        return image
    basis = _basis(densities)
    change = np.linalg.inv(basis) @ np.diag([*factors, 1.0]) @ basis
    shift = np.array([*offsets, 0.0]) @ basis
    affine = np.column_stack([change.T, shift]).astype(np.float32)
    return keep_glass(image, light(cv2.transform(density(image), affine)))


Transfer = Callable[[np.ndarray, Reference], np.ndarray]
TRANSFERS: dict[str, Transfer] = {"reinhard": reinhard, "macenko": macenko, "histogram": match_histograms}
MIXED = ("jitter", *TRANSFERS)
METHODS = ("none", "jitter", *TRANSFERS, "mixed")


class StainChange:
    """A stain method of the experiment: `change(image, random)` returns the image with other stains, or as it was."""

    def __init__(self, method: str, probability: float, references: Sequence[Reference] = ()) -> None:
        """`references` are what reinhard, macenko, histogram and mixed need.

        Raises ConfigError for a method that is none.
        """
        if method not in METHODS:
            raise ConfigError(
                f"augment.stain is '{method}'; known are {', '.join(METHODS)}{did_you_mean(method, METHODS)}"
            )
        if needs_references(method) and not references:
            raise ConfigError(f"the stain method {method} needs reference pictures, but none were given")
        self.method, self.probability, self.references = method, probability if method != "none" else 0.0, references

    def __call__(self, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """A picture (H, W, 3) uint8 RGB -> the same shape, changed with the given probability."""
        # Without a method nothing is drawn either, so that the other draws of a tile are what they were before there
        # were stains.
        if not self.probability or random.random() >= self.probability:
            return image
        method = MIXED[int(random.integers(len(MIXED)))] if self.method == "mixed" else self.method
        if method == "jitter":
            return jitter(image, random)
        return TRANSFERS[method](image, self.references[int(random.integers(len(self.references)))])


def needs_references(method: str) -> bool:
    """Whether a method of METHODS takes its colours from pictures."""
    return method not in ("none", "jitter")


def _measured(reference: Reference | np.ndarray) -> Reference:
    return reference if isinstance(reference, Reference) else Reference.of(reference)


def _lab(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image.astype(np.float32) / 255, cv2.COLOR_RGB2Lab)


def _lab_statistics(lab: np.ndarray, stained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    mean, std = cv2.meanStdDev(lab, mask=stained.view(np.uint8))
    return mean.ravel(), std.ravel()


def _strengths(densities: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return np.percentile(densities @ np.linalg.pinv(vectors), FULL, axis=0)


def _shares(picture: np.ndarray, stained: np.ndarray) -> np.ndarray:
    counts = np.stack(
        [cv2.calcHist([picture], [channel], stained.view(np.uint8), [256], [0, 256]).ravel() for channel in range(3)]
    )
    return np.cumsum(counts, axis=1, dtype=np.float64) / counts.sum(axis=1, keepdims=True)


def _level_table(own: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """New grey levels (256,) uint8 that turn the distribution `own` (256 shares up to each level) into `wanted`."""
    (used, middles), (targets, places) = (_steps(shares) for shares in (own, wanted))
    # Black and white stay, and levels that the tissue does not have lie between their neighbours.
    known = np.interp(middles, places, targets)
    inner = (used > 0) & (used < 255)
    return np.rint(np.interp(np.arange(256), [0, *used[inner], 255], [0, *known[inner], 255])).astype(np.uint8)


def _steps(shares: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The levels that occur, and the middle of each one's step: where half of its pixels count as darker."""
    steps = np.diff(shares, prepend=0.0)
    used = np.flatnonzero(steps > 0)
    return used, shares[used] - steps[used] / 2


def _basis(densities: np.ndarray) -> np.ndarray:
    """Haematoxylin, the better fitting second stain, and the direction that is neither: rows (3, 3) of length 1."""
    moments = densities.T @ densities
    bases = []
    for second in (EOSIN, DAB):
        rest = np.cross(HAEMATOXYLIN, second)
        basis = np.array([HAEMATOXYLIN, second, rest])
        bases.append(basis / np.linalg.norm(basis, axis=1, keepdims=True))
    return min(bases, key=lambda basis: float(basis[2] @ moments @ basis[2]))
