"""What a hyper-parameter search may choose from: settings and their values, written on the command line or in a YAML
file.

One dimension is `section.key=...` with, after the equals sign, `log:LOW:HIGH` or `float:LOW:HIGH` (a number in between,
drawn by its logarithm or by itself), `int:LOW:HIGH` or `int:LOW:HIGH:STEP` (whole numbers, both ends among them), or
choices joined by commas; a comma inside brackets belongs to its choice. In a YAML file the key is before the colon, and
choices may be a list.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from hubmap_kit.config import Experiment
from hubmap_kit.errors import ConfigError

if TYPE_CHECKING:
    import optuna

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
