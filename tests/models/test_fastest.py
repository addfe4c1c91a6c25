"""The choice of a network's form: measured on real passes, remembered per device, never at the price of other
probabilities.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from hubmap_kit.config import ModelConfig
from hubmap_kit.models import fastest
from hubmap_kit.models.build import normalise
from hubmap_kit.models.fastest import FORMS, Form, Tuner, choose, measure

CPU, MODEL = torch.device("cpu"), ModelConfig()
WINDOW = torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


class Small(nn.Module):
    """A network that counts its forward passes; `breaks` makes its folded copy another function."""

    def __init__(self, seed: int = 0, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 1, 1)
        self.norm.running_mean.copy_(torch.randn(8))
        self.norm.running_var.copy_(torch.rand(8) + 0.5)
        self.breaks, self.passes = breaks, []
        self.eval()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.passes.append(tuple(inputs.shape))
        features = self.first(inputs)
        return self.last(self.norm(features) + (features if self.breaks else 0))


def settled(tuner: Tuner, *networks: nn.Module) -> list[nn.Module]:
    chosen = list(networks)
    tuner.settle(chosen, WINDOW, MODEL, None)
    return chosen


def is_folded(network: nn.Module) -> bool:
    return not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def is_channels_last(network: nn.Module) -> bool:
    return network.first.weight.is_contiguous(memory_format=torch.channels_last)


def remembered(path: Path) -> tuple[str, dict]:
    ((key, value),) = json.loads(path.read_text()).items()
    return key, value


def test_a_choice_is_measured_once_and_remembered(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    path, network = tmp_path / "speed.json", Small()
    settled(Tuner(path, CPU), network)
    key, value = remembered(path)
    assert fastest.device_name(CPU) in key and torch.__version__ in key and "window 64" in key and "fp32" in key
    assert set(value["ms"]) == {str(form) for form in FORMS} and all(ms > 0 for ms in value["ms"].values())
    assert "fastest on" in caplog.text and (1, 3, 64, 64) in network.passes
    caplog.clear()
    before = path.read_bytes()
    settled(Tuner(path, CPU), Small())
    assert not caplog.text and path.read_bytes() == before


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_is_remembered_is_what_is_made_of_every_network(tmp_path: Path, form: Form) -> None:
    path = tmp_path / "speed.json"
    settled(Tuner(path, CPU), Small())
    key, _ = remembered(path)
    path.write_text(
        json.dumps({key: {"folded": form.folded, "channels_last": form.channels_last}, "another machine": {}})
    )
    networks = settled(Tuner(path, CPU), Small(1), Small(2))
    inputs = normalise(WINDOW, MODEL)
    for seed, network in zip((1, 2), networks, strict=True):
        assert is_folded(network) == form.folded and is_channels_last(network) == form.channels_last
        with torch.inference_mode():
            torch.testing.assert_close(network(inputs), Small(seed)(inputs), atol=1e-5, rtol=0)


def test_a_tuner_settles_once(tmp_path: Path) -> None:
    tuner, networks = Tuner(tmp_path / "speed.json", CPU), [Small()]
    tuner.settle(networks, WINDOW, MODEL, None)
    chosen = networks[0]
    tuner.settle(networks, WINDOW, MODEL, None)
    assert networks[0] is chosen


def test_another_window_is_measured_anew(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    settled(Tuner(path, CPU), Small())
    Tuner(path, CPU).settle([Small()], WINDOW[:, :32, :32], MODEL, None)
    assert len(json.loads(path.read_text())) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run folder under Kaggle's inputs is read-only; a file in its place fails for any user, root included."""
    (tmp_path / "run").write_text("")
    (network,) = settled(Tuner(tmp_path / "run" / "speed.json", CPU), Small())
    assert isinstance(network, Small)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"a": 1}', b"\xff\xfe"])
def test_a_damaged_memory_is_measured_again(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "speed.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    settled(Tuner(path, CPU), Small())
    assert any(isinstance(value, dict) and "ms" in value for value in json.loads(path.read_text()).values())


def test_a_network_that_folding_would_change_stays_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, broken = tmp_path / "speed.json", Small(breaks=True)
    (network,) = settled(Tuner(path, CPU), broken)
    assert network is broken and not is_folded(network) and "folding batch norms changes" in caplog.text
    assert not any("folded" in form for form in remembered(path)[1]["ms"])
    # Also one of several, and also where a memory says that folding is fastest.
    key, _ = remembered(path)
    path.write_text(json.dumps({key: {"folded": True, "channels_last": True}}))
    good, broken = settled(Tuner(path, CPU), Small(), Small(breaks=True))
    assert is_folded(good) and not is_folded(broken)


def test_a_network_that_cannot_be_copied_stays_as_it_is(tmp_path: Path) -> None:
    class Uncopied(Small):
        def __deepcopy__(self, memo: object) -> nn.Module:
            raise TypeError("not this one")

    network = Uncopied()
    assert settled(Tuner(tmp_path / "speed.json", CPU), network) == [network]


def test_the_first_form_is_taken_unless_another_is_clearly_faster() -> None:
    seconds = dict.fromkeys(FORMS, 1.0)
    assert choose(seconds) == FORMS[0] == Form(folded=True, channels_last=True)
    assert choose(seconds | {FORMS[1]: 0.95}) == FORMS[0], "a difference that noise makes"
    assert choose(seconds | {FORMS[1]: 0.7, FORMS[3]: 0.6}) == FORMS[3]


def test_every_form_takes_its_turn() -> None:
    network, folded = Small(), Small()
    seconds = measure(network, folded, normalise(WINDOW, MODEL))
    assert list(seconds) == list(FORMS) and len(network.passes) == len(folded.passes) >= 4
    assert list(measure(network, None, normalise(WINDOW, MODEL))) == [form for form in FORMS if not form.folded]
