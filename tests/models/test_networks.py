"""Every family of networks does what training and inference ask of it, on small members; and agrees with what others
say of its parts.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits, interpolate

from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import ModelConfig
from hubmap_kit.errors import ConfigError
from hubmap_kit.models.build import ARCHITECTURES, CHANNELS, build
from hubmap_kit.models.decoders import ErfnetDecoder, ErfnetEncoder, PixelShuffleUp, SelfAttention
from hubmap_kit.models.fastest import agrees, fuse
from hubmap_kit.models.network import ORGAN_COUNT, Network, Outputs, pad_by_mirror, use_group_norm


class Case(NamedTuple):
    """A small member of a family; `pools`: a batch norm on one value a tile; `unused`: beginnings of names that no
    gradient reaches.
    """

    arch: str
    encoder: str = "tu-test_efficientnet"
    options: dict[str, Any] | None = None
    pools: bool = False
    unused: tuple[str, ...] = ()

    def build(self, **more: Any) -> Network:
        torch.manual_seed(0)
        return build(ModelConfig(arch=self.arch, encoder=self.encoder, options=self.options or {}, **more))


NARROW = {"decoder_channels": [32, 16, 16, 8, 8]}
# smp's EfficientNet keeps the end of its classifier, and timm's keeps the stages below a lesser depth.
CASES = {
    "unet": Case("unet", options=NARROW),
    "unet shallow": Case("unet", "tu-test_resnet", {"encoder_depth": 3, "decoder_channels": [16, 8, 8]}),
    "unet of smp": Case("unet", "efficientnet-b0", NARROW, unused=("encoder._conv_head", "encoder._bn1")),
    "unet shuffled": Case("unet", options={"pixel_shuffle": True, "self_attention": True, **NARROW}),
    "unet attending": Case("unet", options={"self_attention": True, **NARROW}),
    "unet++": Case("unetplusplus", options=NARROW),
    "fpn": Case("fpn", options={"decoder_pyramid_channels": 32, "decoder_segmentation_channels": 32}),
    "manet": Case("manet", options=NARROW),
    "linknet": Case("linknet"),
    "pspnet": Case("pspnet", "tu-test_resnet", {"psp_out_channels": 32}),
    "pan": Case("pan", pools=True),
    "deeplabv3": Case("deeplabv3", options={"decoder_channels": 32}, pools=True),
    "deeplabv3+ at 8": Case(
        "deeplabv3plus", "tu-resnet10t", {"decoder_channels": 32, "encoder_output_stride": 8}, pools=True
    ),
    "upernet": Case("upernet", "tu-test_convnext", {"decoder_channels": 32}, pools=True),
    "upernet vit": Case("upernet", "tu-test_vit", {"decoder_channels": 32}, pools=True),
    "upernet swin": Case("upernet", "tu-swin_tiny_patch4_window7_224", {"decoder_channels": 32}, pools=True),
    "segformer": Case("segformer", "mit_b0", {"decoder_segmentation_channels": 32, "decoder_norm": "group"}),
    "unext50": Case("unext50", options={"decoder_channels": [32, 16, 16, 8], "pyramid_channels": 8}),
    "daformer": Case("daformer", "tu-pvt_v2_b0", {"decoder_channels": 32}),
    "daformer coat": Case("daformer", "tu-coat_lite_tiny", {"decoder_channels": 32}),
    "unet parallel coat": Case("unet", "tu-coat_tiny", NARROW),
    "unet maxvit": Case("unet", "tu-maxvit_rmlp_pico_rw_256", {"img_size": 64, **NARROW}),
    "segmenter": Case("segmenter", "tu-test_vit"),
    "erfnet": Case("erfnet"),
}
CHEAP = ("unet", "unet shallow", "erfnet", "segmenter")
STAGED = {
    "unet": 4,
    "unet shallow": 2,
    "unet of smp": 4,
    "unet parallel coat": 4,
    "unet maxvit": 4,
    "unet attending": 4,
    "unet shuffled": 4,
    "unet++": 4,
    "manet": 4,
    "linknet": 4,
    "unext50": 3,
    "erfnet": 2,
}


@pytest.fixture(scope="class", params=list(CASES))
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="class")
def case(name: str) -> Case:
    return CASES[name]


@pytest.fixture(scope="class")
def network(case: Case) -> Network:
    """Shared within the class: tests that change weights or statistics take a copy."""
    network = case.build()
    with torch.no_grad():
        for _ in range(3):  # a fresh network in eval mode is nearly constant: its norms know nothing yet
            network(pictures(64, 64, count=4))
    return network.eval()


def pictures(*sizes: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, *sizes, generator=torch.Generator().manual_seed(5))


def close(found: torch.Tensor, expected: torch.Tensor, share: float) -> None:
    """Equal to a share of the expected values' spread."""
    assert expected.std() > 1e-4, "constant logits would agree with anything"
    assert float((found - expected).abs().max()) <= share * float(expected.std())


class TestEveryNetwork:
    def test_logits_have_the_size_of_the_image(self, name: str, network: Network) -> None:
        sizes = [(256, 384), (33, 70), (150, 97)] + ([(512, 768)] if name in CHEAP else [])
        with torch.inference_mode():
            for height, width in sizes:
                logits = network(pictures(height, width))
                assert (
                    type(logits) is torch.Tensor
                    and logits.shape == (1, 1, height, width)
                    and logits.dtype == torch.float32
                )
                assert logits.isfinite().all() and logits.std() > 0

    def test_odd_sides_are_mirrored_and_cut(self, network: Network) -> None:
        """The oracle is numpy's reflection."""
        image, side = pictures(70, 100), network.multiple * -(-128 // network.multiple)
        whole = torch.from_numpy(
            np.pad(image.numpy(), ((0, 0), (0, 0), (0, side - 70), (0, side - 100)), mode="reflect")
        )
        with torch.inference_mode():
            if network.least <= 64 and network.multiple == 32:
                whole = whole[..., :96, :128]
            close(network(image), network(whole)[..., :70, :100], 1e-4)

    def test_organs_are_six_channels(self, case: Case) -> None:
        network = case.build(classes="organs").eval()
        with torch.inference_mode():
            assert network(pictures(64, 96)).shape == (1, 6, 64, 96)

    def test_gradients_reach_every_weight(self, case: Case, network: Network) -> None:
        network = copy.deepcopy(network).train()
        for module in network.modules():
            if isinstance(module, SelfAttention):
                nn.init.ones_(module.strength)  # at its start, 0, nothing flows through
        (network(pictures(64, 64, count=2)) * pictures(64, 64, count=2)[:, :1]).sum().backward()
        without = [
            key for key, value in network.named_parameters() if value.grad is None or not value.grad.isfinite().all()
        ]
        assert [key for key in without if not key.startswith(case.unused or ("-",))] == []
        assert not case.unused or without, "the exceptions are not needed"

    def test_weights_survive_a_file(self, case: Case, network: Network, tmp_path: Path) -> None:
        save_file(
            {key: value.contiguous() for key, value in network.state_dict().items()}, tmp_path / "model.safetensors"
        )
        torch.manual_seed(1)
        other = build(ModelConfig(arch=case.arch, encoder=case.encoder, options=case.options or {})).eval()
        with torch.inference_mode():
            expected = network(pictures(64, 96))
            assert not torch.equal(other(pictures(64, 96)), expected)
            other.load_state_dict(load_file(tmp_path / "model.safetensors"))
            assert torch.equal(other(pictures(64, 96)), expected)

    def test_halves_and_memory_orders_agree(self, network: Network) -> None:
        with torch.inference_mode():
            expected = network(pictures(64, 96))
            last = copy.deepcopy(network).to(memory_format=torch.channels_last)
            close(last(pictures(64, 96).to(memory_format=torch.channels_last)), expected, 1e-2)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                halves = network(pictures(64, 96))
        # Eight bits of mantissa through dozens of layers: it is the same picture, no more.
        assert (
            halves.isfinite().all()
            and torch.corrcoef(torch.stack([halves.float().flatten(), expected.flatten()]))[0, 1] > 0.9
        )

    def test_a_batch_of_one_can_teach(self, case: Case, network: Network) -> None:
        network = copy.deepcopy(network).train()
        if case.pools:
            with pytest.raises(ConfigError, match="decoder_norm: group"):
                network(pictures(64, 64))
            use_group_norm(network.decoder)
        # PAN's deepest map would be one value at 128 px, in which nothing differs.
        side = 256 if case.arch == "pan" else 64
        network(pictures(side, side)).sum().backward()

    def test_it_learns_one_batch_by_heart(self, case: Case, network: Network) -> None:
        network, inputs = copy.deepcopy(network).train(), pictures(64, 64, count=2)
        inputs = interpolate(inputs[..., ::16, ::16], size=(64, 64), mode="nearest")
        target = (inputs[:, :1] > 0).float()
        if case.arch == "pspnet":  # coarse: it sees nothing below 8 px
            target = target.mean(dim=(2, 3), keepdim=True).expand_as(target).round()
        optimizer, losses = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0), []
        for _ in range(STEPS):
            losses.append(binary_cross_entropy_with_logits(network(inputs), target))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
            if losses[-1] < losses[0] / 2:
                return
        raise AssertionError(f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f} only")

    def test_folded_norms_change_nothing(self, name: str, network: Network) -> None:
        # MaxViT's blocks read a convolution beside the norm that follows it, which only the comparison sees: it is then
        # not folded.
        assert agrees(network, fuse(network), pictures(64, 96)) == (name != "unet maxvit")

    def test_auxiliary_heads(self, name: str, case: Case, network: Network) -> None:
        heads = {"fcn": 0.4, "organ": 0.1, "pixel_size": 0.1} | ({"deep": 0.2} if name in STAGED else {})
        trained = case.build(classes="organs", auxiliary=heads)
        found = trained(pictures(96, 128, count=2))
        assert (
            isinstance(found, Outputs) and found.logits.shape == (2, 6, 96, 128) and set(found.auxiliary) == set(heads)
        )
        assert found.auxiliary["fcn"].shape[:2] == (2, 6) and found.auxiliary["fcn"].shape[2] * 4 <= 96
        assert found.auxiliary["organ"].shape == (2, 5) and found.auxiliary["pixel_size"].shape == (2,)
        stages = found.auxiliary.get("deep", [])
        assert len(stages) == STAGED.get(name, 0) and all(each.shape[:2] == (2, 6) for each in stages)
        assert [each.shape[2] for each in stages] == sorted(each.shape[2] for each in stages)
        total = found.logits.sum() + sum(
            each.sum() for value in found.auxiliary.values() for each in (value if isinstance(value, list) else [value])
        )
        total.backward()
        assert [key for key, value in trained.auxiliary.named_parameters() if value.grad is None] == []
        with torch.inference_mode():
            assert type(trained.eval()(pictures(64, 96))) is torch.Tensor


STEPS = 60


def test_no_family_is_left_out() -> None:
    assert {case.arch for case in CASES.values()} == set(ARCHITECTURES)
    assert CHANNELS["organs"] == 1 + len(ORGANS) and len(ORGANS) == ORGAN_COUNT


@pytest.mark.parametrize("arch", ["fpn", "segmenter", "daformer", "segformer", "upernet", "deeplabv3plus"])
def test_deep_heads_need_stages(arch: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.auxiliary has deep"):
        build(
            ModelConfig(
                arch=arch, encoder="tu-test_vit" if arch == "segmenter" else "resnet18", auxiliary={"deep": 1.0}
            )
        )


# ---- what others say of the same networks


@pytest.mark.parametrize(
    "kind",
    [
        "Unet",
        "UnetPlusPlus",
        "FPN",
        "MAnet",
        "Linknet",
        "PSPNet",
        "PAN",
        "DeepLabV3",
        "DeepLabV3Plus",
        "UPerNet",
        "Segformer",
    ],
)
def test_plain_networks_are_smps(kind: str) -> None:
    """Names, weights of one seed, and outputs, to the bit: runs that were trained with smp's own class must load."""
    torch.manual_seed(3)
    expected = getattr(smp, kind)("tu-test_resnet", encoder_weights=None).eval()
    torch.manual_seed(3)
    found = build(ModelConfig(arch=kind, encoder="tu-test_resnet")).eval()
    weights = found.state_dict()
    assert list(weights) == list(expected.state_dict()) and all(
        torch.equal(weights[key], value) for key, value in expected.state_dict().items()
    )
    with torch.inference_mode():
        assert torch.equal(found(pictures(128, 160)), expected(pictures(128, 160)))


# Tan and Le 2019 (arXiv:1905.11946), table 2: millions of weights of the whole classifiers.
PUBLISHED = {"b0": 5.3, "b1": 7.8, "b2": 9.2, "b3": 12, "b4": 19, "b5": 30, "b6": 43, "b7": 66}


@pytest.mark.parametrize("size", list(PUBLISHED))
def test_efficientnets_have_their_published_size(size: str) -> None:
    """The encoder leaves out the classifier's end, a 1x1 convolution with its norm and a linear layer; counted without
    memory for weights.
    """
    with torch.device("meta"):
        encoder = build(ModelConfig(encoder=f"tu-efficientnet_{size}")).encoder
        width, deepest = timm.create_model(f"efficientnet_{size}", num_classes=0).num_features, encoder.out_channels[-1]
    end = deepest * width + 2 * width + (width + 1) * 1000
    assert (count(encoder) + end) / 1e6 == pytest.approx(PUBLISHED[size], rel=0.02)


# Xie et al. 2021 (arXiv:2105.15203), table 1: millions of weights of the encoders.
@pytest.mark.parametrize(("size", "millions"), [("b0", 3.4), ("b1", 13.1), ("b2", 24.2), ("b3", 44.0)])
def test_mix_transformers_have_their_published_size(size: str, millions: float) -> None:
    assert count(build(ModelConfig(arch="segformer", encoder=f"mit_{size}")).encoder) / 1e6 == pytest.approx(
        millions, rel=0.03
    )


def test_erfnet_has_its_published_size() -> None:
    """About 2.1 million with Cityscapes' 20 outputs (Romera et al. 2018)."""
    total = count(ErfnetEncoder()) + count(ErfnetDecoder()) + 16 * 20 * 4 + 20
    assert total / 1e6 == pytest.approx(2.06, abs=0.02)


def count(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


@pytest.mark.parametrize("name", ["coat_lite_tiny", "coat_tiny"])
def test_coat_is_timms_at_timms_size(name: str) -> None:
    encoder = Case("unet", f"tu-{name}").build().encoder.eval()
    levels = [f"x{level}_nocls" for level in (1, 2, 3, 4)]
    timms = timm.create_model(name, num_classes=0, return_interm_layers=True, out_features=levels).eval()
    missing = timms.load_state_dict(encoder.model.state_dict(), strict=False).missing_keys
    assert all("cpe." in key or "crpe" in key or "parallel_blocks" in key for key in missing), (
        "only second names of what blocks share"
    )
    with torch.inference_mode():
        expected, found = timms(pictures(224, 224)), encoder(pictures(224, 224))
    for level, one in zip(levels, found[2:], strict=True):
        torch.testing.assert_close(one, expected[level], rtol=1e-4, atol=1e-5)


def test_vits_and_swins_are_timms_at_timms_size() -> None:
    pyramid, tokens = (
        Case("upernet", "tu-test_vit").build().encoder.eval(),
        Case("segmenter", "tu-test_vit").build().encoder.eval(),
    )
    swin, image = Case("upernet", "tu-swin_tiny_patch4_window7_224").build().encoder.eval(), pictures(224, 224)
    plain = timm.create_model("test_vit", num_classes=0, img_size=224).eval()
    features = timm.create_model("swin_tiny_patch4_window7_224", features_only=True).eval()
    features.load_state_dict(swin.model.state_dict())
    plain.load_state_dict(
        {key: value for key, value in tokens.model.state_dict().items() if key != "pos_embed"}, strict=False
    )
    with torch.inference_mode():
        for found, expected in zip(swin(image)[2:], features(image), strict=True):
            torch.testing.assert_close(found, expected.permute(0, 3, 1, 2))
        plain = timm.create_model("test_vit", num_classes=0).eval()
        plain.load_state_dict(tokens.model.state_dict())
        side = plain.patch_embed.img_size[0]
        expected = plain.forward_features(pictures(side, side))[:, plain.num_prefix_tokens :]
        torch.testing.assert_close(tokens(pictures(side, side))[-1].flatten(2).transpose(1, 2), expected)
        sizes = [each.shape[-1] for each in pyramid(pictures(96, 96))]
    assert sizes == [96, 48, 24, 12, 6, 3]


def test_patches_of_14_px() -> None:
    network = Case("segmenter", "tu-eva02_tiny_patch14_224").build().eval()
    with torch.inference_mode():
        assert network(pictures(100, 250)).shape == (1, 1, 100, 250)
        assert network.encoder(pictures(28, 42))[-1].shape[2:] == (2, 3)


def test_a_classifiers_file_gives_its_weights(tmp_path: Path) -> None:
    """Of CoaT and a ViT, whose classifier has more than the encoder takes."""
    for name, arch in (("coat_lite_tiny", "daformer"), ("test_vit", "segmenter"), ("test_vit", "upernet")):
        classifier = timm.create_model(name)
        save_file(
            {key: value.clone() for key, value in classifier.state_dict().items()}, tmp_path / "weights.safetensors"
        )
        encoder = build(
            ModelConfig(arch=arch, encoder=f"tu-{name}", encoder_weights=str(tmp_path / "weights.safetensors"))
        ).encoder
        expected, found = classifier.state_dict(), encoder.model.state_dict()
        assert found and all(torch.equal(value, expected[key]) for key, value in found.items())


# ---- the parts


@given(
    height=st.integers(2, 70),
    width=st.integers(2, 70),
    multiple=st.sampled_from([1, 8, 32]),
    least=st.sampled_from([0, 32, 128]),
)
@settings(deadline=None, max_examples=60)
def test_mirroring_is_numpys(height: int, width: int, multiple: int, least: int) -> None:
    image = torch.arange(3 * height * width, dtype=torch.float32).view(1, 3, height, width)
    found = pad_by_mirror(image, multiple, least)
    assert all(
        side % multiple == 0 and side >= least and side - max(before, least) < multiple
        for side, before in zip(found.shape[2:], (height, width), strict=True)
    )
    more = [(0, 0), (0, 0), (0, found.shape[2] - height), (0, found.shape[3] - width)]
    np.testing.assert_array_equal(found.numpy(), np.pad(image.numpy(), more, mode="reflect"))


def test_a_fresh_pixel_shuffle_enlarges_like_nearest_neighbour() -> None:
    layer, inputs = PixelShuffleUp(6, 4), pictures(5, 7)[:, [0, 1, 2, 0, 1, 2]]
    small = torch.relu(layer.expand(inputs))[:, ::4]
    large = interpolate(small, scale_factor=2, mode="nearest").detach().numpy()
    # The blur: each pixel with the ones above it and left of it.
    rows = (large + np.concatenate([large[..., :1, :], large[..., :-1, :]], axis=2)) / 2
    expected = (rows + np.concatenate([rows[..., :1], rows[..., :-1]], axis=3)) / 2
    np.testing.assert_allclose(layer(inputs).detach().numpy(), expected, atol=1e-6)


def test_self_attention_is_its_formula() -> None:
    layer, inputs = SelfAttention(16), torch.randn(2, 16, 3, 5)
    assert torch.equal(layer(inputs), inputs)
    nn.init.constant_(layer.strength, 0.7)
    weights, places = layer.project.weight[..., 0], inputs.flatten(2)
    query, key, value = weights[:2] @ places, weights[2:4] @ places, weights[4:] @ places
    share = torch.softmax(torch.einsum("nci,ncj->nij", query, key), dim=2)
    expected = inputs + 0.7 * torch.einsum("nij,ncj->nci", share, value).view_as(inputs)
    torch.testing.assert_close(layer(inputs), expected)


def test_group_norms_replace_batch_norms() -> None:
    network = build(
        ModelConfig(arch="segformer", encoder="mit_b0", options={"decoder_norm": "group"}, auxiliary={"fcn": 0.4})
    )
    kinds = {
        type(module).__name__: module for part in (network.decoder, network.auxiliary) for module in part.modules()
    }
    assert "BatchNorm2d" not in kinds and network.decoder.fuse_stage[1].num_groups == 32
    with pytest.raises(ConfigError, match=r"decoder_norm is 'layer'; give batch or group"):
        build(ModelConfig(encoder="resnet18", options={"decoder_norm": "layer"}))


@pytest.mark.parametrize(
    ("arch", "encoder", "options", "words"),
    [
        ("segmenter", "resnet18", {}, "plain vision transformer"),
        ("upernet", "tu-eva02_tiny_patch14_224", {}, "patches of 16 px"),
        ("deeplabv3", "tu-coat_lite_tiny", {}, "cannot be dilated"),
        ("deeplabv3plus", "tu-test_resnet", {"encoder_output_stride": 4}, "cannot be built"),
        ("unet", "tu-test_resnet", {"img_size": 64}, "img_size is for MaxViT"),
        ("unet", "tu-test_resnet", {"pixel_shuffle": True, "decoder_attention_type": "scse"}, "does not go together"),
        ("unet", "tu-test_resnet", {"pixel_shuffle": True, "decoder_channels": [8]}, "decoder_channels has 1"),
        ("unet", "tu-test_resnet", {"pixel_shuffle": "off"}, "true or false"),
        ("fpn", "tu-test_resnet", {"pixel_shuffle": True}, "'pixel_shuffle'"),
        ("unetplusplus", "mit_b0", {}, "mit_b0"),
        ("erfnet", "resnet18", {"decoder_channels": [8]}, "'decoder_channels'"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(arch: str, encoder: str, options: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as raised:
        build(ModelConfig(arch=arch, encoder=encoder, options=options))
    assert "\n" not in str(raised.value)
