"""Scores of held-out slides: the validation of an epoch, and the out-of-fold results of a run.

Out-of-fold means every training slide predicted, at its original size, by the fold that never saw it.

Slides whose parent is a training slide too (restained copies) are not among them: one tissue would count several times.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from torch import nn

from hubmap_kit import experiment
from hubmap_kit.competition.lineage import judged_slides
from hubmap_kit.competition.tables import Slide
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError
from hubmap_kit.files import atomic_path, write_json
from hubmap_kit.inference.ensemble import COUNTS_FILE, Ensemble, fold_folders
from hubmap_kit.progress import track
from hubmap_kit.tiles.scaling import resize_plane
from hubmap_kit.tiles.store import TileStore, decode_for
from hubmap_kit.training import counts as sweep
from hubmap_kit.training.history import METRICS_FILE, fold_number, unfinished
from hubmap_kit.training.world import ALONE, World

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validation:
    """One validation.

    `dice` is the mean over slides, each organ at its best threshold; `dice_at_half` at 0.5 for all.
    """

    loss: float
    dice: float
    dice_at_half: float
    organs: dict[str, float]


def validate(
    network: nn.Module,
    loss: nn.Module,
    store: TileStore,
    slides: Sequence[int],
    settings: Experiment,
    device: torch.device,
    check: Callable[[], None] | None = None,
    world: World = ALONE,
) -> Validation:
    """Predict whole slides at the store's scale, one view, and score them there; leaves the network in eval mode.

    `loss` is that of binary planes. Several processes share the slides and all get the scores of all. `check` is called
    before every slide; what it raises ends the validation.
    """
    inference = settings.inference.model_copy(update={"views": "none"})
    single = Ensemble(settings.model_copy(update={"inference": inference}), [network.eval()], {}, device)
    curves, losses = [], []
    organs = store.slides["organ"].to_numpy()[list(slides)]
    for slide, organ in world.part(list(zip(slides, organs, strict=True))):
        if check is not None:
            check()
        plane, truth = single.plane(store.image(slide), organ=organ), store.mask(slide)
        losses.append(_plane_loss(loss, plane, truth))
        curves.append(sweep.dice_curve(sweep.threshold_counts(plane, truth)))
    losses, curves = (_in_order(world.gathered(found), len(slides)) for found in (losses, curves))
    by_organ = {organ: float(curve.max()) for organ, curve in sweep.mean_curves(np.stack(curves), organs).items()}
    mean = float(np.mean([by_organ[organ] for organ in organs]))
    return Validation(float(np.mean(losses)), mean, float(np.mean([curve[sweep.HALF] for curve in curves])), by_organ)


def _in_order(found: list[list[T]], count: int) -> list[T]:
    """What the processes found for every `len(found)`-th slide each, for all `count` slides in their order."""
    return [found[number % len(found)][number // len(found)] for number in range(count)]


def _plane_loss(loss: nn.Module, plane: np.ndarray, truth: np.ndarray) -> float:
    """The training loss of a whole slide, from the stitched probabilities turned back into logits."""
    with torch.inference_mode():
        logits = torch.logit(torch.from_numpy(plane), eps=1e-6)
        return float(loss(logits[None, None], torch.from_numpy(truth)[None, None].float()))


def predict_fold(
    ensemble: Ensemble,
    store: TileStore,
    slides: Sequence[Slide],
    rows: Sequence[int],
    path: Path,
    check: Callable[[], None] | None = None,
) -> None:
    """Predict the slides at `rows` of the store with all views, and write their counts at every threshold to `path`.

    The store holds what inference would make of the slide file, so nothing is decoded again; the plane is brought back
    to the slide's original size and compared with its original mask. `check` is called before every slide; what it
    raises ends this.
    """
    by_id = {slide.id: slide for slide in slides}
    counts, ids = [], []
    for row in track(list(rows), "out of fold", "slide"):
        if check is not None:
            check()
        record = store.slides.iloc[row]
        height, width = int(record["height"]), int(record["width"])
        plane = resize_plane(
            ensemble.plane(store.image(row), organ=record["organ"], source=record["data_source"]), (height, width)
        )
        counts.append(sweep.threshold_counts(plane, decode_for(by_id[record["id"]], height, width)))
        ids.append(record["id"])
    with atomic_path(path) as temporary:
        sweep.to_table(ids, np.stack(counts)).to_parquet(temporary)


def collect(run: Path, slides: Sequence[Slide], folds: Mapping[str, int]) -> pd.DataFrame:
    """Merge the folds that are predicted: fit thresholds.json, write oof.csv and metrics.csv; returns the out-of-fold
    table.

    Columns: id, organ, data_source, fold, dice (at the fitted threshold of its organ), dice@0.5, threshold,
    truth_share, predicted_share, finished (whether the fold was trained to its end). A warning names the folds that are
    not. Both Dices are a little optimistic: the kept epoch was chosen on these slides, and for `dice` the thresholds
    were fitted on them too.
    """
    ids, counts = _read_counts(run, slides)
    open_folds = unfinished(run, experiment.read(run / "config.yaml").training)
    by_id = {slide.id: slide for slide in slides}
    unknown = [slide_id for slide_id in ids if slide_id not in by_id]
    if unknown:
        raise CheckpointError(
            f"{run} has out-of-fold results for slide {unknown[0]}, which the data folder does not list; give the run"
            " its own data"
        )
    organs = np.array([by_id[slide_id].organ for slide_id in ids])
    curves = sweep.dice_curve(counts)
    thresholds = sweep.fit_thresholds(sweep.mean_curves(curves, organs))
    table = pd.DataFrame(
        [
            _row(by_id[i], folds[i], curve, count, thresholds)
            for i, curve, count in zip(ids, curves, counts, strict=True)
        ]
    )
    table["finished"] = ~table["fold"].isin(list(open_folds))
    _warn(run, open_folds, set(table["fold"]))
    write_json(run / "thresholds.json", thresholds)
    with atomic_path(run / "oof.csv") as temporary:
        table.to_csv(temporary, index=False, float_format="%.6f")
    metrics = read_metrics(run)
    if len(metrics):
        with atomic_path(run / "metrics.csv") as temporary:
            metrics.to_csv(temporary, index=False)
    return table


def read_metrics(run: Path) -> pd.DataFrame:
    """The metrics of all folds, one row a fold and epoch; empty when no epoch is done."""
    numbered = {
        number: path for path in run.glob(f"fold*/{METRICS_FILE}") if (number := fold_number(path.parent)) is not None
    }
    try:
        parts = [pd.read_csv(path) for _, path in sorted(numbered.items())]
    except ValueError as error:
        raise CheckpointError(
            f"{run} has a damaged fold<k>/metrics.csv ({error}); delete that file, --resume writes it anew"
        ) from error
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _warn(run: Path, open_folds: Mapping[int, str], present: Collection[int]) -> None:
    for number, phrase in open_folds.items():
        if number in present:
            log.warning(
                "%s: %s; oof.csv and thresholds.json judge its best epoch so far, predict uses it as well; go on with"
                " --resume",
                run,
                phrase,
            )
        else:
            log.warning(
                "%s: %s; its slides are not in oof.csv, and thresholds.json is fitted without them", run, phrase
            )


def organ_curves(run: Path, slides: Sequence[Slide]) -> dict[str, np.ndarray]:
    """Mean out-of-fold Dice of each organ at each of `counts.THRESHOLDS`."""
    ids, counts = _read_counts(run, slides)
    organ_of = {slide.id: slide.organ for slide in slides}
    return sweep.mean_curves(sweep.dice_curve(counts), np.array([organ_of[slide_id] for slide_id in ids]))


def _read_counts(run: Path, slides: Sequence[Slide]) -> tuple[list[str], np.ndarray]:
    ids: list[str] = []
    counts = []
    for folder in fold_folders(run).values():
        path = folder / COUNTS_FILE
        if path.is_file():
            fold_ids, fold_counts = sweep.read_counts(path)
            ids += fold_ids
            counts.append(fold_counts)
    if not counts:
        raise CheckpointError(
            f"{run} has no out-of-fold results yet; train a fold to its end, or run 'hubmap evaluate {run}'"
        )
    # Counts of before the table knew the copies' parents may still hold them.
    copies = {slide.id for slide in slides} - judged_slides(slides)
    used = [place for place, slide_id in enumerate(ids) if slide_id not in copies]
    return [ids[place] for place in used], np.concatenate(counts)[used]


def _row(
    slide: Slide, fold: int, curve: np.ndarray, counts: np.ndarray, thresholds: Mapping[str, float]
) -> dict[str, object]:
    threshold = thresholds[slide.organ]
    level = sweep.level_of(threshold)
    pixels = slide.height * slide.width
    return {
        "id": slide.id,
        "organ": slide.organ,
        "data_source": slide.source,
        "fold": fold,
        "dice": curve[level],
        "dice@0.5": curve[sweep.HALF],
        "threshold": threshold,
        "truth_share": counts[2, level] / pixels,
        "predicted_share": counts[1, level] / pixels,
    }
