"""Folded batch norms: the same function, judged in float64; what cannot be folded stays."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from timm.layers import BatchNormAct2d, StdConv2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from hubmap_kit.config import ModelConfig
from hubmap_kit.models.build import build
from hubmap_kit.models.fastest import agrees, fuse


def lived_in(network: nn.Module, seed: int = 0) -> nn.Module:
    """A network whose batch norms are far from doing nothing: fresh ones would hide every mistake."""
    random = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.running_mean.copy_(torch.randn(module.num_features, generator=random) * 0.2)
            module.running_var.copy_(torch.rand(module.num_features, generator=random) + 0.5)
            if module.affine:
                module.weight.data.copy_(torch.rand(module.num_features, generator=random) + 0.5)
                module.bias.data.copy_(torch.randn(module.num_features, generator=random) * 0.2)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, _BatchNorm) for module in network.modules())


def assert_same_function(network: nn.Module, folded: nn.Module, inputs: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = copy.deepcopy(network).double()(inputs.double())
        found = copy.deepcopy(folded).double()(inputs.double())
    # The folded weights are float32, rounded once.
    np.testing.assert_allclose(found.numpy(), expected.numpy(), rtol=1e-4, atol=2e-5 * float(expected.abs().max()))
    assert expected.std() > 1e-4


NETWORKS = {  # architecture, encoder, options, batch norms that must be left
    "timm efficientnet": ("unet", "tu-efficientnet_b0", {}, 0),
    "timm same padding": ("unet", "tu-tf_efficientnet_lite0", {}, 0),
    "timm mobilenet": ("fpn", "tu-mobilenetv3_small_050", {}, 0),
    "timm resnet": ("linknet", "tu-test_resnet", {"encoder_depth": 3}, 3),  # linknet's transposed convolutions
    "smp resnet": ("deeplabv3plus", "resnet18", {}, 0),
    "smp efficientnet": ("unet", "efficientnet-b0", {}, 1),  # its classifier's, which never runs
    "transformer": ("unet", "mit_b0", {}, 0),
    "norms before convolutions": ("unet", "tu-densenet121", {}, None),
}


@pytest.mark.parametrize("name", list(NETWORKS))
def test_a_folded_network_is_the_same_function(name: str) -> None:
    arch, encoder, options, left = NETWORKS[name]
    torch.manual_seed(0)
    network = lived_in(build(ModelConfig(arch=arch, encoder=encoder, options=options), pretrained=False))
    before = {key: value.clone() for key, value in network.state_dict().items()}
    folded = fuse(network)
    assert_same_function(network, folded, torch.randn(1, 3, 64, 96))
    assert norms(folded) < norms(network) and (left is None or norms(folded) == left)
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items()), (
        "the given network was changed"
    )


def check(network: nn.Module, left: int) -> None:
    lived_in(network)
    folded = fuse(network, torch.randn(2, 3, 16, 16))
    assert_same_function(network, folded, torch.randn(2, 3, 16, 16))
    assert norms(folded) == left


def test_an_activation_inside_a_norm_is_kept() -> None:
    check(nn.Sequential(nn.Conv2d(3, 8, 3), BatchNormAct2d(8, act_layer=nn.SiLU), nn.Conv2d(8, 1, 1)), 0)


@pytest.mark.parametrize(
    "convolution",
    [
        nn.Conv2d(3, 8, 3, bias=False),
        nn.Conv2d(3, 9, 3, groups=3, stride=2),
        nn.Conv2d(3, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
    ],
    ids=["no bias", "groups", "dilated"],
)
def test_all_kinds_of_convolutions(convolution: nn.Conv2d) -> None:
    check(
        nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.Conv2d(convolution.out_channels, 1, 1)),
        0,
    )


def test_norms_without_weights() -> None:
    check(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, affine=False), nn.Conv2d(8, 1, 1)), 0)


class Lambda(nn.Module):
    def __init__(self, function, **parts: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.function(self, inputs)


LEFT_ALONE = {
    "changed in place between": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(8)),
    "norm first": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)),
    "standardised weights": lambda: nn.Sequential(StdConv2d(3, 8, 3), nn.BatchNorm2d(8)),
    "statistics of the batch": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False)),
    "one norm twice": lambda: Lambda(
        lambda m, x: m.n(m.a(x)) + m.n(m.b(x)), a=nn.Conv2d(3, 8, 3), b=nn.Conv2d(3, 8, 3), n=nn.BatchNorm2d(8)
    ),
    "one convolution twice": lambda: Lambda(
        lambda m, x: m.n(m.a(x)) + m.a(x.flip(2)), a=nn.Conv2d(3, 8, 3), n=nn.BatchNorm2d(8)
    ),
}


@pytest.mark.parametrize("name", list(LEFT_ALONE))
def test_what_cannot_be_folded_stays(name: str) -> None:
    check(LEFT_ALONE[name](), 1)


def two_readers(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    features = module.a(inputs)
    return module.n(features) + module.o(features)


def test_one_convolution_read_by_two_norms_stays() -> None:
    check(Lambda(two_readers, a=nn.Conv2d(3, 8, 3), n=nn.BatchNorm2d(8), o=nn.BatchNorm2d(8)), 2)


def test_a_difference_is_noticed() -> None:
    network, inputs = (
        lived_in(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1))),
        torch.randn(1, 3, 16, 16),
    )
    folded = fuse(network, inputs)
    assert agrees(network, folded, inputs)
    folded[2].bias.data += 1e-3
    assert not agrees(network, folded, inputs)
    folded[2].bias.data.fill_(float("nan"))
    assert not agrees(network, folded, inputs) and not agrees(folded, folded, inputs)


def test_a_reader_beside_the_norm_is_noticed() -> None:
    """Which functions read a convolution's output cannot be seen from modules; the comparison sees it."""
    network = lived_in(Lambda(two_readers, a=nn.Conv2d(3, 8, 3), n=nn.BatchNorm2d(8), o=nn.Identity()))
    inputs = torch.randn(1, 3, 16, 16)
    assert norms(fuse(network, inputs)) == 0 and not agrees(network, fuse(network, inputs), inputs)
