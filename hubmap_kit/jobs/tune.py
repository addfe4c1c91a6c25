"""The tuning job: a run's out-of-fold slides -> thresholds and post-processing by organ, left in the run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hubmap_kit import experiment
from hubmap_kit.competition.lineage import judged_slides
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.config import Experiment, InferenceConfig
from hubmap_kit.errors import CheckpointError, ConfigError
from hubmap_kit.files import write_json, write_text, write_yaml
from hubmap_kit.inference.ensemble import MODEL_FILE, Ensemble, fold_folders, load_fold, run_settings
from hubmap_kit.inference.postprocess import FITTED_FILE
from hubmap_kit.jobs.train import train_csv
from hubmap_kit.models.device import choose_device
from hubmap_kit.progress import bar
from hubmap_kit.report.curves import save_tuning
from hubmap_kit.report.tables import in_organ_order, tune_summary
from hubmap_kit.tiles.scaling import resize_plane
from hubmap_kit.tiles.store import TileStore, decode_for, open_or_build
from hubmap_kit.training.history import unfinished
from hubmap_kit.training.run import folds_table, of_organs, split
from hubmap_kit.training.tune import CANDIDATES, OrganResult, Scores, SlideScores, score_slide, tune

log = logging.getLogger(__name__)
THRESHOLDS_FILE, PLAIN_FILE, PICTURE = "thresholds.json", "thresholds.plain.json", "tune.png"
FITTED_KEYS = ("inference.threshold", "inference.source_thresholds", "inference.postprocess")


@dataclass(frozen=True)
class Tuned:
    """What was fitted, by organ; whether empty masks are rescued; a table of it."""

    results: list[OrganResult]
    rescue: bool
    summary: str


def tune_thresholds(
    run: Path, data: str = "", overrides: Sequence[str] = (), device: str = "auto", stores: Path | None = None
) -> Tuned:
    """Fit thresholds and post-processing on a run's held-out slides, each predicted once by the fold that never saw it.

    Writes thresholds.json (plain ones are kept as thresholds.plain.json), postprocess.json and tune.png into the run.
    As with `evaluate`, `overrides` (`inference.key=value`) become the run's own, because what is fitted is only right
    for them. Empty masks are rescued when every slide of train.csv has a unit, as in the competition. Raises
    ConfigError for an override of what is fitted, CheckpointError for a folder without folds.csv or trained folds.
    """
    wrong = [override for override in overrides if override.startswith(FITTED_KEYS)]
    if wrong:
        raise ConfigError(f"--set {wrong[0]}: this is what tune-thresholds fits; give it to 'hubmap predict' instead")
    settings = run_settings(run, overrides, data)
    _warn(run, settings)
    slides = of_organs(read_train(train_csv(settings)), settings.data)
    folds = _folds(run, settings, slides)
    rescue = all(slide.rle for slide in slides)
    store = open_or_build(stores or run.parent / "stores", slides, settings.scale, settings.tiles)
    scores = _scores(run, settings, slides, folds, store, device, rescue)
    results = in_organ_order(tune(scores))
    write_yaml(run / "config.yaml", experiment.dump(settings))
    _write(run, results, rescue)
    save_tuning(
        run / PICTURE, scores, results, rescue, f"{settings.name}: Dice of held-out slides against the threshold"
    )
    return Tuned(results, rescue, tune_summary(results, rescue))


def _folds(run: Path, settings: Experiment, slides: Sequence[Slide]) -> Mapping[str, int]:
    folds_table(run)
    return split(slides, settings.data, run)


def _scores(
    run: Path,
    settings: Experiment,
    slides: Sequence[Slide],
    folds: Mapping[str, int],
    store: TileStore,
    device: str,
    rescue: bool,
) -> Scores:
    found = fold_folders(run)
    by_id, judged = (
        {slide.id: slide for slide in slides},
        judged_slides(slides),
    )  # a restained copy would count its tissue once more
    held_out = {
        number: [
            row for row, slide_id in enumerate(store.slides["id"]) if folds[slide_id] == number and slide_id in judged
        ]
        for number in found
    }
    total = sum(map(len, held_out.values()))
    if not total:
        raise CheckpointError(
            f"{run} holds no trained fold (fold<k>/{MODEL_FILE}) with held-out slides; train it first"
        )
    chosen = choose_device(device)
    seen: list[Slide] = []
    scored: list[SlideScores] = []
    with bar(total, "tune", "slide") as progress:
        for number, folder in found.items():
            ensemble = load_fold(settings, folder, chosen)
            for slide, scores in _fold_scores(ensemble, store, held_out[number], by_id, rescue):
                seen.append(slide)
                scored.append(scores)
                progress.set_postfix_str(f"fold {number} {slide.organ} {slide.id}", refresh=False)
                progress.update(1)
    return Scores(
        [slide.organ for slide in seen], [slide.source for slide in seen], [folds[slide.id] for slide in seen], scored
    )


def _fold_scores(
    ensemble: Ensemble, store: TileStore, rows: Sequence[int], by_id: Mapping[str, Slide], rescue: bool
) -> Iterator[tuple[Slide, SlideScores]]:
    for row in rows:
        record = store.slides.iloc[row]
        slide, height, width = by_id[record["id"]], int(record["height"]), int(record["width"])
        plane = resize_plane(ensemble.plane(store.image(row), organ=slide.organ, source=slide.source), (height, width))
        text = slide.rle if (height, width) == (slide.height, slide.width) else None
        yield slide, score_slide(plane, decode_for(slide, height, width), text, rescue)


def _warn(run: Path, settings: Experiment) -> None:
    for phrase in unfinished(run, settings.training).values():
        log.warning("%s: %s; what is fitted now is fitted to its best epoch so far, or without it", run, phrase)
    default, own = InferenceConfig(), settings.inference
    for key in ("thresholds", "source_thresholds", "postprocess"):
        if getattr(own, key) != getattr(default, key):
            log.warning("%s/config.yaml sets inference.%s itself, which goes before what is fitted now", run, key)


def _write(run: Path, results: Sequence[OrganResult], rescue: bool) -> None:
    """Leave the fit in the run. postprocess.json comes first: until thresholds.json agrees with it, nobody uses it."""
    thresholds: dict[str, float] = {}
    for result in results:
        thresholds[result.organ] = result.choice.threshold
        thresholds |= {f"{result.organ}/{source}": value for source, value in result.choice.sources.items()}
    _keep_plain(run)
    organs = {
        result.organ: CANDIDATES[result.choice.candidate].model_copy(update={"rescue": rescue}).model_dump()
        for result in results
    }
    write_json(
        run / FITTED_FILE,
        {"thresholds": thresholds, "organs": organs, "results": [asdict(result) for result in results]},
    )
    write_json(run / THRESHOLDS_FILE, thresholds)


def _keep_plain(run: Path) -> None:
    """Copy thresholds.json to thresholds.plain.json unless it is an earlier tuning's own."""
    kept = run / THRESHOLDS_FILE
    if kept.is_file() and _read(run / FITTED_FILE, "thresholds") != _read(kept):
        write_text(run / PLAIN_FILE, kept.read_text(encoding="utf-8", errors="replace"))


def _read(path: Path, key: str | None = None) -> Any:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values if key is None else values[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
