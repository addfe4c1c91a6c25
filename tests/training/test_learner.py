"""The learner: classes and heads, batches that memory does not hold, averages of weights, steps that are counted."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import warm
from safetensors.torch import load_file
from tiny import TINY, overrides
from torch import nn
from torch.nn import functional as F

from hubmap_kit import experiment
from hubmap_kit.competition.organs import FACTS
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import ConfigError, HubmapError
from hubmap_kit.inference.on_device import unit_logits
from hubmap_kit.jobs.preflight import check_experiment
from hubmap_kit.jobs.train import auto_batched
from hubmap_kit.models.build import build
from hubmap_kit.models.network import Outputs
from hubmap_kit.tiles.store import TileStore, open_or_build
from hubmap_kit.training import learner as learner_module
from hubmap_kit.training.dataset import TileDataset
from hubmap_kit.training.fold import FoldTask, FoldTrainer
from hubmap_kit.training.learner import Batch, Learner
from hubmap_kit.training.losses import About, Objective, Slides, build_loss
from hubmap_kit.training.memory import largest_batch, with_largest_batch
from hubmap_kit.training.world import World

CPU = torch.device("cpu")


def settings_of(*changes: str) -> Experiment:
    return experiment.load("baseline", [*TINY, "training.ema_decay=0", *changes])


@pytest.fixture(scope="module")
def store(sample_data: Path, tmp_path_factory: pytest.TempPathFactory) -> TileStore:
    settings = settings_of()
    return open_or_build(
        tmp_path_factory.mktemp("stores"), read_train(sample_data / "train.csv"), settings.scale, settings.tiles
    )


def trained(settings: Experiment, store: TileStore, folder: Path) -> FoldTrainer:
    trainer = FoldTrainer(settings, FoldTask(0, store, range(7), range(7, 10), folder, CPU))
    trainer.run()
    return trainer


class Greedy(nn.Module):
    """A network of one weight that memory is too short for beyond `most` tiles at once."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.encoder, self.head, self.most, self.passes = nn.Identity(), nn.Conv2d(3, 1, 1), most, []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.passes.append(len(images))
        if len(images) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return self.head(images)


def batch_of(size: int, side: int = 16) -> Batch:
    random = np.random.default_rng(0)
    tiles, masks = (
        random.integers(256, size=(size, side, side, 3), dtype=np.uint8),
        random.integers(2, size=(size, side, side), dtype=np.uint8),
    )
    return Batch(0, torch.from_numpy(tiles), torch.from_numpy(masks))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_batch_that_is_too_large_is_halved_and_gives_the_same_step(
    accumulate: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    weights, losses = [], []
    for most in (100, 3):
        torch.manual_seed(0)
        network = Greedy(most)
        monkeypatch.setattr(learner_module, "build", lambda *_, made=network: made)
        learner = Learner(
            settings_of("training.loss=bce", f"training.accumulate={accumulate}"), 10, CPU, pretrained=False
        )
        learner.begin(0)
        for _ in range(2):
            losses.append(float(learner.learn([batch_of(8)] * accumulate, 0)))
        weights.append(network.head.weight.detach().clone())
    assert network.passes[0] == 8
    assert set(network.passes[-4 * accumulate :]) == {2}
    assert learner.parts == 4
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-4, atol=1e-6)
    said = [record.message for record in caplog.records if "MEMORY IS SHORT" in record.message]
    assert len(said) == 2
    assert f"2 tiles in one pass and {4 * accumulate} passes in a step" in said[1]
    again = Learner(settings_of("training.loss=bce"), 10, CPU, pretrained=False)
    again.load_state_dict(learner.state_dict())
    assert again.parts == 4


def test_a_smaller_last_batch_takes_fewer_passes_not_single_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    network = Greedy(2)
    monkeypatch.setattr(learner_module, "build", lambda *_: network)
    learner = Learner(settings_of("training.batch_size=8"), 10, CPU, pretrained=False)
    for size in (8, 4, 6, 3, 2):
        del network.passes[:]
        learner.learn([batch_of(size)], 0)
        passes = network.passes[-math.ceil(size / 2) :]  # those after the halving
        assert sum(passes) == size
        assert max(passes) == 2
        assert passes.count(1) == size % 2


def test_where_not_even_two_tiles_fit_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_module, "build", lambda *_: Greedy(1))
    learner = Learner(settings_of(), 10, CPU, pretrained=False)
    with pytest.raises(HubmapError, match="memory is short on cpu even for 2 tiles at once; set tiles.size smaller"):
        learner.learn([batch_of(8)], 0)


@pytest.mark.parametrize("most", [2, 3, 7, 8, 100, 255, 256, 1000])
def test_the_largest_batch_is_found(most: int) -> None:
    tried: list[int] = []
    found = largest_batch(settings_of(), CPU, 256, lambda size: tried.append(size) or size <= most)
    assert found <= min(most, 256)
    assert found >= 0.75 * min(most, 256) or most < 8
    assert max(tried) <= 256
    assert len(tried) < 16


def test_auto_batch_looks_with_real_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(learner_module, "build", lambda *_: Greedy(21))
    assert 14 <= largest_batch(settings_of(), CPU) <= 21
    monkeypatch.setattr(learner_module, "build", lambda *_: Greedy(1))
    with pytest.raises(HubmapError, match="not even 2 tiles of 64 px fit into the memory of cpu"):
        largest_batch(settings_of(), CPU)


def test_auto_batch_does_not_take_a_wrong_network_for_a_short_memory() -> None:
    with pytest.raises(ConfigError, match="model.arch is 'unett'.*did you mean 'unet'"):
        largest_batch(settings_of("model.arch=unett"), CPU)


def test_a_whole_fold_survives_a_card_that_is_too_small(
    store: TileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_of_memory(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if len(inputs[0]) > 2 and torch.is_grad_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    def limited(*arguments: object) -> nn.Module:
        network = build(*arguments)  # type: ignore[arg-type]
        network.register_forward_pre_hook(short_of_memory)
        return network

    monkeypatch.setattr(learner_module, "build", limited)
    trainer = trained(settings_of("training.batch_size=8"), store, tmp_path)
    assert [row["tiles_in_pass"] for row in trainer.state.timing] == [2, 2]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["parts"] == 4


def test_auto_batch_wants_a_card() -> None:
    with pytest.raises(HubmapError, match="there is no card; set training.batch_size by hand"):
        with_largest_batch(settings_of(), CPU)


def test_organs_are_learned_as_classes(store: TileStore, tmp_path: Path) -> None:
    settings = settings_of(
        "model.classes=organs",
        "training.loss=ce+dice",
        "training.epochs=1",
        "augment.mixing={cutmix: 0.5, copy_paste: 0.5}",
    )
    trainer = trained(settings, store, tmp_path)
    own = {int(FACTS[organ].index) for organ in store.slides["organ"]}
    seen = {int(value) for draw in range(64) for value in trainer.dataset[draw][1].unique()}
    assert seen <= {0} | own
    assert len(seen) > 3
    assert trainer.network.segmentation_head[0].out_channels == 6
    assert 0 <= trainer.state.history[-1]["dice"] <= 1


def test_a_mask_of_classes_is_the_organ_of_its_slide(store: TileStore) -> None:
    plain, named = (
        TileDataset(store, range(10), settings_of(f"model.classes={classes}", "augment.pipeline=none"))
        for classes in ("binary", "organs")
    )
    for draw in range(12):
        index = FACTS[store.slides["organ"][int(plain.places([draw])[0, 0])]].index
        assert torch.equal(plain[draw][1] * index, named[draw][1])


def test_the_organ_channel_is_the_softmax_of_organ_against_background() -> None:
    logits = torch.randn(2, 6, 5, 5)
    pair = torch.softmax(logits[:, [0, 3]], dim=1)[:, 1]
    torch.testing.assert_close(torch.sigmoid(unit_logits(logits, 3)), pair)
    torch.testing.assert_close(torch.sigmoid(unit_logits(logits)), 1 - torch.softmax(logits, dim=1)[:, 0])
    assert torch.equal(unit_logits(logits[:, :1]), logits[:, 0])


def test_losses_of_classes_are_those_of_torch_and_of_counting() -> None:
    logits, masks = torch.randn(3, 6, 8, 8) * 3, torch.randint(6, (3, 1, 8, 8))
    found = build_loss("ce", "organs")(logits, masks.float())
    assert float(found) == pytest.approx(float(F.cross_entropy(logits, masks[:, 0])), rel=1e-5)
    assert float(build_loss("bce", "organs")(logits, masks.float())) == pytest.approx(float(found), rel=1e-6)
    share, truth = torch.softmax(logits, 1), F.one_hot(masks[:, 0], 6).movedim(-1, 1)
    overlap = 2 * (share * truth).sum((0, 2, 3)) / (share.sum((0, 2, 3)) + truth.sum((0, 2, 3)))
    assert float(build_loss("dice", "organs")(logits, masks.float())) == pytest.approx(
        float(1 - overlap.mean()), rel=1e-4
    )


def test_mixup_has_no_classes() -> None:
    with pytest.raises(ConfigError, match="mixup, whose masks are shares of a unit, but model.classes is organs"):
        check_experiment(settings_of("model.classes=organs", "augment.mixing={mixup: 0.5}", "training.loss=ce"), CPU)


def test_what_the_heads_say_is_weighed(store: TileStore) -> None:
    settings = settings_of("model.auxiliary={fcn: 0.4, deep: 0.3, organ: 0.2, pixel_size: 0.1}", "training.loss=bce")
    objective, masks = Objective(settings), torch.randint(2, (4, 1, 16, 16)).float()
    about = Slides(store)([0, 3, 3, 9])
    assert about.log_um.tolist() == pytest.approx([np.log2(3.2)] * 4, abs=0.02)  # the physical scale of the experiment
    assert about.organ.tolist() == [FACTS[store.slides["organ"][row]].index - 1 for row in (0, 3, 3, 9)]
    logits, small, organ, size = torch.randn(4, 1, 16, 16), torch.randn(4, 1, 4, 4), torch.randn(4, 5), torch.randn(4)
    whole = objective(
        Outputs(logits, {"fcn": small, "deep": [small, logits], "organ": organ, "pixel_size": size}), masks, about
    )
    bce = F.binary_cross_entropy_with_logits
    large = F.interpolate(small, (16, 16), mode="bilinear", align_corners=False)
    expected = (
        bce(logits, masks)
        + 0.4 * bce(large, masks)
        + 0.3 * (bce(large, masks) + bce(logits, masks)) / 2
        + 0.2 * F.cross_entropy(organ, about.organ)
        + 0.1 * F.smooth_l1_loss(size, about.log_um)
    )
    assert float(whole) == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ValueError, match="needs to know the tiles' slides"):
        objective(Outputs(logits, {"organ": organ}), masks)


def test_every_head_learns_and_inference_does_not_see_it(store: TileStore, tmp_path: Path) -> None:
    settings = settings_of(
        "model.auxiliary={fcn: 0.4, deep: 0.3, organ: 0.2, pixel_size: 0.1}",
        "training.epochs=2",
        "training.accumulate=2",
    )
    torch.manual_seed(0)
    before = {
        name: value.clone() for name, value in Learner(settings, 1, CPU, pretrained=False).network.named_parameters()
    }
    trainer = trained(settings, store, tmp_path)
    after = dict(trainer.network.named_parameters())
    heads = [name for name in after if name.startswith("auxiliary")]
    assert len({name.split(".")[1] for name in heads}) == 4
    assert all(not torch.equal(before[name], after[name]) for name in heads if name.endswith("weight"))
    assert isinstance(trainer.network.eval()(torch.zeros(1, 3, 64, 64)), torch.Tensor)


def test_an_epoch_is_its_share_of_the_iterations(store: TileStore, tmp_path: Path) -> None:
    settings = settings_of(
        "training.iterations=10", "training.epochs=3", "training.accumulate=2", "training.batch_size=2"
    )
    trainer = trained(settings, store, tmp_path)
    assert len(trainer.dataset) == 4 * 2 * 2  # ten steps in three epochs are four in each
    assert trainer.learner.schedule.done == 12


def test_equal_averages_over_the_last_epochs_are_kept(store: TileStore, tmp_path: Path) -> None:
    """SWA and kept files must agree, because both average what was trained; one after each epoch, one from disk."""
    common = ("training.epochs=4", "training.lr=0.02", "training.schedule=constant", "training.monitor=loss")
    swa = trained(settings_of(*common, "training.swa=0.5"), store, tmp_path / "swa")
    kept = trained(settings_of(*common, "training.keep_last=2"), store, tmp_path / "kept")
    paths = kept.last.paths()
    assert [path.name for path in paths] == ["epoch-0003.safetensors", "epoch-0004.safetensors"]
    parts = [load_file(path) for path in paths]
    for name, value in swa.evaluated.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (parts[0][name] + parts[1][name]) / 2, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(value, kept.network.state_dict()[name]) for name, value in parts[1].items())


def test_the_mean_of_the_last_epochs_is_taken_where_it_is_better(store: TileStore, tmp_path: Path) -> None:
    words = (
        "training.epochs=4",
        "training.lr=0.03",
        "training.schedule=constant",
        "training.keep_last=3",
        "training.average_last=true",
    )
    trainer = trained(settings_of(*words, "training.monitor=valid_loss"), store, tmp_path)
    parts = [load_file(path) for path in trainer.last.paths()]
    mean = {
        name: torch.stack([part[name].double() for part in parts]).mean(0)
        for name in parts[0]
        if parts[0][name].is_floating_point()
    }
    found = trainer._validated(loaded(trainer, mean))
    best = min(row["val_loss"] for row in trainer.state.history)
    model = load_file(tmp_path / "model.safetensors")
    taken = all(torch.allclose(model[name].double(), value, atol=1e-6) for name, value in mean.items())
    assert taken == (found["val_loss"] < best)


def loaded(trainer: FoldTrainer, weights: dict[str, torch.Tensor]) -> nn.Module:
    network = trainer.network
    network.load_state_dict({name: weights.get(name, value) for name, value in trainer.network.state_dict().items()})
    return network


def test_a_frozen_encoder_does_not_learn_until_its_epoch(store: TileStore, tmp_path: Path) -> None:
    trainer = FoldTrainer(
        settings_of("training.freeze_epochs=1", "training.epochs=2"),
        FoldTask(0, store, range(7), range(7, 10), tmp_path, CPU),
    )

    def encoder() -> torch.Tensor:
        return torch.cat([value.flatten().float() for value in trainer.network.encoder.state_dict().values()])

    start = encoder().clone()
    trainer._train(0)
    assert torch.equal(start, encoder())
    trainer._train(1)
    assert not torch.equal(start, encoder())


def test_sinks_get_what_the_metrics_get(store: TileStore, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = trained(settings_of("training.sinks=[tensorboard]"), store, tmp_path / "run" / "fold0")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard" / "fold0"))
    events.Reload()
    written = [event.value for event in events.Scalars("train_loss")]
    assert written == pytest.approx([row["train_loss"] for row in trainer.state.history], rel=1e-5)


PROCESSES = (
    "tiles.size=64",
    "model.arch=unet",
    "model.encoder=tu-convnext_atto",
    "training.loss=bce",
    "training.epochs=2",
    "augment.pipeline=flips",
    "model.options={encoder_depth: 4, decoder_channels: [16, 16, 8, 8], decoder_use_norm: false}",
    "training.ema_decay=0",
    "data.n_folds=5",
    "training.keep_last=2",
    "training.average_last=true",
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def test_two_processes_learn_as_one_and_end_in_one_sentence(sample_data: Path, tmp_path: Path) -> None:
    """Torchrun with two CPU processes, whose batches are halves, against one process; a network whose norms see single
    tiles.
    """
    words = [
        "train",
        "--config",
        "baseline",
        "--data",
        str(sample_data),
        "--folds",
        "0",
        "--device",
        "cpu",
        *overrides(*TINY, *PROCESSES),
    ]

    def run(name: str, *launcher: str) -> subprocess.CompletedProcess[str]:
        command = [
            *launcher,
            "-m",
            "hubmap_kit",
            *words,
            "--out",
            str(tmp_path / name),
            "--stores",
            str(tmp_path / "stores"),
        ]
        return warm.run(command, warm.TRAINING)

    tables = {}
    for name, launcher in {"one": (sys.executable,), "two": TORCHRUN}.items():
        done = run(name, *launcher)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("run folder:") == 1
        assert done.stderr.count("the mean of the last 2 epochs has Dice") == 1
        tables[name] = pd.read_csv(tmp_path / name / "fold0" / "metrics.csv")
    numbers = tables["one"].select_dtypes("number")
    np.testing.assert_allclose(numbers, tables["two"][numbers.columns], rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(numbers["train_loss"], tables["two"]["train_loss"], rtol=1e-4)
    again = run("two", *TORCHRUN)
    assert again.returncode != 0
    assert (
        sum(
            "already holds a run; add --resume" in line
            for line in again.stderr.splitlines()
            if line.startswith("error:")
        )
        == 1
    )
    assert "[rank1]: Traceback" not in again.stderr


def test_joint_norms_keep_what_timm_puts_into_norms() -> None:
    """On cards norms are joined over all processes; the function in eval mode, which any device can compute, must
    stay.
    """
    torch.manual_seed(0)
    network = build(settings_of("model.encoder=tu-efficientnet_b0", "model.options={}").model, pretrained=False).eval()
    image, names = torch.randn(1, 3, 64, 64), list(network.state_dict())
    with torch.no_grad():
        before = network(image)
        joint = World(0, 2).synchronised(network, torch.device("cuda")).eval()
        assert any(isinstance(part, nn.SyncBatchNorm) for part in joint.modules())
        torch.testing.assert_close(joint(image), before)
    assert list(joint.state_dict()) == names


def test_an_epoch_without_a_tile_for_every_process_is_refused(store: TileStore, tmp_path: Path) -> None:
    task = FoldTask(0, store, range(7), range(7, 10), tmp_path, CPU, world=World(0, 4))
    with pytest.raises(ConfigError, match="an epoch has 3 tiles, which 4 processes cannot share"):
        FoldTrainer(settings_of("training.samples_per_epoch=3"), task)


def test_every_process_augments_in_its_own_way() -> None:
    batch = batch_of(4, 64)
    settings = settings_of("augment.engine=batched", "augment.pipeline=light")
    learner = Learner(settings, 10, CPU, pretrained=False)
    made = []
    for learner.world in (World(), World(), World(0, 2), World(1, 2)):
        made.append(learner.inputs(Batch(3, batch.tiles, batch.masks), 0)[0])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[2], made[3])


def test_auto_batch_goes_with_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ConfigError, match="torchrun shares training.batch_size among all of them; set it by hand"):
        auto_batched(settings_of(), tmp_path, "auto")


def test_a_batch_must_be_shared_evenly(store: TileStore, tmp_path: Path) -> None:
    from hubmap_kit.training.loader import build_loader

    settings = settings_of("training.batch_size=4", "training.samples_per_epoch=14")
    dataset = TileDataset(store, range(7), settings)
    with pytest.raises(ConfigError, match="training.batch_size is 4, which 3 processes cannot share"):
        build_loader(dataset, settings, False, World(0, 3))
    shares = [
        [list(batch) for batch in build_loader(dataset, settings, False, World(rank, 2)).batch_sampler]
        for rank in (0, 1)
    ]
    whole = [list(batch) for batch in build_loader(dataset, settings, False).batch_sampler]
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == whole
    assert all(len(a) == len(b) for a, b in zip(*shares, strict=True))


def test_about_travels_with_its_tiles() -> None:
    about = About(torch.arange(5), torch.arange(5).float())
    part = about.to(CPU)[2:4]
    assert part.organ.tolist() == [2, 3]
    assert part.log_um.tolist() == [2.0, 3.0]
