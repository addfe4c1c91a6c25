"""The fast path against a plain one: one window at a time, in float64, with a count map and ttach's views, on real
tissue.
"""

from __future__ import annotations

import copy
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import ttach
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.inference.ensemble import Effort, Ensemble
from hubmap_kit.inference.windows import plan_axis
from hubmap_kit.models.build import build
from hubmap_kit.models.fastest import Tuner

CPU = torch.device("cpu")
SETTINGS = [
    "model.encoder=tu-test_resnet",
    "model.options={encoder_depth: 3, decoder_channels: [16, 8, 8]}",
    "scale.policy=physical",
    "scale.um_per_px=0.9",
    "inference.window=192",
    "inference.overlap=0.3",
    "inference.batch_size=3",
    "model.mean=[0.485, 0.456, 0.406]",
    "model.std=[0.229, 0.224, 0.225]",
]
VIEWS = {
    "none": ttach.Compose([]),
    "flips": ttach.Compose([ttach.HorizontalFlip(), ttach.VerticalFlip()]),
    "d4": ttach.aliases.d4_transform(),
}


def networks(settings: experiment.Experiment, count: int) -> list[nn.Module]:
    """Random, but with batch norms that do something and a wide range of probabilities."""
    made = []
    for seed in range(count):
        torch.manual_seed(seed)
        network = build(settings.model, pretrained=False)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
        with torch.no_grad():
            network(torch.randn(4, 3, 64, 64))
        network.segmentation_head[0].weight.data *= 4
        made.append(network.eval())
    return made


@torch.inference_mode()
def plain(
    slide: np.ndarray,
    shape: tuple[int, int],
    settings: experiment.Experiment,
    folds: list[nn.Module],
    views: ttach.Compose,
) -> np.ndarray:
    """Scale, cut, normalise, predict, blend, divide by the sum of weights, scale back."""
    config, size = settings.inference, settings.inference.window
    image = cv2.resize(slide, shape[::-1], interpolation=cv2.INTER_AREA)
    mean, std = np.array(settings.model.mean) * 255, np.array(settings.model.std) * 255
    exact = [copy.deepcopy(fold).double() for fold in folds]
    bell = np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (size / 4)) ** 2)
    weights = np.outer(bell, bell)
    total, count = np.zeros(shape), np.zeros(shape)
    for row in plan_axis(shape[0], size, config.overlap).starts:
        for col in plan_axis(shape[1], size, config.overlap).starts:
            place = (slice(row, row + size), slice(col, col + size))
            window = torch.from_numpy(((image[place] - mean) / std).transpose(2, 0, 1)[None].copy())
            seen = [
                view.deaugment_mask(torch.sigmoid(fold(view.augment_image(window))))[0, 0]
                for view in views
                for fold in exact
            ]
            total[place] += torch.stack(seen).mean(0).numpy() * weights
            count[place] += weights
    return cv2.resize(total / count, slide.shape[1::-1], interpolation=cv2.INTER_LINEAR)


@pytest.fixture(scope="module")
def slide(shared_data: Path) -> np.ndarray:
    return slide_files.read(shared_data / "hubmap-mini" / "test_images" / "10078.tiff")


@pytest.mark.parametrize(("views", "count", "tuned"), [("none", 2, False), ("flips", 1, True), ("d4", 1, True)])
def test_masks_are_those_of_the_plain_path(
    slide: np.ndarray, tmp_path: Path, views: str, count: int, tuned: bool
) -> None:
    settings = experiment.load("baseline", [*SETTINGS, f"inference.views={views}"])
    folds = networks(settings, count)
    expected = plain(slide, (450, 450), settings, folds, VIEWS[views])
    ensemble = Ensemble(settings, folds, {}, CPU, Tuner(tmp_path / "speed.json", CPU) if tuned else None)
    found = ensemble.probability(slide, 0.5)
    assert expected.std() > 0.05, "a plane without contrast would prove nothing"
    np.testing.assert_allclose(found, expected, atol=1e-5)
    for threshold in np.quantile(expected, [0.2, 0.5, 0.9]):
        assert ((found >= threshold) != (expected >= threshold)).mean() <= 1e-5


def test_half_the_scale_is_the_plain_path_at_half_the_scale(slide: np.ndarray) -> None:
    settings = experiment.load("baseline", [*SETTINGS, "inference.views=flips"])
    folds = networks(settings, 2)
    expected = plain(slide, (225, 225), settings, folds[:1], VIEWS["none"])
    found = Ensemble(settings, folds, {}, CPU).probability(slide, 0.5, Effort(0.3, "none", 1, 2))
    np.testing.assert_allclose(found, expected, atol=1e-5)
