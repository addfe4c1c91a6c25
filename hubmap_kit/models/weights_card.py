"""The card of a packed weights file: NAME.json beside NAME.safetensors, with what the encoder expects to see and where
it comes from.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from hubmap_kit.config import ModelConfig, Triple
from hubmap_kit.errors import WeightsError
from hubmap_kit.files import write_json

UNKNOWN = "unknown"
CLOSE = 1e-3  # of a mean or std in 0..1: cards and experiments round to three digits


@dataclass(frozen=True)
class Card:
    """Encoder name, input mean and std in 0..1 (RGB), source and tag of the weights, their licence, sha256 of the file,
    versions.
    """

    encoder: str
    mean: Triple
    std: Triple
    source: str
    tag: str
    licence: str
    sha256: str
    versions: dict[str, str]

    def write(self, weights: Path) -> Path:
        """Put the card beside a weights file; returns its path."""
        path = weights.with_suffix(".json")
        write_json(path, asdict(self))
        return path

    def check(self, weights: Path, config: ModelConfig) -> None:
        """Raise WeightsError where the file is not the packed one, or the experiment would show the encoder other
        numbers than it learnt from.
        """
        if sha256(weights) != self.sha256:
            raise WeightsError(
                f"{weights} is not the file that its card {weights.stem}.json was written for (other sha256); copy or"
                " pack both again"
            )
        if _differ(config.mean, self.mean) or _differ(config.std, self.std):
            raise WeightsError(
                f"{weights} expects inputs of mean {_words(self.mean)} and std {_words(self.std)}, but the experiment"
                f" has {_words(config.mean)} and {_words(config.std)}; add --set model.mean={_words(self.mean)} --set"
                f" model.std={_words(self.std)}"
            )


def read(weights: Path) -> Card | None:
    """The card beside a weights file, or None without one. Raises WeightsError where it is damaged."""
    path = weights.with_suffix(".json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"{path} is damaged ({type(error).__name__}); pack the weights again, or take the card away"
        ) from error
    try:
        texts = {key: str(values[key]) for key in ("encoder", "source", "tag", "licence", "sha256")}
        return Card(mean=triple(values["mean"]), std=triple(values["std"]), versions=dict(values["versions"]), **texts)
    except (KeyError, ValueError, TypeError) as error:
        raise WeightsError(
            f"{path} is no card of packed weights ({error}); pack them again with 'hubmap pretrained pack'"
        ) from error


def triple(values: Sequence[float]) -> Triple:
    """Three numbers for red, green and blue. Raises ValueError."""
    numbers = tuple(float(value) for value in values)
    if len(numbers) != 3:
        raise ValueError(f"{len(numbers)} numbers where red, green and blue have one each")
    return numbers  # type: ignore[return-value]


def sha256(path: Path) -> str:
    """The sha256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _differ(one: Triple, other: Triple) -> bool:
    return any(abs(a - b) > CLOSE for a, b in zip(one, other, strict=True))


def _words(values: Triple) -> str:
    return "[" + ",".join(f"{value:g}" for value in values) + "]"
