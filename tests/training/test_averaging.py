"""Averages of weights against plain sums; what files are kept and what is said of damaged ones."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file as load_arrays
from safetensors.torch import save_file
from torch import nn

from hubmap_kit.config import TrainingConfig
from hubmap_kit.errors import CheckpointError
from hubmap_kit.training.averaging import EqualAverage, KeepLast, average_files, is_averaged


def small_network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))


def states(network: nn.Module, count: int) -> list[dict[str, np.ndarray]]:
    """Walk with the network; the state after each step, as arrays."""
    found = []
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(count):
        network.train()(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append({name: value.numpy().copy() for name, value in network.state_dict().items()})
    return found


def test_swa_is_the_mean_of_what_it_saw() -> None:
    torch.manual_seed(0)
    network = small_network()
    average, seen = EqualAverage(network), []
    for _ in range(5):
        seen += states(network, 1)
        average.update(network)
    for name, value in average.module.state_dict().items():
        values = np.stack([state[name] for state in seen])
        expected = values.mean(0, dtype=np.float64) if value.is_floating_point() else values[-1]
        np.testing.assert_allclose(value.numpy(), expected, rtol=1e-5, atol=1e-7)
    assert average.count == 5 and not average.module.training
    assert not any(weight.requires_grad for weight in average.module.parameters())
    assert average.module.state_dict()["1.num_batches_tracked"] == 5


def test_swa_goes_on_from_a_checkpoint_to_the_bit() -> None:
    torch.manual_seed(0)
    network = small_network()
    straight, stopped = EqualAverage(network), EqualAverage(network)
    for number in range(6):
        states(network, 1)
        straight.update(network)
        stopped.update(network)
        buffer = io.BytesIO()
        torch.save(stopped.state_dict(), buffer)
        buffer.seek(0)
        stopped = EqualAverage(small_network())
        stopped.load_state_dict(torch.load(buffer, weights_only=True))
        assert stopped.count == number + 1
    assert all(
        torch.equal(one, two)
        for one, two in zip(straight.module.state_dict().values(), stopped.module.state_dict().values(), strict=True)
    )


@given(st.integers(1, 60), st.floats(0, 1))
def test_the_averaged_epochs_are_the_last_ones(epochs: int, share: float) -> None:
    config = TrainingConfig(epochs=epochs, swa=share)
    chosen = [epoch for epoch in range(1, epochs + 1) if is_averaged(epoch, config)]
    if share == 0:
        assert not chosen
    else:
        assert chosen and chosen == list(range(epochs - len(chosen) + 1, epochs + 1))
        assert len(chosen) == 1 or len(chosen) == pytest.approx(share * epochs, abs=0.5001)


def test_the_mean_of_files_is_exact_in_float64(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32)
    values[:, 0] = [1e8, 1, -1e8]  # in float32 the one would be lost
    paths = []
    for number, row in enumerate(values):
        tensors = {
            "a": torch.from_numpy(row),
            "half": torch.from_numpy(row[1:5]).half(),
            "count": torch.tensor([number, 7]),
            "flag": torch.tensor(number > 1),
        }
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(tensors, paths[-1])
    found = average_files(paths)
    np.testing.assert_array_equal(found["a"].numpy(), values.astype(np.float64).mean(0).astype(np.float32))
    assert found["a"][0] == np.float32(1 / 3)
    halves = np.stack([load_arrays(path)["half"] for path in paths]).astype(np.float64).mean(0)
    np.testing.assert_allclose(found["half"].double().numpy(), halves, rtol=1e-3)
    assert found["half"].dtype == torch.float16 and found["count"].tolist() == [2, 7] and bool(found["flag"])
    one = average_files(paths[:1])
    assert torch.equal(one["a"], torch.from_numpy(values[0]))


def test_files_that_have_no_mean(tmp_path: Path) -> None:
    first, other, cut = (tmp_path / f"{name}.safetensors" for name in ("first", "other", "cut"))
    save_file({"a": torch.zeros(3), "b": torch.zeros(1)}, first)
    three, one = torch.zeros(3), torch.zeros(1)
    for tensors, name in (
        ({"a": torch.zeros(4), "b": one}, "a"),
        ({"a": three}, "b"),
        ({"a": three, "b": one, "c": one.clone()}, "c"),
    ):
        save_file(tensors, other)
        with pytest.raises(
            CheckpointError,
            match=rf"other\.safetensors is of another network than .*first\.safetensors: they differ in {name};",
        ):
            average_files([first, other])
    cut.write_bytes(first.read_bytes()[:-3])
    for path in (cut, tmp_path / "absent.safetensors"):
        with pytest.raises(CheckpointError, match=rf"{path.name} is missing or damaged"):
            average_files([first, path])
    with pytest.raises(CheckpointError, match="keep_last"):
        average_files([])


def test_the_last_epochs_are_kept(tmp_path: Path) -> None:
    kept = KeepLast(tmp_path / "last", 3)
    assert kept.paths() == []
    for epoch in range(1, 13):
        kept.save(epoch, {"a": torch.full((2, 2), float(epoch)).t()})
        assert [path.name for path in kept.paths()] == [
            f"epoch-{number:04d}.safetensors" for number in range(max(1, epoch - 2), epoch + 1)
        ]
    assert average_files(kept.paths())["a"].unique().tolist() == [11.0]
    # A resumed training repeats an epoch, or begins again from an earlier one: what was after it is void.
    kept.save(12, {"a": torch.zeros(1)})
    kept.save(11, {"a": torch.zeros(1)})
    assert [path.name for path in kept.paths()] == ["epoch-0010.safetensors", "epoch-0011.safetensors"]
    assert average_files(kept.paths()[-1:])["a"].tolist() == [0.0]
    assert sorted(path.name for path in (tmp_path / "last").iterdir()) == [path.name for path in kept.paths()]


def test_nothing_is_kept_where_nothing_was_asked_for(tmp_path: Path) -> None:
    KeepLast(tmp_path / "last", 0).save(1, {"a": torch.zeros(1)})
    assert not list(tmp_path.iterdir())


def test_a_write_that_fails_leaves_the_older_files(tmp_path: Path) -> None:
    kept = KeepLast(tmp_path, 2)
    kept.save(1, {"a": torch.zeros(1)})
    before = kept.paths()[0].read_bytes()
    with pytest.raises(RuntimeError):
        kept.save(
            2,
            {
                "a": torch.zeros(4),
                "b": torch.zeros(4).expand(2, 4),
                "a-again": (shared := torch.zeros(3)),
                "shared": shared,
            },
        )
    assert [path.read_bytes() for path in kept.paths()] == [before] and len(list(tmp_path.iterdir())) == 1
