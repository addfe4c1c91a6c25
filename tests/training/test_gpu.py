"""Readings of a card: from a library that says what it is asked, and without any."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from hubmap_kit.training.sinks import GpuFacts, line, visible

MARKS = ["GPU-aaaa1111-0000", "GPU-bbbb2222-0000", "GPU-bbcc3333-0000"]
ONE, TWO = torch.device("cuda:0"), torch.device("cuda:1")


class Library:
    """What NVIDIA's library would say on a machine of three cards; `broken` calls fail as it lets them fail."""

    NVML_TEMPERATURE_GPU = 0

    def __init__(self, broken: tuple[str, ...] = (), as_bytes: bool = False) -> None:
        self.broken, self.as_bytes = broken, as_bytes

    def _say(self, name: str, value: object) -> object:
        if name in self.broken:
            raise RuntimeError("Not Supported")
        return value

    def nvmlInit(self) -> None:
        self._say("init", None)

    def nvmlDeviceGetCount(self) -> int:
        return len(MARKS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return range(len(MARKS))[index]

    def nvmlDeviceGetHandleByUUID(self, mark: str) -> object:
        if mark.startswith("MIG-"):
            return 1
        return MARKS.index(mark)

    def nvmlDeviceGetUUID(self, card: int) -> str | bytes:
        return MARKS[card].encode() if self.as_bytes else MARKS[card]

    def nvmlDeviceGetUtilizationRates(self, card: int) -> object:
        return self._say("use", SimpleNamespace(gpu=10 + card, memory=3))

    def nvmlDeviceGetMemoryInfo(self, card: int) -> object:
        return self._say("memory", SimpleNamespace(used=(2 + card) * 2**30, total=16 * 2**30))

    def nvmlDeviceGetTemperature(self, card: int, sensor: int) -> object:
        return self._say("heat", 40 + card + sensor)


def read(monkeypatch: pytest.MonkeyPatch, library: object, device: torch.device, names: str | None) -> dict[str, float]:
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if names is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", names)
    return GpuFacts(device).read()


@pytest.mark.parametrize(
    ("names", "device", "card"),
    [
        (None, ONE, 0),
        (None, TWO, 1),
        ("2,0", ONE, 2),
        ("2,0", TWO, 0),
        (" 1 ", ONE, 1),
        ("GPU-bbbb", ONE, 1),
        ("GPU-bbcc3333-0000,GPU-aaaa", ONE, 2),
        ("GPU-bbcc3333-0000,GPU-aaaa", TWO, 0),
        ("MIG-1234", ONE, 1),
        ("0,1,-1,2", TWO, 1),
    ],
)
@pytest.mark.parametrize("as_bytes", [False, True])
def test_the_card_is_the_one_that_torch_means(
    names: str | None, device: torch.device, card: int, as_bytes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if torch.cuda.is_available():
        pytest.skip("here torch knows the marks of real cards, which come first")
    found = read(monkeypatch, Library(as_bytes=as_bytes), device, names)
    assert found == {"gpu_percent": 10.0 + card, "gpu_memory_gib": 2.0 + card, "gpu_celsius": 40.0 + card}
    assert all(type(value) is float for value in found.values())


@pytest.mark.parametrize("names", ["", "-1,0", "7", "GPU-dddd", "1"])
def test_a_card_that_is_not_visible_has_no_readings(names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, Library(), TWO, names) == {}


def test_torchs_own_mark_of_a_card_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda,
        "get_device_properties",
        lambda number: SimpleNamespace(uuid=["bbcc3333-0000", "aaaa1111-0000"][number]),
    )
    assert read(monkeypatch, Library(), ONE, None)["gpu_percent"] == 12
    assert read(monkeypatch, Library(), TWO, None)["gpu_percent"] == 10


def test_what_a_card_does_not_tell_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(read(monkeypatch, Library(("use",)), ONE, "0")) == {"gpu_memory_gib", "gpu_celsius"}
    assert read(monkeypatch, Library(("use", "memory", "heat")), ONE, "0") == {}
    assert read(monkeypatch, Library(("init",)), ONE, "0") == {}


def test_without_the_library_or_a_card_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, None, ONE, "0") == {}, "an import of None fails as an absent module does"
    assert read(monkeypatch, Library(), torch.device("cpu"), "0") == {}


def test_the_real_library_never_raises() -> None:
    """On a machine without a driver its own start fails; with one, readings are within their bounds."""
    pynvml = pytest.importorskip("pynvml")
    found = GpuFacts(torch.device("cuda:0")).read()
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        assert found == {}
    else:
        assert 0 <= found.get("gpu_percent", 0) <= 100 and 0 <= found.get("gpu_memory_gib", 0) < 1000


@pytest.mark.parametrize(
    ("number", "names", "card"), [(0, None, 0), (3, None, 3), (1, "3,5", 5), (0, "GPU-1,2", "GPU-1"), (1, "GPU-1,2", 2)]
)
def test_visible_cards(number: int, names: str | None, card: int | str) -> None:
    assert visible(number, names) == card


@pytest.mark.parametrize(("number", "names"), [(0, ""), (0, "-1"), (1, "0"), (1, "0,none,1"), (2, "0,1")])
def test_invisible_cards(number: int, names: str) -> None:
    with pytest.raises(LookupError, match="visible"):
        visible(number, names)


def test_readings_become_words() -> None:
    assert (
        line({"gpu_percent": 97.4, "gpu_memory_gib": 13.06, "gpu_celsius": 64.0, "loss": 1.0})
        == "GPU 97 %, 13.1 GiB, 64 °C"
    )
    assert line({"gpu_celsius": 40}) == "40 °C"
    assert line({}) == ""
