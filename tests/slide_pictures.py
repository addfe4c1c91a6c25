"""Small pictures for tests of the slide reader, and whether this machine can write every compression."""

from __future__ import annotations

import importlib.util

import cv2
import numpy as np

HAS_IMAGECODECS = importlib.util.find_spec("imagecodecs") is not None
NO_CODECS = "imagecodecs is not installed, and without it tifffile cannot write LZW, JPEG or floating-point predictors"


def picture(height: int = 37, width: int = 53, samples: int = 3) -> np.ndarray:
    """Smooth, so that JPEG keeps it; not square and odd, so that swapped axes and edge tiles show."""
    noise = np.random.default_rng(height * width).integers(0, 256, (height, width, samples)).astype(np.uint8)
    smooth = cv2.GaussianBlur(noise, (0, 0), 3).reshape(height, width, samples).astype(float)
    return np.rint((smooth - smooth.min()) * 255 / np.ptp(smooth)).astype(np.uint8)
