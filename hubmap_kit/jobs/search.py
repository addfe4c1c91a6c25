"""The search job: trains one run after the other with other settings, and leaves the best experiment, a table and a
page.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from hubmap_kit import experiment
from hubmap_kit.competition.folds import check_folds
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError
from hubmap_kit.files import atomic_path, write_yaml
from hubmap_kit.jobs import train
from hubmap_kit.models.device import choose_devices
from hubmap_kit.processes import sigterm_noticed
from hubmap_kit.report.search_page import save_search_page, short_text
from hubmap_kit.report.tables import text_table
from hubmap_kit.training.clock import Clock, OutOfTime
from hubmap_kit.training.run import split
from hubmap_kit.training.search import Dimension, Outcome, Pruned, Search, Trial, Watch, check_space, read_space

log = logging.getLogger(__name__)
STUDY_FILE, TRIALS_FILE, BEST_FILE, PAGE_FILE, LOCK_FILE = (
    "study.sqlite",
    "trials.csv",
    "best.yaml",
    "index.html",
    ".lock",
)
DRAW_EVERY_S = 60.0
SHOWN = 10  # trials in the summary
HOPELESS = 5  # trials that all failed for one reason, and none that did not
SHORT = "the device ran out of memory"


@dataclass(frozen=True)
class Found:
    """What a search has found so far. `stopped` says why it ended before its last trial; empty: it did not."""

    out: Path
    outcomes: list[Outcome]
    best: Outcome | None
    summary: str
    stopped: str = ""


@dataclass
class _Job:
    """What all trials of a search have in common."""

    out: Path
    load: Callable[[list[str]], Experiment]
    base: Experiment
    space: list[Dimension]
    folds: list[int]
    total: int | None
    device: str
    stores: Path
    clock: Clock | None
    drawn: float = field(default=-math.inf)


def search(
    config: str,
    out: Path,
    words: Sequence[str] = (),
    file: Path | None = None,
    overrides: Sequence[str] = (),
    data: str = "",
    folds: Sequence[int] | None = (0,),
    trials: int | None = None,
    clock: Clock | None = None,
    seed: int = 0,
    prune: bool = True,
    device: str = "auto",
    stores: Path | None = None,
) -> Found:
    """Train trials until there are `trials` in all, or until the clock's end where no number is given.

    `words` and `file` are the space (see training.search_space). Every trial is a run folder `out`/trials/<number>; its
    value is the mean Dice of the held-out slides of `folds` (None: all). `out` keeps the study: the same call goes on
    with an interrupted search, inside the epoch's trial that it had reached. A trial that fails, for want of memory or
    for settings that do not go together, is noted as failed. Raises ConfigError for a wrong space, CheckpointError for
    a folder of something else, HubmapError when all trials failed.
    """

    def load(more: list[str]) -> Experiment:
        return experiment.load(config, [*overrides, *more], data)

    if trials is None and clock is None:
        raise ConfigError("a search without an end; give --trials, --hours or both")
    base, space = load([]), read_space(words, file)
    check_space(space, load)
    choose_devices(device)
    numbers = check_folds(folds, split(read_train(train.train_csv(base)), base.data, out).values())
    if out.is_file() or (
        out.is_dir() and not (out / STUDY_FILE).is_file() and any(each.name != LOCK_FILE for each in out.iterdir())
    ):
        raise CheckpointError(f"{out} is not an empty folder and holds no search; choose a new folder for --out")
    job = _Job(out, load, base, space, numbers, trials, device, stores or out / "stores", clock)
    with _alone(out):
        warmup = max(1, base.training.epochs // 4)
        study = Search(out / STUDY_FILE, space, experiment.dump(base), numbers, seed, prune, warmup)
        stopped = _run(job, study)
        return _finish(job, study, stopped)


def _run(job: _Job, study: Search) -> str:
    """Train trial after trial; returns why that ended before the last one, or nothing."""
    with sigterm_noticed() as told:
        while job.total is None or len(study.outcomes()) < job.total:
            if told():
                return "SIGTERM came"
            if job.clock is not None and not job.clock.fits(0.0):
                return "the time is up"
            trial = study.ask()
            try:
                _one(job, study, trial)
            except OutOfTime as stop:
                return f"{stop.cause} in trial {trial.number}"
            _write(job, study)
            if _is_hopeless(study.outcomes(), job.space):
                break
    return ""


def _one(job: _Job, study: Search, trial: Trial) -> None:
    started = time.monotonic()
    twin = next((each for each in study.outcomes() if each.state == "complete" and each.words == trial.words), None)
    if twin is not None and twin.value is not None:
        study.complete(trial, twin.value, 0.0, f"the settings of trial {twin.number}, not trained again")
    else:
        try:
            value = _train(job, trial)
        except OutOfTime:
            raise
        except Pruned as pruned:
            study.prune(trial, time.monotonic() - started, str(pruned))
        except OSError:
            raise  # a full or broken disk is no trial's fault, and fails every other one too
        except Exception as error:
            # One network of a night's search that some library refuses must not end the night.
            study.fail(trial, time.monotonic() - started, _reason(error))
            log.debug("trial %d", trial.number, exc_info=True)
        else:
            study.complete(trial, value, time.monotonic() - started)
    _tell(job, study, trial.number)


def _train(job: _Job, trial: Trial) -> float:
    """The mean Dice of the held-out slides after the trial's training."""
    settings = job.load(trial.overrides)
    run = job.out / "trials" / str(trial.number)
    watch = Watch(trial, job.folds)
    watch.catch_up(run)
    table = train.train(
        settings.model_copy(update={"name": f"{job.base.name} trial {trial.number}"}),
        run,
        job.folds,
        (run / "config.yaml").is_file(),
        job.device,
        job.stores,
        job.clock,
        degrade=True,
        on_epoch=watch,
    )
    value = float(table["dice"].mean())
    if not math.isfinite(value):
        raise HubmapError(f"its Dice is {value}")
    return value


def _is_hopeless(outcomes: Sequence[Outcome], space: Sequence[Dimension]) -> bool:
    """Whether nothing but one failure has come of the first trials, whatever was chosen: every further one would end
    alike.
    """
    reasons, failed = {each.reason for each in outcomes}, all(each.state == "failed" for each in outcomes)
    varied = all(len({each.words.get(dimension.key) for each in outcomes}) > 1 for dimension in space)
    return len(outcomes) >= HOPELESS and failed and varied and len(reasons) == 1 and SHORT not in reasons


def _reason(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        return SHORT
    return first if isinstance(error, HubmapError) else f"{type(error).__name__}: {first}"


def _tell(job: _Job, study: Search, number: int) -> None:
    """The progress line."""
    outcomes = study.outcomes()
    ended, top = next(each for each in outcomes if each.number == number), _best(outcomes)
    score = f"Dice {ended.value:.4f}" if ended.state == "complete" else f"{ended.state}, {ended.reason}"
    standing = f" (best {top.value:.4f}, trial {top.number})" if top is not None else ""
    log.info(
        "trial %d%s: %s in %.0f s%s: %s",
        number,
        f" of {job.total}" if job.total else "",
        score,
        ended.seconds,
        standing,
        _said(ended),
    )


def _said(outcome: Outcome) -> str:
    return ", ".join(f"{key}={short_text(text)}" for key, text in outcome.words.items())


def _best(outcomes: Sequence[Outcome]) -> Outcome | None:
    """The complete trial with the highest Dice; the earlier one of equals."""
    return max(
        (each for each in outcomes if each.state == "complete"), key=lambda each: each.value or 0.0, default=None
    )


def _write(job: _Job, study: Search, last: bool = False) -> None:
    """The table and the best experiment; the page too, if it is some time old or the search ends."""
    outcomes = study.outcomes()
    rows: list[dict[str, Any]] = [
        {
            "trial": each.number,
            "state": each.state,
            "dice": each.value,
            "seconds": each.seconds,
            **each.words,
            "reason": each.reason,
        }
        for each in outcomes
    ]
    with atomic_path(job.out / TRIALS_FILE) as temporary:
        columns = ["trial", "state", "dice", "seconds", *(dimension.key for dimension in job.space), "reason"]
        pd.DataFrame(rows, columns=columns).to_csv(temporary, index=False)
    top = _best(outcomes)
    if top is not None:
        settings = job.load([f"{key}={text}" for key, text in top.words.items()])
        write_yaml(job.out / BEST_FILE, experiment.dump(settings.model_copy(update={"name": f"{job.base.name} tuned"})))
    if last or time.monotonic() - job.drawn >= DRAW_EVERY_S:
        try:
            save_search_page(job.out / PAGE_FILE, job.base.name, outcomes, job.space, study.importance(), job.folds)
        except Exception as error:
            log.warning(
                "%s cannot be drawn (%s: %s); the search is not touched by that",
                job.out / PAGE_FILE,
                type(error).__name__,
                error,
            )
        job.drawn = time.monotonic()


def _finish(job: _Job, study: Search, stopped: str) -> Found:
    outcomes = study.outcomes()
    if outcomes:
        _write(job, study, last="SIGTERM" not in stopped)  # a batch system kills some ten seconds after its SIGTERM
    failed = [each for each in outcomes if each.state == "failed"]
    if failed and len(failed) == len(outcomes) and not stopped:
        raise HubmapError(
            f"all {len(failed)} trials of {job.out} failed, the last one with: {failed[-1].reason.rstrip('.')}; mend"
            " --config or --search"
        )
    return Found(job.out, outcomes, _best(outcomes), _summary(job, outcomes), stopped)


def _summary(job: _Job, outcomes: Sequence[Outcome]) -> str:
    states = [each.state for each in outcomes]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("complete", "pruned", "failed"))
    done = sorted((each for each in outcomes if each.state == "complete"), key=lambda each: -(each.value or 0.0))[
        :SHOWN
    ]
    rows = [
        [
            str(each.number),
            f"{each.value:.4f}",
            f"{each.seconds:.0f}",
            *(short_text(text) for text in each.words.values()),
        ]
        for each in done
    ]
    header = ["trial", "Dice", "seconds", *(dimension.key for dimension in job.space)]
    return f"{len(outcomes)} trials: {counts}" + (f"\n{text_table(header, rows)}" if rows else "")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keep a second search out of the folder. Where the system has no such locks, nothing is kept out."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / LOCK_FILE).open("w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise HubmapError(f"another search works in {out}; wait for its end, or choose another --out") from error
        except (ImportError, OSError) as error:
            log.debug("%s cannot be locked: %s", out, error)
        yield
