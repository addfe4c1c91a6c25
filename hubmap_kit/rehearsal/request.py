"""What `hubmap rehearse` can be asked for; light, so that a wrong word is answered at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hubmap_kit.errors import RehearsalError, did_you_mean
from hubmap_kit.publish.metadata import KERNELS
from hubmap_kit.rehearsal.inputs import LAYOUTS

WHAT = ("journey", *KERNELS, "faults")
LEAST = 7  # hidden slides that every fault fits into, beside one readable slide of each organ


@dataclass(frozen=True)
class Options:
    """What a person chooses. `data` is a folder in the competition's format (None: embedded slides).

    The first training session ends itself after `stop_after` minutes; at 0 its clock leaps to the end after the first
    checkpoint.
    """

    layouts: tuple[str, ...] = ("new", "flat")
    slides: int = 12
    faults: bool = True
    largest: int = 4500
    seed: int = 0
    data: Path | None = None
    overrides: tuple[str, ...] = ()
    stop_after: float = 0.0
    sample_size: int = 1536


@dataclass(frozen=True)
class Request:
    """The command line.

    None stands for the usual folder below build/ of the checkout; `outputs` are kernels' outputs by name.
    """

    what: str
    options: Options
    minutes: float = 0.0
    memory_gib: float = 29.0
    disk_gib: float = 20.0
    keep: bool = False
    python: str = ""
    out: Path | None = None
    kernels: Path | None = None
    datasets: Path | None = None
    outputs: Mapping[str, Path] = field(default_factory=dict)


def check(request: Request) -> None:
    """Raise RehearsalError for a word or number that means nothing."""
    if request.what not in WHAT:
        raise RehearsalError(
            f"'{request.what}' cannot be rehearsed; expected {', '.join(WHAT)}{did_you_mean(request.what, WHAT)}"
        )
    wrong = [layout for layout in request.options.layouts if layout not in LAYOUTS]
    if wrong:
        raise RehearsalError(f"--layout is '{wrong[0]}'; expected {', '.join(LAYOUTS)} or both")
    unknown = [name for name in request.outputs if name not in KERNELS]
    if unknown:
        raise RehearsalError(f"--output names the kernel '{unknown[0]}'; expected {', '.join(KERNELS)}")
    check_slides(request.options.slides, request.options.faults)
    for option, value in (("--memory-gib", request.memory_gib), ("--disk-gib", request.disk_gib)):
        if value <= 0:
            raise RehearsalError(f"{option} is {value:g}; expected more than 0")
    for option, value in (("--minutes", request.minutes), ("--stop-after", request.options.stop_after)):
        if value < 0:
            raise RehearsalError(f"{option} is {value:g}; expected 0 or more")
    data = request.options.data
    if data is not None and not (data / "train.csv").is_file():
        raise RehearsalError(
            f"--data is {data}, but there is no train.csv in it; give a folder in the competition's format"
        )


def check_slides(slides: int, faults: bool) -> None:
    """Raise RehearsalError for a hidden test set that is too small to hold what it must."""
    least = LEAST if faults else 1
    if slides < least:
        every, way = (" with every fault", ", or add --no-faults") if faults else ("", "")
        raise RehearsalError(f"--slides is {slides}, but a hidden test set{every} needs {least}; ask for more{way}")
