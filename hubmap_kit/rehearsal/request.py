"""What `hubmap rehearse` can be asked for; light, so that a wrong word is answered at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hubmap_kit.errors import RehearsalError, did_you_mean
from hubmap_kit.publish.metadata import KERNELS

WHAT = ("journey", *KERNELS, "faults")
LAYOUTS = ("new", "flat")  # of /kaggle/input
LEAST_SLIDES = 7  # of a hidden set with every fault beside one readable slide of each organ


@dataclass(frozen=True)
class Request:
    """The command line. None stands for the usual folder below build/ of the checkout, `minutes` 0 for Kaggle's own.

    `data` is a folder in the competition's format (None: embedded slides). The first training session of the journey
    ends itself after `stop_after` minutes; at 0 its clock leaps to the end after the first checkpoint. `outputs` are
    folders by the name of the kernel that wrote them.
    """

    what: str
    layouts: tuple[str, ...] = LAYOUTS
    slides: int = 12
    faults: bool = True
    largest: int = 4500
    seed: int = 0
    data: Path | None = None
    overrides: tuple[str, ...] = ()
    stop_after: float = 0.0
    sample_size: int = 1536
    minutes: float = 0.0
    memory_gib: float = 29.0
    disk_gib: float = 20.0
    keep: bool = False
    python: str = ""
    out: Path | None = None
    kernels: Path | None = None
    datasets: Path | None = None
    outputs: Mapping[str, Path] = field(default_factory=dict)


def check_request(request: Request) -> None:
    """Raise RehearsalError for a word or number that means nothing."""
    what, layouts, data = request.what, request.layouts, request.data
    if what not in WHAT:
        raise RehearsalError(f"'{what}' cannot be rehearsed; expected {', '.join(WHAT)}{did_you_mean(what, WHAT)}")
    if wrong := [layout for layout in layouts if layout not in LAYOUTS]:
        raise RehearsalError(f"--layout is '{wrong[0]}'; expected {', '.join(LAYOUTS)} or both")
    if unknown := [name for name in request.outputs if name not in KERNELS]:
        raise RehearsalError(f"--output names the kernel '{unknown[0]}'; expected {', '.join(KERNELS)}")
    check_slides(request.slides, request.faults)
    for option, value in (("--memory-gib", request.memory_gib), ("--disk-gib", request.disk_gib)):
        if value <= 0:
            raise RehearsalError(f"{option} is {value:g}; expected more than 0")
    for option, value in (("--minutes", request.minutes), ("--stop-after", request.stop_after)):
        if value < 0:
            raise RehearsalError(f"{option} is {value:g}; expected 0 or more")
    if data is not None and not (data / "train.csv").is_file():
        raise RehearsalError(
            f"--data is {data}, but there is no train.csv in it; give a folder in the competition's format"
        )


def check_slides(slides: int, faults: bool) -> None:
    """Raise RehearsalError for a hidden test set that is too small to hold what it must."""
    least = LEAST_SLIDES if faults else 1
    if slides < least:
        every, way = (" with every fault", ", or add --no-faults") if faults else ("", "")
        raise RehearsalError(f"--slides is {slides}, but a hidden test set{every} needs {least}; ask for more{way}")
