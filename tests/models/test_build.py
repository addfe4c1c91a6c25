"""The builder: every decoder on small encoders, without a network, and one sentence for what cannot be built."""

from __future__ import annotations

import socket

import numpy as np
import pytest
import torch
from torch import nn

from hubmap_kit.config import ModelConfig
from hubmap_kit.errors import ConfigError, HubmapError, WeightsError
from hubmap_kit.models.build import ARCHITECTURES, build, normalise


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something tried to open a connection")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_the_guard_works() -> None:
    with pytest.raises(AssertionError, match="connection"):
        socket.create_connection(("127.0.0.1", 9), timeout=1)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_every_architecture_gives_one_logit_a_pixel(arch: str) -> None:
    network = build(ModelConfig(arch=arch, encoder="tu-test_vit" if arch == "segmenter" else "resnet18"))
    assert isinstance(network, nn.Module) and network.training
    height, width = 64, 96
    with torch.inference_mode():
        logits = network.eval()(torch.randn(2, 3, height, width))
    assert logits.shape == (2, 1, height, width) and logits.dtype == torch.float32 and logits.isfinite().all()
    # Logits, not probabilities: an activation would square the sigmoid of losses and inference.
    assert not any(isinstance(part, nn.Sigmoid | nn.Softmax) for part in network.segmentation_head.modules())


@pytest.mark.parametrize("arch", ["unet", "fpn", "deeplabv3plus", "unetplusplus"])
@pytest.mark.parametrize("encoder", ["tu-resnet10t", "tu-mobilenetv3_small_050"])
def test_timm_encoders(arch: str, encoder: str) -> None:
    network = build(ModelConfig(arch=arch, encoder=encoder)).eval()
    with torch.inference_mode():
        assert network(torch.randn(1, 3, 64, 64)).shape == (1, 1, 64, 64)


@pytest.mark.parametrize("arch", ["Unet", "UNET", "uNeT"])
def test_the_case_of_a_name_does_not_matter(arch: str) -> None:
    shapes = [
        {key: value.shape for key, value in build(ModelConfig(arch=name, encoder="resnet18")).state_dict().items()}
        for name in (arch, "unet")
    ]
    assert shapes[0] == shapes[1]


def test_options_reach_the_decoder() -> None:
    plain = build(ModelConfig(encoder="resnet18"))
    narrow = build(ModelConfig(encoder="resnet18", options={"decoder_channels": [32, 16, 16, 8, 8]}))
    count = [sum(weight.numel() for weight in network.decoder.parameters()) for network in (plain, narrow)]
    assert count[1] < count[0] / 4


def test_one_seed_one_network() -> None:
    weights = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        weights.append(
            torch.cat([weight.flatten() for weight in build(ModelConfig(encoder="tu-resnet10t")).parameters()])
        )
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"arch": "unett"}, "model.arch is 'unett'.*did you mean 'unet'"),
        ({"arch": ""}, "model.arch is ''"),
        ({"encoder": "resnet19"}, "model.encoder is 'resnet19'.*did you mean"),
        ({"encoder": "tu-resnet10x"}, "model.encoder is 'tu-resnet10x'.*did you mean 'tu-"),
        ({"encoder": ""}, "model.encoder is ''"),
        ({"encoder": "tu-"}, "model.encoder is 'tu-'"),
        ({"encoder": "tu-hf-hub:somebody/net"}, "model.encoder is 'tu-hf-hub:somebody/net'"),
        ({"options": {"decoder_chanels": [1]}}, "'decoder_chanels'.*did you mean 'decoder_channels'"),
        ({"options": {"encoder_weights": "imagenet"}}, "'encoder_weights'"),
        ({"options": {"classes": 2}}, "'classes'"),
        ({"options": {"activation": "sigmoid"}}, "'activation'"),
        ({"options": {"decoder_channels": [16, 8]}}, "cannot be built with options"),
        ({"options": {"decoder_attention_type": "none such"}}, "cannot be built with options"),
        ({"options": {"encoder_depth": 0}}, "cannot be built with options"),
        ({"options": {"encoder_depth": 7}}, "cannot be built with options"),
        ({"options": {"encoder_depth": "deep"}}, "cannot be built with options"),
        ({"options": {"decoder_channels": []}}, "cannot be built with options"),
    ],
)
def test_what_cannot_be_built_is_one_sentence(config: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        build(ModelConfig(**{"encoder": "resnet18", **config}))


def test_pretrained_weights_are_asked_for_only_when_wanted() -> None:
    config = ModelConfig(encoder="resnet18", encoder_weights="nowhere/weights.pth")
    with pytest.raises(WeightsError, match="nowhere/weights.pth does not exist"):
        build(config)
    assert issubclass(WeightsError, HubmapError)
    build(config, pretrained=False)


@pytest.mark.parametrize(
    ("mean", "std"), [((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
)
def test_normalise_is_numpys(mean: tuple, std: tuple) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), np.uint8)
    found = normalise(torch.from_numpy(tiles), ModelConfig(mean=mean, std=std))
    expected = ((tiles / 255.0 - mean) / std).transpose(0, 3, 1, 2)
    assert found.dtype == torch.float32 and found.shape == (2, 3, 5, 7)
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-6)


def test_halves_are_the_classic_127_5_rule() -> None:
    tiles = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    found = normalise(tiles, ModelConfig(mean=(0.5,) * 3, std=(0.5,) * 3))
    np.testing.assert_allclose(found[0, 0].flatten().numpy(), np.arange(256) / 127.5 - 1, atol=1e-6)


def test_channels_keep_their_order() -> None:
    red = torch.tensor([255, 0, 0], dtype=torch.uint8).view(1, 1, 1, 3)
    found = normalise(red, ModelConfig(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)))
    assert found.flatten().tolist() == [1.0, 0.0, 0.0]
