"""Optical density: what a stain takes from the light, in decades, and the two stains that a picture is made of.

Density is -log10(I / 255), after Beer and Lambert: stains add up in it, which they do not in grey levels. Stain vectors
are the densities of one stain in red, green and blue at length 1. HAEMATOXYLIN, EOSIN and DAB: Ruifrok and Johnston,
Quantification of histochemical staining by color deconvolution, Anal Quant Cytol Histol 23:291-299 (2001).
"""

from __future__ import annotations

import cv2
import numpy as np

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
