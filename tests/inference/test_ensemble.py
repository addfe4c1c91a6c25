"""A run folder made by hand: loading, choosing folds, everything that can be wrong with it, and the mean of its
networks.
"""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.config import Experiment, ScaleConfig
from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError
from hubmap_kit.inference.ensemble import Effort, Ensemble, fold_folders, load_ensemble, read_thresholds
from hubmap_kit.inference.on_device import CPU_PIXELS, Limits, is_out_of_memory, reduce_by_area
from hubmap_kit.models.build import build

CPU = torch.device("cpu")
SETTINGS = {
    "name": "by hand",
    "model": {
        "encoder": "tu-mobilenetv3_small_050",
        "encoder_weights": "a/file/that/is/gone.pth",
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "options": {"decoder_channels": [16, 8, 8, 8, 8]},
    },
    "inference": {"window": 64, "overlap": 0.25, "views": "none", "batch_size": 2},
}


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
    expected = np.mean([probability(network(fold, ensemble.experiment), whole) for fold in (0, 1, 10)], axis=0)[
        :50, :41
    ]
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
def test_a_plane_has_the_size_of_its_original_slide(
    run: Path, scale: dict, um_per_px: float, scaled: tuple[int, int]
) -> None:
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
    with pytest.raises(
        CheckpointError, match=r"fold0.model\.safetensors does not hold the network of its config\.yaml"
    ):
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
    for override in (
        "model.arch=fpn",
        "scale.reduce=4",
        "training.precision=fp16",
        "name=x",
        "inference=1",
        "inferenceX.a=64",
    ):
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
    "text",
    ["", "{", "[0.5]", "0.5", "null", '{"kidney": null}', '{"kidney": "high"}', '{"kidney": [0.5]}', b"\xff\xfe\x00"],
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


# What follows needs no trained network: one that gives the first channel back shows what is done with it.


class FirstChannel(nn.Module):
    """The logit of the first channel's share of 255, and the shapes that it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.shapes.append(tuple(inputs.shape))
        return torch.logit(inputs[:, :1], eps=1e-6)


def simple(*networks: nn.Module, mean: float = 0.0, **inference: object) -> Ensemble:
    settings = {
        "model": {"mean": [mean] * 3, "std": [1.0] * 3},
        "inference": {
            "window": 64,
            "overlap": 0.25,
            "views": "none",
            "batch_size": 4,
            "skip_background": False,
            **inference,
        },
    }
    return Ensemble(experiment.parse(settings, "test"), list(networks or [FirstChannel()]), {}, CPU)


def test_efforts_choose_views_folds_overlap_and_scale() -> None:
    networks = [FirstChannel() for _ in range(3)]
    ensemble, slide = simple(*networks, views="d4", overlap=0.5), image(128, 192)
    assert ensemble.full_effort == Effort(0.5, "d4", 3)
    np.testing.assert_allclose(ensemble.plane(slide), slide[..., 0] / 255, atol=1e-5)
    full = [sum(shape[0] for shape in each.shapes) for each in networks]
    assert full == [8 * 3 * 5] * 3
    for each in networks:
        each.shapes.clear()
    plane = ensemble.plane(slide, Effort(0.0, "flips", 1, 2))
    assert [sum(shape[0] for shape in each.shapes) for each in networks] == [4 * 1 * 2, 0, 0] and plane.shape == (
        128,
        192,
    )
    expected = cv2.resize(slide, (96, 64), interpolation=cv2.INTER_AREA)[..., 0] / np.float32(255)
    np.testing.assert_allclose(plane, cv2.resize(expected, (192, 128), interpolation=cv2.INTER_LINEAR), atol=1e-5)


def test_a_reduced_slide_is_resampled_once() -> None:
    """From the original straight to the reduced scale, and the plane straight back."""
    ensemble, slide = simple(), image(120, 200)
    ensemble = Ensemble(
        ensemble.experiment.model_copy(update={"scale": ScaleConfig(reduce=2)}), ensemble.networks, {}, CPU
    )
    small = cv2.resize(slide, (50, 30), interpolation=cv2.INTER_AREA)[..., 0] / np.float32(255)
    found = ensemble.probability(slide, 0.4, Effort(0.25, "none", 1, 2))
    np.testing.assert_allclose(found, cv2.resize(small, (200, 120), interpolation=cv2.INTER_LINEAR), atol=1e-5)


def test_a_slide_on_a_read_only_map_is_predicted() -> None:
    slide = image(70, 90)
    slide.setflags(write=False)
    np.testing.assert_allclose(simple().plane(slide), slide[..., 0] / 255, atol=1e-5)


def test_background_is_not_predicted_and_its_plane_is_zero() -> None:
    slide = np.full((1500, 1500, 3), 245, np.uint8)
    slide[:300, :300] = (200, 120, 180)
    network = FirstChannel()
    plane = simple(network, skip_background=True).plane(slide)
    assert (plane[-300:, -300:] == 0).all() and np.allclose(plane[:300, :300], 200 / 255, atol=1e-4)
    some = sum(shape[0] for shape in network.shapes)
    network.shapes.clear()
    whole = simple(network).plane(slide)
    assert np.allclose(whole, slide[..., 0] / 255, atol=1e-4) and some < 0.8 * sum(shape[0] for shape in network.shapes)


def test_slides_that_fit_are_predicted_in_one_piece() -> None:
    network = FirstChannel()
    ensemble = simple(network, whole_slide=150, views="d4")
    for shape in [(150, 90), (33, 150), (20, 20)]:
        slide = image(*shape)
        np.testing.assert_allclose(ensemble.plane(slide), slide[..., 0] / 255, atol=1e-5)
    assert {shape[2:] for shape in network.shapes} == {(160, 96), (96, 160), (64, 160), (160, 64), (32, 32)}
    network.shapes.clear()
    ensemble.plane(image(151, 64))
    assert {shape[2:] for shape in network.shapes} == {(64, 64)}


def test_a_network_of_fixed_size_falls_back_to_windows_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    class Fixed(FirstChannel):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            assert inputs.shape[2:] == (64, 64), "this network takes 64 x 64 px"
            return super().forward(inputs)

    ensemble = simple(Fixed(), whole_slide=500)
    for shape in [(100, 90), (150, 200)]:
        slide = image(*shape)
        np.testing.assert_allclose(ensemble.plane(slide), slide[..., 0] / 255, atol=1e-5)
    assert caplog.text.count("cannot be predicted in one piece") == 1


class Hungry(FirstChannel):
    """A network that runs out of memory above some number of pixels: torch's error for a GPU, or a real one of the
    CPU's allocator.
    """

    def __init__(self, most: int, real: bool = False) -> None:
        super().__init__()
        self.most, self.real = most, real

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        logits = super().forward(inputs)
        if inputs[:, 0].numel() > self.most:
            if self.real:
                torch.empty(2**50)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return logits


@pytest.mark.parametrize("real", [False, True], ids=["GPU's error", "CPU's allocator"])
@pytest.mark.parametrize("views", ["none", "d4"])
def test_batches_that_do_not_fit_are_halved_once_and_for_all(
    caplog: pytest.LogCaptureFixture, real: bool, views: str
) -> None:
    network = Hungry(3 * 64 * 64, real)
    ensemble, slide = simple(network, batch_size=8, views=views), image(150, 203)
    for _ in range(2):
        np.testing.assert_allclose(ensemble.plane(slide), slide[..., 0] / 255, atol=1e-5)
    assert [shape[0] for shape in network.shapes[:3]] == [8, 4, 2] and max(
        shape[0] for shape in network.shapes[2:]
    ) == 2
    assert caplog.text.count("memory is short") == 2 and "from now on 2 windows" in caplog.text


def test_a_window_that_does_not_fit_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    ensemble = simple(Hungry(100))
    with pytest.raises(
        HubmapError, match=r"a window of 64 x 64 px does not fit into the memory of cpu; set inference.window smaller"
    ):
        ensemble.plane(image(150, 203))


def test_a_whole_slide_that_does_not_fit_is_predicted_in_windows(caplog: pytest.LogCaptureFixture) -> None:
    network = Hungry(128 * 128)
    ensemble = simple(network, whole_slide=500)
    for shape in [(150, 203), (150, 250), (128, 100)]:
        slide = image(*shape)
        np.testing.assert_allclose(ensemble.plane(slide), slide[..., 0] / 255, atol=1e-5)
    assert network.shapes[0][2:] == (160, 224) and network.shapes[-1][2:] == (128, 128) and ensemble.limits.windows == 4
    assert {shape[2:] for shape in network.shapes[1:-1]} == {(64, 64)}, "a larger slide is not tried again"


def test_other_errors_of_a_network_are_not_taken_for_short_memory() -> None:
    class Broken(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        simple(Broken()).plane(image(70, 70))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(
    ("window", "batch_size", "windows"), [(512, 8, 1), (256, 8, 4), (256, 2, 2), (64, 8, 8), (1024, 4, 1)]
)
def test_a_cpu_takes_no_more_pixels_at_once_than_it_computes_at_full_speed(
    window: int, batch_size: int, windows: int
) -> None:
    config = simple(window=window, batch_size=batch_size, whole_slide=7).experiment.inference
    assert Limits.at_first(config, CPU) == Limits(windows, 7) and windows * window**2 <= max(CPU_PIXELS, window**2)
    assert Limits.at_first(config, torch.device("cuda")) == Limits(batch_size, 7)


def test_nan_is_an_error_and_no_empty_mask() -> None:
    class Diverged(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return inputs[:, :1] * float("nan")

    with pytest.raises(CheckpointError, match="gives NaN instead of probabilities"):
        simple(Diverged()).plane(image(150, 203))


def test_half_precision_that_overflows_is_repeated_in_float32(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    class Overflows(FirstChannel):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return super().forward(inputs) * (float("nan") if torch.is_autocast_enabled("cpu") else 1)

    slide = image(150, 203)
    np.testing.assert_allclose(simple(Overflows(), precision="bf16").plane(slide), slide[..., 0] / 255, atol=1e-5)
    assert "again in float32" in caplog.text
    caplog.clear()
    np.testing.assert_allclose(simple(precision="bf16").plane(slide), slide[..., 0] / 255, atol=1e-2)
    assert "again in float32" not in caplog.text


def test_fp16_is_refused_on_a_cpu() -> None:
    with pytest.raises(ConfigError, match=r"inference\.precision is fp16 on a CPU"):
        simple(precision="fp16").plane(image(64, 64))


def test_time_in_the_network_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that moves only inside the network: every pass of every view and fold counts, and nothing else."""
    now = [0.0]
    monkeypatch.setattr("hubmap_kit.inference.on_device.time.perf_counter", lambda: now[0])

    class Slow(FirstChannel):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            now[0] += 1
            return super().forward(inputs)

    ensemble = simple(Slow(), Slow(), views="flips", batch_size=1)
    assert ensemble.seconds_in_network == 0
    ensemble.plane(image(64, 100))
    assert ensemble.seconds_in_network == 2 * 4 * 2
    ensemble.plane(image(64, 64))
    assert ensemble.seconds_in_network == 2 * 4 * 3


@pytest.mark.parametrize(
    ("shape", "factors"), [((64, 96), (2, 2)), ((120, 30), (4, 2)), ((9, 15), (3, 5)), ((50, 40), (1, 1))]
)
def test_area_averages_on_the_device_are_those_of_opencv(shape: tuple[int, int], factors: tuple[int, int]) -> None:
    slide, small = image(*shape), (shape[0] // factors[0], shape[1] // factors[1])
    found = reduce_by_area(torch.from_numpy(slide), small).numpy().astype(int)
    expected = cv2.resize(slide, small[::-1], interpolation=cv2.INTER_AREA).astype(int)
    assert found.shape == (*small, 3) and np.abs(found - expected).max() <= 1
    blocks = slide.reshape(small[0], factors[0], small[1], factors[1], 3).mean(axis=(1, 3))
    assert np.abs(found - blocks).max() <= 0.5
    with pytest.raises(ValueError, match="no multiple"):
        reduce_by_area(torch.from_numpy(slide), (shape[0] - 1, small[1]))


def test_a_loaded_run_is_tuned_once_and_keeps_its_probabilities(run: Path) -> None:
    slide = image(100, 130)
    (run / "speed.json").unlink(missing_ok=True)
    plain = load_ensemble(run, CPU, overrides=["inference.tune_speed=false"])
    expected = plain.plane(slide)
    assert not (run / "speed.json").exists() and any(
        isinstance(module, nn.BatchNorm2d) for module in plain.networks[0].modules()
    )
    tuned = load_ensemble(run, CPU)
    np.testing.assert_allclose(tuned.plane(slide), expected, atol=1e-5)
    assert len(json.loads((run / "speed.json").read_text())) == 1
    again = load_ensemble(run, CPU)
    np.testing.assert_array_equal(again.plane(slide), tuned.plane(slide))


def test_an_ensemble_without_a_run_measures_nothing(finished: Path) -> None:
    """Validation during a training builds one for every epoch."""
    loaded = load_ensemble(finished, CPU, folds=[0])
    plain = Ensemble(loaded.experiment, loaded.networks, {}, CPU)
    plain.plane(image(64, 64))
    assert any(isinstance(module, nn.BatchNorm2d) for module in plain.networks[0].modules())
