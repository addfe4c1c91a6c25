"""Readings of a card: as far as torch gives them, and never an error."""

from __future__ import annotations

import pytest
import torch

from hubmap_kit.training.sinks import GpuFacts, gpu_line

TWO = torch.device("cuda:1")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch would report of two cards."""
    monkeypatch.setattr(torch.cuda, "utilization", lambda device: 10 + device.index)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((14 - device.index) * 2**30, 16 * 2**30))
    monkeypatch.setattr(torch.cuda, "temperature", lambda device: 40 + device.index)


@pytest.mark.usefixtures("card")
def test_the_card_is_the_one_of_the_device() -> None:
    found = GpuFacts(TWO).read()
    assert found == {"gpu_percent": 11.0, "gpu_memory_gib": 3.0, "gpu_celsius": 41.0}
    assert all(type(value) is float for value in found.values())


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    "error", [RuntimeError("Not Supported"), ModuleNotFoundError("pynvml does not seem to be here")]
)
def test_what_a_card_does_not_tell_is_left_out(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: torch.device) -> float:
        raise error

    monkeypatch.setattr(torch.cuda, "utilization", refuse)
    assert set(GpuFacts(TWO).read()) == {"gpu_memory_gib", "gpu_celsius"}
    monkeypatch.setattr(torch.cuda, "temperature", refuse)
    monkeypatch.setattr(torch.cuda, "mem_get_info", refuse)
    assert GpuFacts(TWO).read() == {}


@pytest.mark.usefixtures("card")
def test_a_cpu_has_none() -> None:
    assert GpuFacts(torch.device("cpu")).read() == {}


def test_real_readings_are_within_their_bounds_and_never_raise() -> None:
    found = GpuFacts(torch.device("cuda:0")).read()
    if not torch.cuda.is_available():
        assert found == {}
    assert 0 <= found.get("gpu_percent", 0) <= 100 and 0 <= found.get("gpu_memory_gib", 0) < 1000


def test_readings_become_words() -> None:
    assert (
        gpu_line({"gpu_percent": 97.4, "gpu_memory_gib": 13.06, "gpu_celsius": 64.0, "loss": 1.0})
        == "GPU 97 %, 13.1 GiB, 64 °C"
    )
    assert gpu_line({"gpu_celsius": 40}) == "40 °C"
    assert gpu_line({}) == ""
