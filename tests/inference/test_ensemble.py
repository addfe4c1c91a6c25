"""A run folder made by hand: loading, choosing folds, everything that can be wrong with it, and the mean of its networks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError
from hubmap_kit.inference.ensemble import Ensemble, fold_folders, load_ensemble, read_thresholds
from hubmap_kit.models.build import build

CPU = torch.device("cpu")
SETTINGS = {
    "name": "by hand",
    "model": {
        "encoder": "tu-mobilenetv3_small_050", "encoder_weights": "a/file/that/is/gone.pth", "mean": [0.5] * 3, "std": [0.25] * 3,
        "options": {"decoder_channels": [16, 8, 8, 8, 8]},
    },
    "inference": {"window": 64, "overlap": 0.25, "views": "none", "batch_size": 2},
}  # fmt: skip


def network(seed: int, settings: Experiment) -> nn.Module:
    torch.manual_seed(seed)
    return build(settings.model, pretrained=False).eval()


def save(network: nn.Module, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file({name: value.clone() for name, value in network.state_dict().items()}, path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "by_hand"
    run.mkdir()
    settings = experiment.parse(SETTINGS, "test")
    (run / "config.yaml").write_text(yaml.safe_dump(experiment.dump(settings)))
    for fold in (0, 1, 10):
        save(network(fold, settings), run / f"fold{fold}" / "model.safetensors")
    (run / "thresholds.json").write_text(json.dumps({"kidney": 0.4, "lung": 0.105}))
    return run


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def image(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3), np.uint8)


@torch.inference_mode()
def probability(network: nn.Module, tile: np.ndarray) -> np.ndarray:
    inputs = torch.from_numpy(((tile / 255 - 0.5) / 0.25).transpose(2, 0, 1)[None].astype(np.float32))
    return torch.sigmoid(network(inputs))[0, 0].numpy()


def test_a_run_folder_is_all_it_takes(finished: Path) -> None:
    ensemble = load_ensemble(finished, CPU)
    assert isinstance(ensemble, Ensemble) and len(ensemble.networks) == 3
    assert ensemble.thresholds == {"kidney": 0.4, "lung": 0.105}
    assert ensemble.experiment == experiment.parse(SETTINGS, "test")
    assert not any(each.training for each in ensemble.networks)
    for fold, each in zip((0, 1, 10), ensemble.networks, strict=True):
        expected = network(fold, ensemble.experiment).state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in each.state_dict().items())


def test_folds_are_found_in_the_order_of_their_numbers(run: Path) -> None:
    (run / "fold2").mkdir()  # begun, without weights
    (run / "folds.csv").write_text("id,fold\n")
    (run / "fold_old").mkdir()
    save(nn.Linear(1, 1), run / "fold_old" / "model.safetensors")
    assert list(fold_folders(run)) == [0, 1, 10] and fold_folders(run)[10] == run / "fold10"


@pytest.mark.parametrize("folds", [[1], [10, 0]])
def test_folds_can_be_chosen(finished: Path, folds: list[int]) -> None:
    ensemble = load_ensemble(finished, CPU, folds=folds)
    assert len(ensemble.networks) == len(folds)
    tile = image(64, 64)
    expected = np.mean([probability(network(fold, ensemble.experiment), tile) for fold in folds], axis=0)
    np.testing.assert_allclose(ensemble.plane(tile), expected, atol=1e-5)


def test_folds_that_are_not_there_are_named(finished: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds the folds \[0, 1, 10\], not \[3, 4\]"):
        load_ensemble(finished, CPU, folds=[0, 3, 4])


def test_a_slide_smaller_than_the_window_by_hand(finished: Path) -> None:
    """Mirrored up to the window, normalised, one pass of each network, mean of the probabilities, cut back."""
    ensemble, slide = load_ensemble(finished, CPU), image(50, 41)
    whole = np.pad(slide, [(0, 14), (0, 23), (0, 0)], mode="symmetric")
    expected = np.mean([probability(network(fold, ensemble.experiment), whole) for fold in (0, 1, 10)], axis=0)[:50, :41]
    plane = ensemble.plane(slide)
    assert plane.shape == (50, 41) and plane.dtype == np.float32 and expected.std() > 1e-3
    np.testing.assert_allclose(plane, expected, atol=1e-5)


def test_views_are_those_of_the_settings(finished: Path) -> None:
    tile = image(64, 64)
    ensemble = load_ensemble(finished, CPU, folds=[0], overrides=["inference.views=flips"])
    alone = network(0, ensemble.experiment)
    flips = [(slice(None, None, down), slice(None, None, right)) for down in (1, -1) for right in (1, -1)]
    expected = np.mean([probability(alone, tile[flip])[flip] for flip in flips], axis=0)
    np.testing.assert_allclose(ensemble.plane(tile), expected, atol=1e-5)
    assert np.abs(expected - probability(alone, tile)).max() > 1e-4


def test_two_runs_over_one_slide_are_the_same(finished: Path) -> None:
    ensemble, slide = load_ensemble(finished, CPU), image(100, 130)
    np.testing.assert_array_equal(ensemble.plane(slide), ensemble.plane(slide))


@pytest.mark.parametrize(
    ("scale", "um_per_px", "scaled"),
    [({"reduce": 2}, 0.4, (60, 41)), ({"policy": "physical", "um_per_px": 0.8}, 1.6, (240, 164))],
)
def test_a_plane_has_the_size_of_its_original_slide(run: Path, scale: dict, um_per_px: float, scaled: tuple[int, int]) -> None:
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS | {"scale": scale}))
    ensemble, slide = load_ensemble(run, CPU, folds=[0]), np.full((120, 82, 3), (200, 120, 180), np.uint8)
    plane = ensemble.probability(slide, um_per_px)
    assert plane.shape == (120, 82) and plane.dtype == np.float32 and 0 <= plane.min() <= plane.max() <= 1
    # A plain slide stays plain at any scale, so only the network's own size decides about its plane.
    inner = ensemble.plane(np.full((*scaled, 3), (200, 120, 180), np.uint8))
    assert plane.mean() == pytest.approx(inner.mean(), abs=5e-3)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"not a run folder: config\.yaml is missing"):
            load_ensemble(folder, CPU)


def test_a_run_without_a_trained_fold_is_refused(run: Path) -> None:
    for fold in (0, 1, 10):
        (run / f"fold{fold}" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no trained fold"):
        load_ensemble(run, CPU)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_damaged_weights_are_refused(run: Path, share: float) -> None:
    path = run / "fold1" / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(CheckpointError, match=r"fold1.model\.safetensors does not hold the network"):
        load_ensemble(run, CPU)
    assert len(load_ensemble(run, CPU, folds=[0, 10]).networks) == 2


@pytest.mark.parametrize(
    "model",
    [
        {"encoder": "tu-resnet10t"},
        {"arch": "fpn", "encoder": "tu-mobilenetv3_small_050"},
        {"encoder": "tu-mobilenetv3_small_050"},
    ],
    ids=["encoder", "decoder", "widths"],
)
def test_weights_of_another_network_are_refused(run: Path, model: dict) -> None:
    save(network(0, experiment.parse({"model": model}, "test")), run / "fold0" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"fold0.model\.safetensors does not hold the network of its config\.yaml"):
        load_ensemble(run, CPU)


def test_weights_with_a_tensor_too_few_are_refused(run: Path) -> None:
    """Loaded all the same, that tensor would stay random."""
    values = dict(network(0, experiment.parse(SETTINGS, "test")).state_dict())
    values.pop("segmentation_head.0.weight")
    save_file({name: value.clone() for name, value in values.items()}, run / "fold0" / "model.safetensors")
    with pytest.raises(CheckpointError, match="fold0"):
        load_ensemble(run, CPU)


def test_inference_settings_can_be_overridden_and_no_others(finished: Path) -> None:
    wanted = ["inference.window=128", "inference.thresholds.lung=0.2"]
    found = load_ensemble(finished, CPU, folds=[0], overrides=wanted).experiment.inference
    assert found.window == 128 and found.thresholds == {"lung": 0.2} and found.overlap == 0.25
    for override in ("model.arch=fpn", "scale.reduce=4", "training.precision=fp16", "name=x", "inference=1", "inferenceX.a=64"):
        with pytest.raises(HubmapError, match=r"only inference\.\*"):
            load_ensemble(finished, CPU, overrides=[override])
    for override in ("inference.windw=64", "inference.window=65", "inference.window", "inference.thresholds.liver=0.5"):
        with pytest.raises(ConfigError):
            load_ensemble(finished, CPU, overrides=[override])


@pytest.mark.parametrize("text", ["name: [", "- a list", "modell: {}", "model: {encoder: 3}"])
def test_a_damaged_config_is_one_sentence(run: Path, text: str) -> None:
    (run / "config.yaml").write_text(text)
    with pytest.raises(HubmapError, match=r"config\.yaml"):
        load_ensemble(run, CPU)


def test_missing_thresholds_are_no_fault(run: Path) -> None:
    (run / "thresholds.json").unlink()
    assert read_thresholds(run) == {} and load_ensemble(run, CPU, folds=[0]).thresholds == {}


@pytest.mark.parametrize(
    "text", ["", "{", "[0.5]", "0.5", "null", '{"kidney": null}', '{"kidney": "high"}', '{"kidney": [0.5]}', b"\xff\xfe\x00"]
)
def test_damaged_thresholds_are_refused(run: Path, text: str | bytes) -> None:
    (run / "thresholds.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(CheckpointError, match=r"thresholds\.json"):
        load_ensemble(run, CPU, folds=[0])


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-0.2", "0", "1.5", "40"])
def test_thresholds_that_are_no_probabilities_are_refused(run: Path, value: str) -> None:
    """With NaN or 40 every mask of that organ would silently be empty, with 0 or less it would be full."""
    (run / "thresholds.json").write_text(f'{{"kidney": {value}}}')
    with pytest.raises(CheckpointError, match=r"thresholds\.json"):
        load_ensemble(run, CPU, folds=[0])
