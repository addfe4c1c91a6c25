"""Views: their number, that every one is undone, and that probabilities are averaged, not logits."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hubmap_kit.inference.views import mean_probability, view_transforms

COUNTS = {"none": 1, "flips": 4, "d4": 8}


def network(seed: int, kernel: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    first, last = nn.Conv2d(3, 4, kernel, padding=kernel // 2), nn.Conv2d(4, 1, kernel, padding=kernel // 2)
    return nn.Sequential(first, nn.Tanh(), last).eval()


def by_hand(networks: list[nn.Module], inputs: torch.Tensor, name: str) -> np.ndarray:
    """numpy's own rotations and flips, one after the other."""
    turns = {
        "none": [(0, False)],
        "flips": [(0, False), (0, True), (2, False), (2, True)],
        "d4": [(times, flipped) for times in range(4) for flipped in (False, True)],
    }
    total = np.zeros((inputs.shape[0], *inputs.shape[2:]))
    for times, flipped in turns[name]:
        seen = np.rot90(inputs.numpy(), times, (2, 3))
        seen = seen[..., ::-1] if flipped else seen
        for each in networks:
            logits = each(torch.from_numpy(seen.copy()))[:, 0].numpy().astype(np.float64)
            logits = logits[..., ::-1] if flipped else logits
            total += 1 / (1 + np.exp(-np.rot90(logits, -times, (1, 2))))
    return total / (len(turns[name]) * len(networks))


@pytest.mark.parametrize("name", list(COUNTS))
@torch.inference_mode()
def test_every_view_is_another_picture_and_is_undone(name: str) -> None:
    picture = torch.rand(1, 3, 16, 16)
    seen = set()
    for view in view_transforms(name):
        turned = view.augment_image(picture)
        seen.add(turned.numpy().tobytes())
        assert torch.equal(view.deaugment_mask(turned), picture)
    assert len(seen) == COUNTS[name] == len(view_transforms(name))


@pytest.mark.parametrize("name", list(COUNTS))
@torch.inference_mode()
def test_a_network_that_sees_single_pixels_gives_the_same_from_all_views(name: str) -> None:
    inputs, pointwise = torch.randn(2, 3, 32, 32), network(0, kernel=1)
    found = mean_probability([pointwise], inputs, view_transforms(name))
    torch.testing.assert_close(found, torch.sigmoid(pointwise(inputs))[:, 0])
    assert found.shape == (2, 32, 32) and found.dtype == torch.float32


@pytest.mark.parametrize("name", list(COUNTS))
@pytest.mark.parametrize("count", [1, 3])
@torch.inference_mode()
def test_the_mean_is_that_of_a_plain_loop(name: str, count: int) -> None:
    networks, inputs = [network(seed) for seed in range(count)], torch.randn(2, 3, 24, 24)
    found = mean_probability(networks, inputs, view_transforms(name))
    np.testing.assert_allclose(found.numpy(), by_hand(networks, inputs, name), atol=1e-5)


@torch.inference_mode()
def test_more_views_do_change_the_mean_of_a_lopsided_network() -> None:
    inputs, lopsided = torch.randn(1, 3, 24, 24), network(7)
    means = [mean_probability([lopsided], inputs, view_transforms(name)) for name in COUNTS]
    assert (means[0] - means[1]).abs().max() > 1e-3 and (means[1] - means[2]).abs().max() > 1e-3


@torch.inference_mode()
def test_all_symmetries_make_any_network_symmetric() -> None:
    inputs, lopsided = torch.randn(1, 3, 24, 24), network(7)
    straight = mean_probability([lopsided], inputs, view_transforms("d4"))
    turned = mean_probability([lopsided], inputs.rot90(1, (2, 3)).flip(2), view_transforms("d4"))
    torch.testing.assert_close(turned, straight.rot90(1, (1, 2)).flip(1), atol=1e-6, rtol=0)


@torch.inference_mode()
def test_flips_take_windows_that_are_not_square() -> None:
    inputs, lopsided = torch.randn(1, 3, 20, 36), network(7)
    found = mean_probability([lopsided], inputs, view_transforms("flips"))
    np.testing.assert_allclose(found.numpy(), by_hand([lopsided], inputs, "flips"), atol=1e-5)


class Constant(nn.Module):
    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return torch.full_like(inputs[:, :1], self.logit)


def test_probabilities_are_averaged_and_not_logits() -> None:
    """Two mildly sure networks outvote a very sure one: the mean of the logits (+4) would say foreground with 0.98."""
    networks = [Constant(20.0), Constant(-4.0), Constant(-4.0)]
    found = mean_probability(networks, torch.zeros(1, 3, 8, 8), view_transforms("none"))
    expected = (1 + 2 / (1 + np.exp(4))) / 3
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)
    assert (found < 0.5).all()


def test_half_precision_logits_are_averaged_in_float32() -> None:
    class Half(Constant):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs).half()

    found = mean_probability([Half(-9.0)] * 5, torch.zeros(1, 3, 8, 8), view_transforms("d4"))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), 1 / (1 + np.exp(9)), rtol=1e-4)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="d5.*none, flips, d4"):
        view_transforms("d5")
