"""Where the metrics of an epoch go beside metrics.csv: TensorBoard's event files and offline runs of Weights & Biases.

Both write files in the run folder and nothing else; no network, no account. Offline runs go up with `wandb sync`, by
hand.
"""

from __future__ import annotations

import importlib
import logging
import math
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from hubmap_kit import experiment
from hubmap_kit.config import Experiment
from hubmap_kit.errors import ConfigError
from hubmap_kit.files import write_text

log = logging.getLogger(__name__)
CONSTANT = {"fold", "epoch"}  # columns of metrics.csv that are no measurements
TENSORBOARD, WANDB = "tensorboard", "wandb"


class Sink(Protocol):
    """Takes a row of metrics an epoch."""

    def write(self, row: Mapping[str, Any], epoch: int) -> None:
        """Keep the numbers of a row; what is no number is left out.

        An epoch that is trained again replaces the earlier one.
        """

    def close(self) -> None:
        """Put everything on disk. Call it once, also after an error."""


def check_sinks(names: Sequence[str]) -> None:
    """Raise ConfigError for a sink whose package is not installed, so that it is said before a training and not in
    it.
    """
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"training.sinks has {name}, which is not installed here ({error}); install it with 'pip install"
                " hubmap-kit[sinks]', or take it out of training.sinks"
            ) from error


def open_sinks(names: Sequence[str], run_folder: Path, fold: int, settings: Experiment) -> list[Sink]:
    """The sinks of one fold, by the names of `training.sinks`. Nothing is on disk before the first row.

    A fold that is resumed goes on where it was. A sink that fails while training (a full disk) is dropped with a
    warning: pictures of a training are not worth losing it. Raises ConfigError when a package is absent.
    """
    check_sinks(names)
    makers: dict[str, Callable[[int], Sink]] = {
        TENSORBOARD: lambda epoch: _TensorBoard(run_folder / TENSORBOARD / f"fold{fold}", epoch),
        WANDB: lambda _: _Wandb(run_folder, fold, settings),
    }
    return [_Safe(name, makers[name]) for name in dict.fromkeys(names)]


class _Safe:
    """A sink that is opened by its first row and never raises."""

    def __init__(self, name: str, make: Callable[[int], Sink]) -> None:
        self.name, self._make = name, make
        self._sink: Sink | None = None
        self._failed = False

    def write(self, row: Mapping[str, Any], epoch: int) -> None:
        if self._failed:
            return
        try:
            if self._sink is None:
                self._sink = self._make(epoch)
            self._sink.write(_numbers(row), epoch)
        except Exception as error:
            self._fail(error)

    def close(self) -> None:
        sink, self._sink = self._sink, None
        if sink is None:
            return
        try:
            sink.close()
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        self._failed = True
        log.warning("%s takes no more metrics (%s: %s); metrics.csv goes on", self.name, type(error).__name__, error)


class _TensorBoard:
    """Event files.

    `first` is the epoch of the first row: events of that and later epochs, of a session before, are void.
    """

    def __init__(self, folder: Path, first: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first)

    def write(self, row: Mapping[str, float], epoch: int) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name.replace("@", "_at_"), value, epoch)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """An offline run under <run>/wandb. All sessions of a fold share the id in <run>/wandb/fold<k>.id.

    That `wandb sync --append` joins them into one run is what its documentation says; it was not tried, which takes an
    account.
    """

    def __init__(self, run_folder: Path, fold: int, settings: Experiment) -> None:
        import wandb

        folder = run_folder / WANDB
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / f"fold{fold}.id"
        if not kept.is_file():
            write_text(kept, secrets.token_hex(4) + "\n")
        # Names of the machine, its user and its repository are nobody's business who gets the run folder.
        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            save_code=False,
            host="hidden",
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
            x_disable_viewer=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(
            project="hubmap-kit",
            name=f"{settings.name} fold {fold}",
            group=settings.name,
            id=kept.read_text(encoding="utf-8").strip(),
            dir=str(run_folder),
            mode="offline",
            config=experiment.dump(settings),
            settings=quiet,
            reinit="create_new",
        )

    def write(self, row: Mapping[str, float], epoch: int) -> None:
        self._run.log(dict(row), step=epoch)

    def close(self) -> None:
        self._run.finish()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row."""
    found = {
        name: value
        for name, value in row.items()
        if name not in CONSTANT and isinstance(value, int | float) and not isinstance(value, bool)
    }
    return {name: float(value) for name, value in found.items() if math.isfinite(value)}


class GpuFacts:
    """Readings of the card that a torch device is, other processes on it included, at the moment of reading.

    On a CPU, without nvidia-ml-py or without a driver there are none; nothing raises.
    """

    def __init__(self, device: torch.device) -> None:
        self._sources: dict[str, Callable[[], float]] = {}
        if device.type == "cuda":
            self._sources = {
                "gpu_percent": lambda: torch.cuda.utilization(device),
                "gpu_memory_gib": lambda: _used_gib(device),
                "gpu_celsius": lambda: torch.cuda.temperature(device),
            }

    def read(self) -> dict[str, float]:
        """gpu_percent (share of the last moment in which the card worked), gpu_memory_gib and gpu_celsius, as far as
        the card reports them.
        """
        found = {}
        for name, source in self._sources.items():
            try:
                found[name] = float(source())
            except Exception as error:  # an absent driver, or a part of a shared card, which has no use of its own
                log.debug("no %s: %s: %s", name, type(error).__name__, error)
        return found


def _used_gib(device: torch.device) -> float:
    free, total = torch.cuda.mem_get_info(device)
    return round((total - free) / 2**30, 3)


def gpu_line(facts: Mapping[str, float]) -> str:
    """Readings as words for a progress bar or a log; empty without any."""
    forms = {"gpu_percent": "GPU {:.0f} %", "gpu_memory_gib": "{:.1f} GiB", "gpu_celsius": "{:.0f} °C"}
    return ", ".join(form.format(facts[name]) for name, form in forms.items() if name in facts)
