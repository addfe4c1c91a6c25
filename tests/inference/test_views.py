"""Views: the tours are ttach's views, every one is undone, and probabilities are averaged, not logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hubmap_kit.config import ModelConfig
from hubmap_kit.inference.on_device import Limits, MeanProbability
from hubmap_kit.inference.views import moved, moved_by_torch, tour, view_transforms

COUNTS = {"none": 1, "flips": 4, "d4": 8}
MODEL = ModelConfig(mean=(0.5, 0.4, 0.6), std=(0.2, 0.25, 0.3))


def network(seed: int, kernel: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    first, last = nn.Conv2d(3, 4, kernel, padding=kernel // 2), nn.Conv2d(4, 1, kernel, padding=kernel // 2)
    return nn.Sequential(first, nn.Tanh(), last).eval()


def pictures(count: int, height: int, width: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(height * width).integers(0, 256, (count, 3, height, width), np.uint8))


def normalised(windows: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MODEL.mean, MODEL.std))
    return (windows / 255 - mean) / std


def mean_probability(networks: list[nn.Module], windows: torch.Tensor, name: str, limit: int = 8) -> torch.Tensor:
    return MeanProbability(networks, tour(name), MODEL, torch.device("cpu"), Limits(limit))(windows)


@torch.inference_mode()
def by_ttach(networks: list[nn.Module], windows: torch.Tensor, name: str) -> torch.Tensor:
    """The definition: ttach's own transforms there and back."""
    inputs, found = normalised(windows), []
    for view in view_transforms(name):
        found += [view.deaugment_mask(torch.sigmoid(each(view.augment_image(inputs))))[:, 0] for each in networks]
    return torch.stack(found).double().mean(0).float()


@torch.inference_mode()
def by_hand(networks: list[nn.Module], windows: torch.Tensor, name: str) -> np.ndarray:
    """Numpy's own rotations and flips, one after the other."""
    turns = {
        "none": [(0, False)],
        "flips": [(0, False), (0, True), (2, False), (2, True)],
        "d4": [(times, flipped) for times in range(4) for flipped in (False, True)],
    }
    inputs = normalised(windows).numpy()
    total = np.zeros((inputs.shape[0], *inputs.shape[2:]))
    for times, flipped in turns[name]:
        seen = np.rot90(inputs, times, (2, 3))
        seen = seen[..., ::-1] if flipped else seen
        for each in networks:
            logits = each(torch.from_numpy(seen.copy()))[:, 0].numpy().astype(np.float64)
            logits = logits[..., ::-1] if flipped else logits
            total += 1 / (1 + np.exp(-np.rot90(logits, -times, (1, 2))))
    return total / (len(turns[name]) * len(networks))


@pytest.mark.parametrize("name", list(COUNTS))
def test_a_tour_shows_exactly_the_views_of_ttach_and_comes_home(name: str) -> None:
    picture = torch.rand(1, 3, 16, 16)
    expected = {view.augment_image(picture).numpy().tobytes() for view in view_transforms(name)}
    seen = picture.clone()
    found = [seen.numpy().tobytes()]
    for move in tour(name).moves:
        seen = moved(seen, move)
        found.append(seen.numpy().tobytes())
    assert len(found) == len(set(found)) == COUNTS[name] == len(view_transforms(name)) and set(found) == expected
    for move in tour(name).home:
        seen = moved(seen, move)
    assert torch.equal(seen, picture)


@given(
    count=st.integers(1, 3),
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    move=st.sampled_from(["across", "down", "transpose"]),
)
@settings(deadline=None, max_examples=60)
def test_moves_are_those_of_numpy(count: int, height: int, width: int, move: str) -> None:
    picture = torch.rand(count, 2, height, width)
    before = picture.numpy().copy()
    expected = {"across": before[..., ::-1], "down": before[..., ::-1, :], "transpose": before.swapaxes(-1, -2)}[move]
    if move != "transpose" or height == width:
        np.testing.assert_array_equal(moved_by_torch(picture.clone(), move).numpy(), expected)
    np.testing.assert_array_equal(moved(picture, move).numpy(), expected)


@pytest.mark.parametrize("name", list(COUNTS))
def test_a_network_that_sees_single_pixels_gives_the_same_from_all_views(name: str) -> None:
    windows, pointwise = pictures(2, 32, 32), network(0, kernel=1)
    found = mean_probability([pointwise], windows, name)
    with torch.inference_mode():
        torch.testing.assert_close(found, torch.sigmoid(pointwise(normalised(windows)))[:, 0])
    assert found.shape == (2, 32, 32) and found.dtype == torch.float32


@pytest.mark.parametrize("name", list(COUNTS))
@pytest.mark.parametrize("count", [1, 3])
def test_the_mean_is_that_of_a_plain_loop_and_of_ttach(name: str, count: int) -> None:
    networks, windows = [network(seed) for seed in range(count)], pictures(2, 24, 24)
    before = windows.clone()
    found = mean_probability(networks, windows, name)
    np.testing.assert_allclose(found.numpy(), by_hand(networks, windows, name), atol=1e-5)
    torch.testing.assert_close(found, by_ttach(networks, windows, name), atol=1e-6, rtol=0)
    assert torch.equal(windows, before), "the windows belong to the caller"


def test_more_views_do_change_the_mean_of_a_lopsided_network() -> None:
    windows, lopsided = pictures(1, 24, 24), network(7)
    means = [mean_probability([lopsided], windows, name) for name in COUNTS]
    assert (means[0] - means[1]).abs().max() > 1e-3 and (means[1] - means[2]).abs().max() > 1e-3


def test_all_symmetries_make_any_network_symmetric() -> None:
    windows, lopsided = pictures(1, 24, 24), network(7)
    straight = mean_probability([lopsided], windows, "d4")
    turned = mean_probability([lopsided], windows.rot90(1, (2, 3)).flip(2), "d4")
    torch.testing.assert_close(turned, straight.rot90(1, (1, 2)).flip(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["flips", "d4"])
def test_pictures_need_not_be_square(name: str) -> None:
    windows, lopsided = pictures(2, 20, 36), network(7)
    np.testing.assert_allclose(
        mean_probability([lopsided], windows, name).numpy(), by_hand([lopsided], windows, name), atol=1e-5
    )


def test_one_predictor_takes_batches_of_any_size_one_after_the_other() -> None:
    lopsided = network(7)
    predict = MeanProbability([lopsided], tour("d4"), MODEL, torch.device("cpu"), Limits(2))
    for count, side in [(3, 24), (1, 24), (5, 16), (2, 24)]:
        windows = pictures(count, side, side)
        np.testing.assert_allclose(predict(windows).numpy(), by_hand([lopsided], windows, "d4"), atol=1e-5)


class Constant(nn.Module):
    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.full_like(inputs[:, :1], self.logit)


def test_probabilities_are_averaged_and_not_logits() -> None:
    """One network that is very sure must not outvote two that disagree a little."""
    networks = [Constant(20.0), Constant(-4.0), Constant(-4.0)]
    found = mean_probability(networks, pictures(1, 8, 8), "none")
    expected = (1 + 2 / (1 + np.exp(4))) / 3
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert (found < 0.5).all()


def test_half_precision_logits_are_averaged_in_float32() -> None:
    class Half(Constant):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs).half()

    found = mean_probability([Half(-9.0)] * 5, pictures(1, 8, 8), "d4")
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), 1 / (1 + np.exp(9)), rtol=1e-4)


@pytest.mark.parametrize("views", [view_transforms, tour])
def test_an_unknown_name_is_refused(views) -> None:
    with pytest.raises(ValueError, match="d5.*none, flips, d4"):
        views("d5")
