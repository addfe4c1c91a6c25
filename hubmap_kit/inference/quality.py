"""What each step down the ladder costs in Dice and saves in time, measured on slides whose masks are known."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pandas as pd

from hubmap_kit.competition import rle
from hubmap_kit.competition import slides as slide_files
from hubmap_kit.competition.tables import Slide
from hubmap_kit.errors import TableError
from hubmap_kit.inference.ensemble import Ensemble, ladder, network_passes
from hubmap_kit.inference.predict import segment
from hubmap_kit.progress import bar


def quality_table(ensemble: Ensemble, slides: Sequence[Slide]) -> pd.DataFrame:
    """One row a step of the run's ladder: step, effort, dice (mean of the slides), lost (against step 0), seconds (a
    slide, without reading), cost and passes (shares of step 0's seconds and network passes).

    Use slides that the networks have not learned from. One slide is in memory at a time. Raises TableError without any
    mask.
    """
    known = [slide for slide in slides if slide.rle is not None]
    if not known:
        raise TableError(f"none of the {len(slides)} slides has a mask; give rows of a train.csv")
    steps = ladder(ensemble.experiment.inference, len(ensemble.networks))
    dice, seconds = np.zeros((len(known), len(steps))), np.zeros((len(known), len(steps)))
    with bar(dice.size, "quality", "mask") as progress:
        for row, slide in enumerate(known):
            pixels = slide_files.read(slide.path)
            if row == 0:
                segment(slide, pixels, [ensemble], (steps[-1],))  # warms up: the first pass of a process is slow
            for column, effort in enumerate(steps):
                started = time.perf_counter()
                mask = segment(slide, pixels, [ensemble], (effort,))
                seconds[row, column] = time.perf_counter() - started
                dice[row, column] = rle.dice(rle.encode(mask), slide.rle or "")
                progress.update(1)
    passes = np.array([sum(network_passes(slide, ensemble.experiment, effort) for slide in known) for effort in steps])
    return pd.DataFrame(
        {
            "step": range(len(steps)),
            "effort": [str(effort) for effort in steps],
            "dice": dice.mean(axis=0),
            "lost": dice.mean(axis=0)[0] - dice.mean(axis=0),
            "seconds": seconds.mean(axis=0),
            "cost": seconds.sum(axis=0) / seconds[:, 0].sum(),
            "passes": passes / passes[0],
        }
    )
