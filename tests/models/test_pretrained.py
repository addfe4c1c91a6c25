"""Encoder weights from files: against torchvision and timm themselves, and every way in which a file can be wrong."""

from __future__ import annotations

import collections
import os
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from shaken import encoder, shaken
from torch import nn

from hubmap_kit.config import ModelConfig
from hubmap_kit.errors import WeightsError
from hubmap_kit.models.build import build
from hubmap_kit.models.pretrained import load_encoder, read_tensors


def test_mobilenet_of_torchvision(shared_data: Path) -> None:
    from torchvision.models import mobilenet_v2

    path = shared_data / "weights" / "mobilenet_v2_imagenet.pth"
    oracle = mobilenet_v2(weights=None)
    oracle.load_state_dict(torch.load(path, weights_only=True))
    mine = encoder("mobilenet_v2")
    report = load_encoder(mine, path)
    assert not report.missing and all(name.startswith("classifier") for name in report.unexpected)
    inputs = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(mine(inputs)[-1], oracle.eval().features(inputs))


@pytest.mark.parametrize("name", ["convnext_atto", "efficientnet_b0", "resnet18", "mobilenetv3_small_050"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_timm_classifier_gives_its_weights_to_the_encoder(tmp_path: Path, name: str, suffix: str) -> None:
    """The oracle is the whole classifier: its own last feature map on the same picture."""
    classifier, path = shaken(timm.create_model(name)), tmp_path / f"weights{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(classifier.state_dict(), path)
    mine = encoder(f"tu-{name}")
    report = load_encoder(mine, path)
    assert len(report.missing) == 0
    inputs = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = classifier.forward_intermediates(inputs, intermediates_only=True)[-1]
        torch.testing.assert_close(mine(inputs)[-1], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet18", "efficientnet-b0", "mit_b0"])
def test_an_smp_encoder_goes_there_and_back(tmp_path: Path, name: str) -> None:
    path, source = tmp_path / "encoder.safetensors", shaken(encoder(name))
    save_file({key: value.clone() for key, value in source.state_dict().items()}, path)
    target = encoder(name)
    load_encoder(target, path)
    inputs = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(target(inputs)[-1], source(inputs)[-1])


@pytest.mark.parametrize("prefix", ["module.", "encoder.", "backbone.", "model."])
@pytest.mark.parametrize("wrapping", [None, "state_dict", "model", "model_state_dict"])
def test_prefixes_and_wrappings(tmp_path: Path, prefix: str, wrapping: str | None) -> None:
    source = {prefix + name: value for name, value in shaken(encoder("resnet18")).state_dict().items()}
    torch.save({wrapping: source, "epoch": 3} if wrapping else source, tmp_path / "checkpoint.pth")
    target = encoder("resnet18")
    assert not load_encoder(target, tmp_path / "checkpoint.pth").missing
    for name, value in target.state_dict().items():
        assert torch.equal(value, source[prefix + name]), name


def test_a_whole_trained_network_gives_its_encoder(tmp_path: Path) -> None:
    source, target = build(ModelConfig(arch="fpn", encoder="resnet18")), build(ModelConfig(encoder="resnet18"))
    save_file({name: value.clone() for name, value in source.state_dict().items()}, tmp_path / "model.safetensors")
    assert not load_encoder(target.encoder, tmp_path / "model.safetensors").missing
    for name, value in target.encoder.state_dict().items():
        assert torch.equal(value, source.encoder.state_dict()[name])


def test_a_file_for_another_network_is_refused_with_counts(tmp_path: Path) -> None:
    """A refused file must change nothing."""
    save_file(timm.create_model("mobilenetv3_small_050").state_dict(), tmp_path / "other.safetensors")
    target = encoder("tu-resnet10t")
    before = {name: value.clone() for name, value in target.state_dict().items()}
    total = len([name for name in before if not name.endswith("num_batches_tracked")])
    with pytest.raises(WeightsError, match=rf"other\.safetensors fits \d+ of the encoder's {total} tensors"):
        load_encoder(target, tmp_path / "other.safetensors")
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())


def test_the_same_names_with_other_shapes_are_refused(tmp_path: Path) -> None:
    save_file(timm.create_model("efficientnet_b1").state_dict(), tmp_path / "b1.safetensors")
    with pytest.raises(WeightsError, match="fits"):
        load_encoder(encoder("tu-efficientnet_b3"), tmp_path / "b1.safetensors")


class Spy:
    """Unpickling it would make a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_refused_and_not_run(tmp_path: Path, zipped: bool) -> None:
    proof, path = tmp_path / "the code ran", tmp_path / "weights.pth"
    torch.save({"conv.weight": torch.zeros(3), "extra": Spy(proof)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match="weights.pth"):
        read_tensors(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)
    assert proof.exists(), "the trap itself must work, else this test shows nothing"


def test_a_pickled_network_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Conv2d(3, 3, 1), tmp_path / "network.pth")
    with pytest.raises(WeightsError, match="state dict"):
        read_tensors(tmp_path / "network.pth")


@pytest.mark.parametrize("value", [{}, {"epoch": 3}, [1, 2], 5, None, torch.zeros(3), {"state_dict": {}}])
def test_files_without_a_table_of_tensors_are_refused(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match="odd.pth"):
        read_tensors(tmp_path / "odd.pth")


def test_an_ordered_dictionary_is_a_table(tmp_path: Path) -> None:
    torch.save(collections.OrderedDict(a=torch.ones(2), b=3), tmp_path / "plain.pth")
    assert list(read_tensors(tmp_path / "plain.pth")) == ["a"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.7, 0.99])
def test_truncated_files_are_refused(tmp_path: Path, suffix: str, share: float) -> None:
    path, tensors = tmp_path / f"weights{suffix}", {f"layer{number}": torch.rand(50) for number in range(20)}
    (save_file if suffix == ".safetensors" else torch.save)(tensors, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match=f"weights{suffix}"):
        read_tensors(path)


# Anything, anything behind a pickle's first bytes, and text such as an error page saved under the file's name.
PICKLED = st.binary(max_size=100).map(lambda rest: b"\x80\x02" + rest)
JUNK = st.binary(max_size=200) | PICKLED | st.text(max_size=60).map(str.encode)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@given(content=JUNK)
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_other_bytes_are_refused(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"junk{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="junk"):
        read_tensors(path)


@pytest.mark.parametrize("name", ["nowhere.safetensors", "nowhere.pth", "."])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="does not exist"):
        read_tensors(tmp_path / name)
