"""The catalog: complete, in step with experiments, counts and page; counting itself against torchvision's published
figures and by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torchvision import models as published

from hubmap_kit import experiment
from hubmap_kit.config import ModelConfig
from hubmap_kit.errors import ConfigError
from hubmap_kit.jobs.models import model_details, models_table
from hubmap_kit.models import catalog
from hubmap_kit.models.build import ARCHITECTURES, build
from hubmap_kit.models.catalog import GIB, HEADER, MIB, NETWORKS, Saved, Size, measure, multiply_adds

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
BY_NAME = pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)


def test_every_network_has_an_experiment_and_every_such_experiment_is_listed() -> None:
    assert [network.config for network in NETWORKS] == list(dict.fromkeys(network.config for network in NETWORKS))
    assert {network.config for network in NETWORKS} == {
        name for name in experiment.shipped() if name.startswith(catalog.PREFIX)
    }


def test_the_counts_are_of_these_networks() -> None:
    assert list(catalog.costs()) == [network.name for network in NETWORKS]


@BY_NAME
def test_an_experiment_names_things_that_exist(network: catalog.Network) -> None:
    model = network.settings().model
    assert set(model.options) <= {*ARCHITECTURES[model.arch].options, "decoder_norm"}
    if model.encoder.startswith("tu-"):
        assert timm.is_model(model.encoder.removeprefix("tu-"))


@pytest.mark.parametrize(
    "network",
    [each for each in NETWORKS if each.settings().model.encoder.startswith("tu-")],
    ids=lambda network: network.name,
)
def test_inputs_are_normalised_as_timms_weights_expect(network: catalog.Network) -> None:
    model = network.settings().model
    expected = timm.get_pretrained_cfg(model.encoder.removeprefix("tu-"))
    assert (model.mean, model.std) == (tuple(expected.mean), tuple(expected.std))


@BY_NAME
def test_an_experiments_batch_fits_by_the_estimate(network: catalog.Network) -> None:
    settings = network.settings()
    assert settings.tiles.size == 512
    assert settings.training.batch_size <= catalog.costs()[network.name].batch_fp16


@pytest.mark.parametrize("name", ["unet-b0", "segformer-b0", "segmenter-s16", "erfnet"])
def test_counted_again_a_row_is_the_same(name: str) -> None:
    """Saved bytes may differ a little between versions of torch; weights and multiply-adds may not."""
    kept, now = catalog.costs()[name], catalog.cost(catalog.find(name).settings().model)
    assert (now.parameters, now.encoder_parameters, now.multiply_adds) == (
        kept.parameters,
        kept.encoder_parameters,
        kept.multiply_adds,
    )
    assert now.saved_fp32_mib == pytest.approx(kept.saved_fp32_mib, rel=0.05)
    assert now.saved_fp16_mib == pytest.approx(kept.saved_fp16_mib, rel=0.05)


@pytest.mark.parametrize(
    ("make", "weights"),
    [
        (published.resnet50, published.ResNet50_Weights.IMAGENET1K_V1),
        (published.efficientnet_b0, published.EfficientNet_B0_Weights.IMAGENET1K_V1),
        (published.swin_t, published.Swin_T_Weights.IMAGENET1K_V1),
        (published.convnext_tiny, published.ConvNeXt_Tiny_Weights.IMAGENET1K_V1),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_multiply_adds_are_those_that_torchvision_publishes(
    make: type[nn.Module], weights: published.WeightsEnum
) -> None:
    found = multiply_adds(lambda: make(weights=None), weights.transforms().crop_size[0])
    assert found / 1e9 == pytest.approx(weights.meta["_ops"], abs=0.02)


class Plain(nn.Module):
    """1x1 convolution 3 -> 8, ReLU, 1x1 convolution 8 -> 1: what it costs can be told by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU())
        self.head = nn.Conv2d(8, 1, 1, bias=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(images))


def test_a_plain_network_by_hand() -> None:
    side = 32
    size = measure(Plain, side)
    assert (size.parameters, size.encoder_parameters) == (32, 24)
    assert size.multiply_adds == 32 * side**2
    # The image for the first convolution's weights; the ReLU's output for itself and for the second convolution.
    assert size.saved_fp32 == Saved(11 * side**2 * 4, 8 * side**2 * 4)
    assert size.saved_fp16.total == pytest.approx(11 * side**2 * 2, rel=0.01)


def test_saved_bytes_are_those_of_a_real_pass() -> None:
    """Of a network with attention and batch norm, on the CPU, where the two differ in a few small statistics only."""
    config, kept = ModelConfig(arch="fpn", encoder="tu-test_resnet", options={"encoder_depth": 4}), {}
    network = build(config, pretrained=False).train()
    own = {value.untyped_storage().data_ptr() for value in [*network.parameters(), *network.buffers()]}

    def keep(value: torch.Tensor) -> torch.Tensor:
        kept[value.untyped_storage().data_ptr()] = value  # kept alive, so that no address comes twice
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        network(torch.zeros(2, 3, 64, 64))
    real = sum(value.untyped_storage().nbytes() for pointer, value in kept.items() if pointer not in own) / 2
    assert measure(lambda: build(config, pretrained=False), 64).saved_fp32.total == pytest.approx(real, rel=0.05)


@given(st.integers(10**5, 10**9), st.integers(MIB, 4 * GIB), st.floats(0.01, 0.9), st.floats(1, 80))
def test_the_estimate_knows_more_from_less(parameters: int, total: int, largest: float, card: float) -> None:
    """A larger card takes as much or more; more weights or a larger tile, as much or less; never below nothing."""
    saved, double = Saved(total, int(total * largest)), Saved(2 * total, 2 * int(total * largest))
    size = Size(parameters, parameters, 1, saved, saved)
    batch = size.batch(half=False, card_gib=card)
    assert 0 <= batch <= size.batch(half=False, card_gib=2 * card)
    assert Size(2 * parameters, parameters, 1, saved, saved).batch(half=False, card_gib=card) <= batch
    assert Size(parameters, parameters, 1, double, double).batch(half=False, card_gib=card) <= (batch + 1) / 2
    assert batch * total < card * GIB


def test_the_table_has_a_line_for_each_network_and_says_that_it_estimates() -> None:
    lines = models_table().splitlines()
    assert [line.split()[0] for line in lines[2 : 2 + len(NETWORKS)]] == [network.name for network in NETWORKS]
    assert max(map(len, lines[: 2 + len(NETWORKS)])) <= 120
    assert catalog.ESTIMATE in lines[-2]
    assert len(models_table(["segmenter"]).splitlines()) == len(lines) - len(NETWORKS) + 2


def test_details_of_one_network_and_of_any_experiment() -> None:
    text = model_details("segformer-b0")
    assert text == model_details("net-segformer-b0").replace("net-segformer-b0", "segformer-b0", 1)
    assert "mit_b0" in text
    assert f"{sum(p.numel() for p in build(catalog.find('segformer-b0').settings().model).parameters()):,}" in text
    assert "tu-resnet10t" in model_details("demo")


@pytest.mark.parametrize(
    ("wrong", "right"), [("unet-b9", "unet-b"), ("net-segfomer-b0", "segformer-b0"), ("nothing.yaml", "hubmap models")]
)
def test_an_unknown_network_is_named(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=right) as caught:
        model_details(wrong)
    assert wrong in str(caught.value)
    with pytest.raises(ConfigError, match="family 'unett'"):
        models_table(["unett"])


@pytest.mark.parametrize("text", ["", "name,parameters\nunet-b0,5\n", "name\n", "\x00\x01"])
def test_a_damaged_file_of_counts_is_named(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / catalog.FILE
    path.write_text(text)
    monkeypatch.setattr(catalog, "shipped_csv", lambda: path)
    catalog.costs.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"catalog\.csv"):
            catalog.costs()
    finally:
        catalog.costs.cache_clear()


def test_the_page_shows_the_counts() -> None:
    expected = catalog.markdown(
        HEADER, (catalog.table_row(network, catalog.costs()[network.name]) for network in NETWORKS), text_columns=3
    )
    assert expected in PAGE.read_text(encoding="utf-8")
