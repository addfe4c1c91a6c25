"""Packed encoder weights: every kind of encoder, resampled positions, cards, and the real clients of the hub against a
stand-in.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shaken import encoder, shaken
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.config import ModelConfig
from hubmap_kit.errors import HubmapError, WeightsError
from hubmap_kit.jobs.models import pack, packed_lines
from hubmap_kit.models import pretrained
from hubmap_kit.models.build import build
from hubmap_kit.models.packing import Given, pack_file
from hubmap_kit.models.pretrained import load_encoder, resampled

GIVEN = Given((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


def classifier_file(folder: Path, name: str, **options: object) -> tuple[nn.Module, Path]:
    """A whole classifier of timm with shaken weights, and a file of them."""
    classifier, path = shaken(timm.create_model(name, **options)), folder / "classifier.safetensors"
    save_file({name: value.clone() for name, value in classifier.state_dict().items()}, path)  # CoaT's share memory
    return classifier, path


@pytest.mark.parametrize(
    ("arch", "name"),
    [
        ("segmenter", "vit_tiny_patch16_224"),
        ("unet", "vit_tiny_patch16_224"),
        ("daformer", "coat_lite_tiny"),
        ("upernet", "swin_tiny_patch4_window7_224"),
        ("unet", "pvt_v2_b0"),
        ("unet", "maxvit_pico_rw_256"),
    ],
)
def test_transformers_packed_from_classifiers_fill_their_encoders(tmp_path: Path, arch: str, name: str) -> None:
    """Every tensor of timm's network in the encoder is one of the file, to the bit; the oracle is the classifier's own
    table.
    """
    classifier, path = classifier_file(tmp_path, name)
    packed = pack_file(f"tu-{name}", path, GIVEN, tmp_path / "packed")
    config = ModelConfig(arch=arch, encoder=f"tu-{name}", mean=GIVEN.mean, std=GIVEN.std)
    network = build(config, pretrained=False)
    report = load_encoder(network.encoder, tmp_path / "packed", config)
    assert not report.missing
    assert {name for name, _ in network.encoder.model.named_parameters()} <= {
        name.removeprefix("model.") for name in report.loaded
    }
    theirs = {fingerprint(value) for value in classifier.state_dict().values()}
    for name_, value in network.encoder.model.named_parameters():
        assert fingerprint(value) in theirs, name_
    assert set(load_file(packed.weights)) <= set(classifier.state_dict())


def fingerprint(value: torch.Tensor) -> tuple[object, ...]:
    return tuple(value.shape), float(value.detach().double().sum()), float(value.detach().double().square().sum())


def test_a_vit_of_another_size_is_resampled_as_timm_does_it(tmp_path: Path) -> None:
    from timm.models.vision_transformer import checkpoint_filter_fn

    classifier, path = classifier_file(tmp_path, "vit_tiny_patch16_224", img_size=320)
    network = build(ModelConfig(arch="segmenter", encoder="tu-vit_tiny_patch16_224"), pretrained=False)
    assert not load_encoder(network.encoder, path).missing
    expected = checkpoint_filter_fn(classifier.state_dict(), timm.create_model("vit_tiny_patch16_224"))
    torch.testing.assert_close(network.encoder.model.pos_embed.data, expected["pos_embed"])


def test_a_swin_with_another_window_is_resampled_as_timm_does_it(tmp_path: Path) -> None:
    from timm.models.swin_transformer import checkpoint_filter_fn

    small = {"embed_dim": 24, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 6)}
    own = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **small)
    classifier, path = classifier_file(tmp_path, "swin_tiny_patch4_window7_224", img_size=320, window_size=10, **small)
    assert not load_encoder(own, path).missing
    expected = checkpoint_filter_fn(
        classifier.state_dict(), timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **small)
    )
    for name, value in own.named_parameters():
        torch.testing.assert_close(value.data, expected[name], msg=name)


@given(st.integers(2, 24), st.integers(2, 24), st.integers(0, 1))
@settings(deadline=None, max_examples=40)
def test_positions_keep_their_prefix_and_their_level(old: int, new: int, prefixes: int) -> None:
    """A constant embedding stays that constant at any size, and the class token is not touched."""
    value = torch.full((1, prefixes + old * old, 4), 0.5)
    value[:, :prefixes] = 7.0
    found = resampled("pos_embed", value, torch.empty(1, prefixes + new * new, 4))
    assert found.shape == (1, prefixes + new * new, 4)
    torch.testing.assert_close(found[:, prefixes:], torch.full((1, new * new, 4), 0.5))
    assert torch.equal(found[:, :prefixes], value[:, :prefixes])


def test_most_tensors_are_not_enough_where_most_numbers_are_missing(tmp_path: Path) -> None:
    source = {
        name: value
        for name, value in shaken(encoder("resnet18")).state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    largest = sorted(source, key=lambda name: source[name].numel())[-4:]
    kept = {name: value for name, value in source.items() if name not in largest}
    assert len(kept) > 0.95 * len(source)
    save_file(kept, tmp_path / "hollow.safetensors")
    with pytest.raises(WeightsError, match=r"hollow\.safetensors fits"):
        load_encoder(encoder("resnet18"), tmp_path / "hollow.safetensors")


def test_what_a_file_lacks_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = {name: value for name, value in shaken(encoder("resnet18")).state_dict().items() if name != "bn1.weight"}
    save_file(source, tmp_path / "nearly.safetensors")
    assert load_encoder(encoder("resnet18"), tmp_path / "nearly.safetensors").missing == ("bn1.weight",)
    assert "start at random: bn1.weight" in caplog.text


def test_a_whole_run_gives_an_encoder_of_the_kits_own(tmp_path: Path) -> None:
    config = ModelConfig(arch="erfnet", encoder="erfnet", mean=GIVEN.mean, std=GIVEN.std)
    run, target = build(config, pretrained=False), build(config, pretrained=False)
    shaken(run)
    save_file({name: value.clone() for name, value in run.state_dict().items()}, tmp_path / "model.safetensors")
    pack_file("erfnet", tmp_path / "model.safetensors", GIVEN, tmp_path / "packed")
    assert not load_encoder(target.encoder, tmp_path / "packed", config).missing
    for name, value in target.encoder.state_dict().items():
        assert torch.equal(value, run.encoder.state_dict()[name]) or name.endswith("num_batches_tracked"), name


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a packed ResNet18 at random."""
    folder = tmp_path_factory.mktemp("packed")
    save_file(
        {name: value.clone() for name, value in encoder("resnet18").state_dict().items()}, folder / "file.safetensors"
    )
    found = pack(
        ["resnet18"], folder / "out", folder / "file.safetensors", "0.5,0.5,0.5", "0.25,0.25,0.25", "mit", "a friend"
    )
    assert "licence mit" in packed_lines(found)
    return folder / "out"


def fitting(**more: object) -> ModelConfig:
    return ModelConfig(**{"encoder": "resnet18", "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)} | more)  # type: ignore[arg-type]


def test_a_card_says_what_it_was_told(packed: Path) -> None:
    card = pretrained.read(packed / "resnet18.safetensors")
    assert card is not None
    assert (card.encoder, card.mean, card.std, card.source, card.licence) == (
        "resnet18",
        (0.5,) * 3,
        (0.25,) * 3,
        "a friend",
        "mit",
    )
    assert card.sha256 == hashlib.sha256((packed / "resnet18.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize("path", [".", "resnet18.safetensors"])
def test_other_input_statistics_are_refused_with_words_that_mend_it(packed: Path, path: str) -> None:
    wrong = fitting(mean=(0.485, 0.456, 0.406))
    with pytest.raises(WeightsError, match=r"expects inputs of mean \[0\.5,0\.5,0\.5\]") as caught:
        load_encoder(encoder("resnet18"), packed / path, wrong)
    words = [word for word in str(caught.value).split() if word.startswith("model.")]
    mended = experiment.load("baseline", ["model.encoder=resnet18", *words]).model
    load_encoder(encoder("resnet18"), packed / path, mended)


def test_a_changed_file_is_refused_by_its_card(packed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    save_file(
        {name: value.clone() for name, value in encoder("resnet18").state_dict().items()},
        folder / "resnet18.safetensors",
    )
    with pytest.raises(WeightsError, match="other sha256"):
        load_encoder(encoder("resnet18"), folder, fitting())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "\xff", '{"encoder": "x", "mean": [1], "std": [1]}', "null"])
def test_a_damaged_card_is_named(packed: Path, tmp_path: Path, text: str) -> None:
    folder = Path(shutil.copytree(packed, tmp_path / "copy"))
    (folder / "resnet18.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(WeightsError, match=r"resnet18\.json is"):
        load_encoder(encoder("resnet18"), folder, fitting())


def test_a_folder_without_the_encoder_says_what_it_holds(packed: Path) -> None:
    with pytest.raises(WeightsError, match=r"holds resnet18\.safetensors where mit_b0\.safetensors is needed"):
        load_encoder(encoder("mit_b0"), packed, ModelConfig(encoder="mit_b0"))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"names": ["resnet81"]}, "'resnet81' is no encoder .* did you mean"),
        ({"names": []}, "no encoder was named"),
        ({"names": ["erfnet"]}, "nobody publishes"),
        ({"names": ["resnet18"], "mean": "0.5,0.5,0.5"}, "--mean goes with --from"),
        ({"names": ["resnet18"], "file": Path("x")}, "--mean is missing"),
        ({"names": ["resnet18"], "file": Path("x"), "mean": "1,2"}, "--mean is '1,2'"),
        ({"names": ["resnet18"], "file": Path("x"), "mean": "0,0,0", "std": "a,b,c"}, "--std is 'a,b,c'"),
        ({"names": ["resnet18", "net-unet-b0"], "file": Path("x")}, "2 encoders were named"),
        ({"names": ["resnet18"], "file": Path("x"), "mean": "0,0,0", "std": "1,1,1"}, "x does not exist"),
    ],
)
def test_wrong_words_of_pack(tmp_path: Path, words: dict[str, object], match: str) -> None:
    with pytest.raises(HubmapError, match=match):
        pack(out=tmp_path / "out", **words)  # type: ignore[arg-type]
    assert not list((tmp_path / "out").glob("*"))


HUB = """
import hashlib, sys, threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

class Hub(SimpleHTTPRequestHandler):
    def log_message(self, *words): pass
    def translate_path(self, path):  # /OWNER/REPO/resolve/REVISION/FILE
        parts = path.strip("/").split("/")
        return str(Path(sys.argv[2], parts[1], parts[-1]))
    def end_headers(self):
        self.send_header("ETag", '"' + hashlib.sha1(self.path.encode()).hexdigest() + '"')
        self.send_header("X-Repo-Commit", "1" * 40)
        super().end_headers()

server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Hub)
threading.Thread(target=server.serve_forever, daemon=True).start()
from hubmap_kit.errors import WeightsError
from hubmap_kit.jobs.models import pack
pack(["tu-test_resnet", "resnet18"], Path("out"))
server.shutdown()
server.server_close()
for name in ("net-unet-b0", "mit_b0"):
    try: pack([name], Path("out"))
    except WeightsError as error: print(error)
"""


def test_the_real_clients_pack_from_a_hub_and_without_one_end_in_a_sentence(tmp_path: Path) -> None:
    """A stand-in for the hub holds two networks at random and is then closed: the clients of timm and smp meet a real
    server, and a refusal.
    """
    networks = {
        "test_resnet.r160_in1k": shaken(timm.create_model("test_resnet")),
        "resnet18.imagenet": shaken(encoder("resnet18")),
    }
    for repository, network in networks.items():
        (tmp_path / "hub" / repository).mkdir(parents=True)
        save_file(
            {name: value.clone() for name, value in network.state_dict().items()},
            tmp_path / "hub" / repository / "model.safetensors",
        )
    inputs = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "input_space": "RGB", "input_range": [0, 1]}
    (tmp_path / "hub" / "resnet18.imagenet" / "config.json").write_text(json.dumps(inputs))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = str(taken.getsockname()[1])
    more = {
        "HF_ENDPOINT": f"http://127.0.0.1:{port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "*",
    }
    command = [sys.executable, "-c", HUB, port, str(tmp_path / "hub")]
    done = subprocess.run(
        command, cwd=tmp_path, env=os.environ | more, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    for name, sentence in zip(("tu-efficientnet_b0", "mit_b0"), done.stdout.splitlines(), strict=True):
        assert f"weights of {name} could not be downloaded" in sentence
        assert "--from" in sentence
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}{end}" for name in ("tu-test_resnet", "resnet18") for end in (".safetensors", ".json")
    }
    card = pretrained.read(tmp_path / "out" / "resnet18.safetensors")
    assert card is not None
    assert (card.mean, card.std, card.tag, card.source) == (
        (0.1, 0.2, 0.3),
        (0.4, 0.5, 0.6),
        "imagenet",
        "smp-hub/resnet18.imagenet",
    )
    config = timm.get_pretrained_cfg("test_resnet")
    card = pretrained.read(tmp_path / "out" / "tu-test_resnet.safetensors")
    assert card is not None
    assert (card.mean, card.std, card.tag, card.licence) == (
        tuple(config.mean),
        tuple(config.std),
        config.tag,
        config.license,
    )
    for name, network in zip(("tu-test_resnet", "resnet18"), networks.values(), strict=True):
        for key, value in load_file(tmp_path / "out" / f"{name}.safetensors").items():
            assert torch.equal(value, network.state_dict()[key]), key


def test_a_packed_file_can_be_staged_and_keeps_its_bytes(packed: Path, tmp_path: Path) -> None:
    from hubmap_kit.publish.staging import stage_pretrained

    staged = stage_pretrained([packed / "resnet18.safetensors"], tmp_path / "staged")
    assert (staged / "resnet18.safetensors").read_bytes() == (packed / "resnet18.safetensors").read_bytes()
