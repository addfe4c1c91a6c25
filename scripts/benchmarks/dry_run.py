"""Long work, to see that memory stays flat: a whole hidden test set with a tiny network, or a conversion of all
training slides.

`scripts/bench.sh predict --slides 529`, `scripts/bench.sh data --slides 351`.
"""

from __future__ import annotations

import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.material import TINY, tissue
from benchmarks.memory import resident
from benchmarks.predict import write_run, write_slides
from hubmap_kit.competition import rle
from hubmap_kit.files import atomic_path, write_text
from hubmap_kit.inference.ensemble import load_ensemble
from hubmap_kit.inference.predict import predict_slides
from hubmap_kit.tiles.conversion import convert
from hubmap_kit.tiles.convert_config import ConvertConfig

# organ, source, side, um per px: every second slide as HPA's, the others the sizes at which HuBMAP's organs come.
HPA = [(organ, "HPA", 3000, 0.4) for organ in ("kidney", "prostate", "largeintestine", "spleen", "lung")]
HUBMAP = [
    ("kidney", "Hubmap", 2000, 0.5),
    ("prostate", "Hubmap", 160, 6.263),
    ("largeintestine", "Hubmap", 4500, 0.229),
    ("spleen", "Hubmap", 2023, 0.4945),
    ("lung", "Hubmap", 1323, 0.7562),
]
MIX = [slide for pair in zip(HPA, HUBMAP, strict=True) for slide in pair]
SETTINGS = ("scale.reduce=4", "inference.views=none", "inference.window=512")
EVERY_S = 0.25
WARM_SLIDES = 2 * len(MIX)  # by then every size has come twice, and the allocator holds what it will hold
MEGABYTE = 2**20


class Sampler(threading.Thread):
    """Writes down (seconds, slides done, resident bytes) until it is told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.done, self.samples = 0, list[tuple[float, int, int]]()
        self._stop_it, self._start_s = threading.Event(), time.perf_counter()

    def run(self) -> None:
        """Sample until `end`."""
        while not self._stop_it.wait(EVERY_S):
            self.samples.append((time.perf_counter() - self._start_s, self.done, resident()))

    def end(self) -> None:
        """Stop and wait for the last sample."""
        self._stop_it.set()
        self.join()
        self.samples.append((time.perf_counter() - self._start_s, self.done, resident()))

    def one_more(self, *_: object) -> None:
        """A slide is done."""
        self.done += 1


def dry_run(count: int, out: Path) -> str:
    """Predict `count` synthetic slides in the hidden set's mix of sizes; write memory.csv and memory.png to `out`.

    Linux only.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = write_slides(folder, [MIX[number % len(MIX)] for number in range(count)])
        tissue.cache_clear()  # no part of what is measured
        write_run(folder / "run", TINY, SETTINGS)
        ensemble = load_ensemble(folder / "run", torch.device("cpu"))
        sampler = Sampler()
        sampler.start()
        predict_slides(slides, [[ensemble]], folder / "submission.csv", on_mask=sampler.one_more)
        sampler.end()
    return _written(sampler.samples, out, "Memory over a whole test set", by_slide=True)


def dry_conversion(count: int, out: Path) -> str:
    """Convert `count` synthetic HPA slides of 3000 px into a store at reduce 4; write memory.csv and memory.png to
    `out`. Linux only.
    """
    with tempfile.TemporaryDirectory() as name:
        slides = write_slides(Path(name), [HPA[number % len(HPA)] for number in range(count)])
        marked = [replace(slide, rle=rle.encode(tissue(slide.height)[1])) for slide in slides]
        tissue.cache_clear()
        sampler = Sampler()
        sampler.start()
        convert(marked, Path(name) / "tiles", ConvertConfig(reduce=4, size=256))
        sampler.end()
    sampler.done = count
    return _written(sampler.samples, out, f"Memory over a conversion of {count} slides", by_slide=False)


def _written(samples: list[tuple[float, int, int]], out: Path, title: str, by_slide: bool) -> str:
    rows = [f"{seconds:.2f},{done},{size / MEGABYTE:.1f}" for seconds, done, size in samples]
    write_text(out / "memory.csv", "\n".join(["seconds,slides,resident_mb", *rows]) + "\n")
    _draw(samples, out / "memory.png", title, by_slide)
    return _sentence(samples, out, by_slide)


def _sentence(samples: list[tuple[float, int, int]], out: Path, by_slide: bool) -> str:
    """The largest memory of both halves, after warming up: slides where they were counted, else a tenth of the time."""
    table = np.array(samples)
    column, warm_up = (1, min(WARM_SLIDES, table[-1, 1] / 4)) if by_slide else (0, table[-1, 0] / 10)
    warm = table[:, column] >= warm_up
    half = warm & (table[:, column] >= (table[-1, column] + table[warm, column].min()) / 2)
    early, late = (
        (table[mask, 2].max() / MEGABYTE for mask in (warm & ~half, half))
        if (warm & ~half).any()
        else (float("nan"), float("nan"))
    )
    done = f"{int(table[-1, 1])} slides in " if by_slide else ""
    return (
        f"{done}{table[-1, 0]:.0f} s; largest resident memory {early:.0f} MB in the first half after warming up, "
        f"{late:.0f} MB in the second: {out / 'memory.csv'}, {out / 'memory.png'}"
    )


def _draw(samples: list[tuple[float, int, int]], path: Path, title: str, by_slide: bool) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    table = np.array(samples)
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(table[:, 1 if by_slide else 0], table[:, 2] / MEGABYTE, linewidth=0.8, color="#1f77b4")
    axes.set(
        xlabel="slides done" if by_slide else "seconds",
        ylabel="resident memory, MB",
        title=title,
        ylim=(0, None),
        xlim=(0, None),
    )
    axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)
