"""Slides to submission.csv, end to end: what reading, windows, post-processing, encoding and writing leave of the
network's time.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.forward import Timed
from benchmarks.material import B0, TINY, network, tissue
from benchmarks.measure import Comparison, limit
from hubmap_kit import experiment
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import ModelConfig
from hubmap_kit.files import write_json, write_yaml
from hubmap_kit.inference.ensemble import Ensemble, load_ensemble
from hubmap_kit.inference.predict import predict_slides
from hubmap_kit.sample.generate import write_tiff

# Sides in pixels, as mixed as the hidden slides: prostate of HuBMAP is the smallest, HPA the largest group.
SIDES = (
    160,
    3000,
    1000,
    1500,
    3000,
    2000,
    3000,
    160,
    1500,
    3000,
    1000,
    2000,
    3000,
    160,
    1500,
    3000,
    1000,
    2000,
    1500,
    1000,
)
QUICK_SIDES = (160, 400, 160)
# One fold and one view at half the scale: the least that anybody would run, so the network hides as little as it can.
SETTINGS = (
    "scale.reduce=2",
    "inference.views=none",
    "inference.batch_size=1",
    "inference.window=512",
    "inference.overlap=0.25",
)


def run(quick: bool = False) -> list[Comparison]:
    """Twenty mixed slides through a U-Net on efficientnet-b0 (three small ones through a tiny network when `quick`)."""
    sides = QUICK_SIDES if quick else SIDES
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        slides = write_slides(folder, [("kidney", "Hubmap", side, 0.5) for side in sides])
        write_run(folder / "run", TINY if quick else B0, SETTINGS)
        parts = [_share_outside(slides, folder, None if quick else 5.0)]
    if torch.cuda.is_available():
        from benchmarks import gpu

        parts += gpu.run(quick)
    return parts


def write_slides(folder: Path, wanted: Sequence[tuple[str, str, int, float]]) -> list[Slide]:
    """Slides of (organ, source, side, um per px); those of one side share a file."""
    for side in sorted({side for _, _, side, _ in wanted}):
        write_tiff(folder / f"{side}.tiff", tissue(side)[0])
    return [
        Slide(str(number), organ, source, side, side, um_per_px, 4.0, folder / f"{side}.tiff", None)
        for number, (organ, source, side, um_per_px) in enumerate(wanted, 1)
    ]


def write_run(run: Path, model: ModelConfig, settings: Sequence[str]) -> None:
    """A run folder of one fold with random weights, which `load_ensemble` takes for a trained one."""
    config = experiment.load("baseline", settings).model_copy(update={"model": model})
    (run / "fold0").mkdir(parents=True)
    write_yaml(run / "config.yaml", experiment.dump(config))
    write_json(run / "thresholds.json", {"kidney": 0.5})
    save_file(
        {name: value.contiguous() for name, value in network(model).state_dict().items()},
        run / "fold0" / "model.safetensors",
    )


def timed(ensemble: Ensemble) -> tuple[Ensemble, list[Timed]]:
    """The same predictor, which has chosen its networks' fastest form already, with a stopwatch around each."""
    networks = [Timed(each) for each in ensemble.networks]
    return dataclasses.replace(ensemble, networks=networks, tuner=None), networks


def _share_outside(slides: Sequence[Slide], folder: Path, at_most: float | None) -> Comparison:
    ensemble = load_ensemble(folder / "run", torch.device("cpu"))
    # Whatever is chosen or made once is over before the clock starts: these few slides stand for hundreds.
    ensemble.probability(tissue(1100)[0], 0.5)
    ensemble, networks = timed(ensemble)
    start = time.perf_counter()
    predict_slides(slides, [[ensemble]], folder / "submission.csv")
    wall = time.perf_counter() - start
    inside = sum(stopwatch.seconds for stopwatch in networks)
    sides, pixels = [slide.height for slide in slides], sum(slide.height * slide.width for slide in slides) / 1e6
    what = f"{len(slides)} mixed slides end to end: wall time outside the network"
    note = (
        f"predict: slides of {min(sides)} to {max(sides)} px, {pixels:.0f} megapixels, in {wall:.1f} s, {inside:.1f} s"
        " of it in the network's forward passes; one fold, one view, half the scale"
    )
    return limit(what, 100 * (wall - inside) / wall, "%", at_most, notes=[note])
