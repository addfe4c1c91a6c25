"""A hyper-parameter search: an optuna study in an SQLite file, which a killed search goes on with.

Trials have numbers of the search's own, from 1, which are also their folders: a trial that was interrupted becomes a
new one for optuna, but keeps its number and folder, so that its training is resumed.
"""

from __future__ import annotations

import importlib
import logging
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hubmap_kit.config import Experiment
from hubmap_kit.errors import CheckpointError, ConfigError, HubmapError
from hubmap_kit.training import checkpoint
from hubmap_kit.training.history import METRICS_FILE, Row, read_rows

if TYPE_CHECKING:
    import optuna

log = logging.getLogger(__name__)
NAME = "hubmap"
SEEDS = 1_000_003  # trials of one search draw from seeds that no other search with a near seed has
FOLD_STEPS = 100_000  # an epoch of a later fold is a later step
LEAST_TRIALS = 4  # before a trial is compared with the median of the others, and before importance is told
# Trials are compared by the Dice of the same held-out slides, and their names and folders are the search's own.
FIXED = ("data", "name")
KINDS = ("log", "float", "int")
FORMS = "log:LOW:HIGH, float:LOW:HIGH, int:LOW:HIGH[:STEP], or choices such as bce,bce+dice"


@dataclass(frozen=True)
class Dimension:
    """One setting that is searched.

    `kind` is log, float or int with `low`, `high` (and `step`), or choice with `choices`.
    """

    key: str
    kind: str
    text: str  # as it was given
    choices: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    step: int = 1

    def suggest(self, trial: optuna.Trial) -> str:
        """The trial's value of this setting, as the right side of `--set`."""
        if self.kind == "choice":
            return trial.suggest_categorical(self.key, self.choices)
        if self.kind == "int":
            return str(trial.suggest_int(self.key, int(self.low), int(self.high), step=self.step))
        return written(trial.suggest_float(self.key, self.low, self.high, log=self.kind == "log"))

    def distribution(self) -> optuna.distributions.BaseDistribution:
        """What `suggest` draws from."""
        distributions = import_optuna().distributions
        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.choices)
        if self.kind == "int":
            return distributions.IntDistribution(int(self.low), int(self.high), step=self.step)
        return distributions.FloatDistribution(self.low, self.high, log=self.kind == "log")

    def ends(self) -> tuple[str, ...]:
        """Values that stand for all: every choice, or both ends."""
        if self.kind == "choice":
            return self.choices
        return (
            (str(int(self.low)), str(int(self.high))) if self.kind == "int" else (written(self.low), written(self.high))
        )


def written(value: Any) -> str:
    """A drawn value as text that YAML reads back to the same value."""
    return repr(float(value)) if isinstance(value, float) else str(value)


def read_space(words: Sequence[str], file: Path | None = None) -> list[Dimension]:
    """The dimensions of a YAML file, then those of `--search` words, which replace the file's of the same key.

    Raises ConfigError for a word or file of another form, and when nothing is left to search.
    """
    found = {dimension.key: dimension for dimension in (_read_file(file) if file else [])}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not text.strip():
            raise ConfigError(f"--search {word} has no 'section.key=values' form; values are {FORMS}")
        dimension = parse(key.strip(), text.strip(), f"--search {word}")
        found[dimension.key] = dimension
    if not found:
        raise ConfigError(
            "nothing is searched; give --search section.key=values, for instance --search training.lr=log:1e-4:1e-2"
        )
    return list(found.values())


def parse(key: str, text: str, origin: str) -> Dimension:
    """The dimension of a key; `origin` names the word or file in errors. Raises ConfigError."""
    if key.partition(".")[0] in FIXED:
        raise ConfigError(
            f"{origin}: {key} cannot be searched, because trials are compared on the same held-out slides; give it with"
            " --set"
        )
    kind, *numbers = text.split(":")
    if kind in KINDS and numbers:
        return _range(key, kind, numbers, text, origin)
    choices = tuple(_split(text))
    if not all(choices) or len(set(choices)) != len(choices):
        raise ConfigError(f"{origin}: an empty or a repeated choice in '{text}'; values are {FORMS}")
    return Dimension(key, "choice", text, choices)


def check_space(space: Sequence[Dimension], load: Callable[[list[str]], Experiment]) -> None:
    """Load the experiment once for every choice and both ends of every range; `load` takes overrides.

    Raises ConfigError.

    Each value is tried beside the experiment's own others; a pair that does not go together fails its trial, not the
    search.
    """
    for dimension in space:
        for value in dimension.ends():
            load([f"{dimension.key}={value}"])


def _range(key: str, kind: str, numbers: Sequence[str], text: str, origin: str) -> Dimension:
    try:
        low, high, *step = [float(number) if kind != "int" else int(number) for number in numbers]
    except ValueError as error:
        raise ConfigError(
            f"{origin}: '{text}' has no two numbers that kind {kind} takes; values are {FORMS}"
        ) from error
    if len(step) > (kind == "int") or not (math.isfinite(low) and math.isfinite(high)):
        raise ConfigError(f"{origin}: '{text}' has too many or infinite numbers; values are {FORMS}")
    wide = step[0] if step else 1
    if kind == "int" and wide >= 1:
        high = low + (high - low) // wide * wide  # the last value that a step reaches; optuna wants just that
    if low >= high or wide < 1 or (kind == "log" and low <= 0):
        above = " of positive numbers" if kind == "log" else ""
        raise ConfigError(
            f"{origin}: '{text}' is no range{above} from a lower to a higher end; swap or mend its numbers"
        )
    return Dimension(key, kind, text, (), low, high, int(wide))


def _split(text: str) -> list[str]:
    """Choices at the commas that no bracket holds."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _read_file(file: Path) -> list[Dimension]:
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not valid YAML; write lines such as 'training.lr: log:1e-4:1e-2'") from error
    except OSError as error:
        raise ConfigError(
            f"{file} cannot be read ({error.strerror}); expected a YAML file with lines such as 'training.lr:"
            " log:1e-4:1e-2'"
        ) from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"{file} is no table of settings; write lines such as 'training.lr: log:1e-4:1e-2'")
    return [_from_yaml(key, value, str(file)) for key, value in values.items()]


def _from_yaml(key: str, value: Any, origin: str) -> Dimension:
    if isinstance(value, list):
        choices = tuple(_flow(choice) for choice in value)
        if not choices or len(set(choices)) != len(choices):
            raise ConfigError(f"{origin}: the choices of {key} are {value}; expected at least one, and none twice")
        parse(key, "any", origin)  # refuses what cannot be searched
        return Dimension(key, "choice", ",".join(choices), choices)
    if isinstance(value, dict) or value is None:
        raise ConfigError(f"{origin}: {key} is {value!r}; expected a list of choices, or one of {FORMS}")
    return parse(key, value if isinstance(value, str) else _flow(value), f"{origin}: {key}")


def _flow(value: Any) -> str:
    """A value of a YAML file as one line of YAML."""
    return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip().removesuffix("...").strip()


class Pruned(HubmapError):
    """A trial is worse than the median of the earlier ones at the same epoch, and ends."""


@dataclass(frozen=True)
class Outcome:
    """A trial that has ended: complete, pruned or failed.

    `words` are its settings; `value` its Dice, of the last epoch if it was pruned.
    """

    number: int
    state: str
    words: Mapping[str, str]
    value: float | None = None
    seconds: float = 0.0
    reason: str = ""
    curve: Mapping[int, float] = field(default_factory=dict)  # Dice by epoch of its first fold


@dataclass(frozen=True)
class Trial:
    """A trial that is about to be trained."""

    number: int
    words: Mapping[str, str]
    asked: optuna.Trial

    @property
    def overrides(self) -> list[str]:
        """The settings in the form of `--set`."""
        return [f"{key}={text}" for key, text in self.words.items()]


class Search:
    """The study in `file`, made anew where there is none.

    `base` (a dumped experiment) and `folds` belong to the study, as does its space: with others its trials could not be
    compared. With the same `seed` and the same outcomes the same trials are drawn, however often the search is
    interrupted. Raises CheckpointError for a study of another search, or a file that is none, and HubmapError without
    optuna.
    """

    def __init__(
        self,
        file: Path,
        space: Sequence[Dimension],
        base: dict[str, Any],
        folds: Sequence[int],
        seed: int = 0,
        prune: bool = True,
        warmup: int = 1,
    ) -> None:
        self.space, self.folds, self.seed = list(space), list(folds), seed
        self.optuna = import_optuna()
        self.study = self._open(file, self._pruner(prune, warmup))
        self._check(file, base)
        self._requeue()

    def _pruner(self, prune: bool, warmup: int) -> optuna.pruners.BasePruner:
        pruners = self.optuna.pruners
        return (
            pruners.MedianPruner(n_startup_trials=LEAST_TRIALS, n_warmup_steps=warmup) if prune else pruners.NopPruner()
        )

    def _open(self, file: Path, pruner: optuna.pruners.BasePruner) -> optuna.Study:
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            return self.optuna.create_study(
                storage=f"sqlite:///{file.resolve()}",
                study_name=NAME,
                direction="maximize",
                pruner=pruner,
                load_if_exists=True,
            )
        except Exception as error:
            # SQLite, SQLAlchemy, Alembic and optuna each have their own word for a file that they cannot use.
            raise CheckpointError(
                f"{file} is damaged or no study of this kit ({type(error).__name__}); search in another --out"
            ) from error

    def _check(self, file: Path, base: dict[str, Any]) -> None:
        now = {"space": {dimension.key: dimension.text for dimension in self.space}, "folds": self.folds}
        kept = self.study.user_attrs
        for key, value in now.items():
            if kept.get(key, value) != value:
                raise CheckpointError(
                    f"{file} was begun with {key} {kept[key]}, now it is {value}; go on with the same, or search in"
                    " another --out"
                )
        if "base" in kept:
            checkpoint.check_same(kept["base"], base, file)
        for key, value in {**now, "base": base}.items():
            if key not in kept:
                self.study.set_user_attr(key, value)

    def _requeue(self) -> None:
        """Put trials that a kill left running first in the queue, with their settings and numbers, and end their old
        selves.
        """
        state = self.optuna.trial.TrialState
        continued = self._continued()
        for old in self.study.get_trials(deepcopy=False, states=(state.RUNNING,)):
            number = old.user_attrs.get("number")
            if number is not None and old.number not in continued:  # without a number nothing of it was begun
                self.study.enqueue_trial(old.params, {"number": number, "continues": old.number})
                log.info("trial %d was interrupted and goes on", number)
            self.study.tell(old.number, state=state.FAIL)

    def _continued(self) -> set[int]:
        return {
            trial.user_attrs["continues"]
            for trial in self.study.get_trials(deepcopy=False)
            if "continues" in trial.user_attrs
        }

    def ask(self) -> Trial:
        """The next trial: an interrupted one, or one drawn in view of all outcomes."""
        number = len(self.outcomes()) + 1
        # A generator of its own for every trial: one that went on from the start would draw the first trials again
        # after a kill.
        self.study.sampler = self.optuna.samplers.TPESampler(seed=self.seed * SEEDS + number)
        asked = self.study.ask()
        words = {dimension.key: dimension.suggest(asked) for dimension in self.space}
        number = asked.user_attrs.get("number", number)
        asked.set_user_attr("number", number)
        return Trial(number, words, asked)

    def complete(self, trial: Trial, value: float, seconds: float, reason: str = "") -> None:
        """A trial was trained to its end; `value` is its Dice."""
        self._note(trial, seconds, reason)
        self.study.tell(trial.asked, value)

    def prune(self, trial: Trial, seconds: float, reason: str) -> None:
        """A trial was ended because it was worse than others."""
        self._note(trial, seconds, reason)
        self.study.tell(trial.asked, state=self.optuna.trial.TrialState.PRUNED)

    def fail(self, trial: Trial, seconds: float, reason: str) -> None:
        """A trial could not be trained to its end; for the sampler it is worse than any other."""
        self._note(trial, seconds, reason)
        trial.asked.set_user_attr("failed", True)
        # What has state FAIL is forgotten by the sampler, which would ask for the same encoder or batch size over and
        # over.
        self.study.tell(trial.asked, state=self.optuna.trial.TrialState.PRUNED)

    def _note(self, trial: Trial, seconds: float, reason: str) -> None:
        trial.asked.set_user_attr("seconds", round(seconds, 3))
        trial.asked.set_user_attr("reason", reason)

    def outcomes(self) -> list[Outcome]:
        """Every ended trial by number; of an interrupted one only its continuation."""
        continued = self._continued()
        found = [
            self._outcome(trial)
            for trial in self.study.get_trials(deepcopy=False)
            if trial.state.is_finished() and "number" in trial.user_attrs and trial.number not in continued
        ]
        return sorted(found, key=lambda outcome: outcome.number)

    def _outcome(self, trial: optuna.trial.FrozenTrial) -> Outcome:
        state = (
            "failed"
            if "failed" in trial.user_attrs
            else {"COMPLETE": "complete", "PRUNED": "pruned"}.get(trial.state.name, "failed")
        )
        curve = {step: value for step, value in sorted(trial.intermediate_values.items()) if step < FOLD_STEPS}
        words = {
            dimension.key: written(trial.params[dimension.key])
            for dimension in self.space
            if dimension.key in trial.params
        }
        attrs = trial.user_attrs
        value = trial.value if state != "failed" else None
        return Outcome(attrs["number"], state, words, value, attrs.get("seconds", 0.0), attrs.get("reason", ""), curve)

    def importance(self) -> dict[str, float]:
        """The share of each setting in how much the Dice of complete trials differs; empty where they are too few or
        all alike.
        """
        done = [outcome for outcome in self.outcomes() if outcome.state == "complete"]
        if len(done) < LEAST_TRIALS or len({outcome.value for outcome in done}) < 2 or len(self.space) < 2:
            return {}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                evaluator = self.optuna.importance.FanovaImportanceEvaluator(seed=self.seed)
                return self.optuna.importance.get_param_importances(self.study, evaluator=evaluator)
        except (RuntimeError, ValueError, ImportError) as error:
            log.debug("no importance: %s", error)
            return {}


class Watch:
    """What a training calls after every epoch. Raises Pruned when the trial is not worth going on."""

    def __init__(self, trial: Trial, folds: Sequence[int]) -> None:
        self.trial, self.folds = trial, list(folds)

    def __call__(self, fold: int, row: Row) -> None:
        """Tell the study the Dice of an epoch, if it was validated."""
        if "dice" not in row:
            return
        self.trial.asked.report(float(row["dice"]), self.folds.index(fold) * FOLD_STEPS + int(row["epoch"]))
        if self.trial.asked.should_prune():
            raise Pruned(f"below the median after epoch {row['epoch']:g} of fold {fold}, Dice {row['dice']:.4f}")

    def catch_up(self, run: Path) -> None:
        """Report what an interrupted trial had reached; its training calls only for new epochs."""
        for fold in self.folds:
            path = run / f"fold{fold}" / METRICS_FILE
            for row in read_rows(path) if path.is_file() else []:
                self(fold, row)


def import_optuna() -> Any:
    """The module optuna, silent but for warnings. Raises HubmapError where it is not installed."""
    try:
        module = importlib.import_module("optuna")
    except ImportError as error:
        raise HubmapError("optuna, which searches, is not installed; pip install 'hubmap-kit[tune]'") from error
    module.logging.set_verbosity(module.logging.WARNING)
    return module
