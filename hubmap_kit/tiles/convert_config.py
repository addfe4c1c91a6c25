"""What a conversion makes of the slides: `convert:` of a YAML file, a preset's name, and `--set convert.key=value`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from hubmap_kit.config import Section, Share
from hubmap_kit.errors import ConfigError, did_you_mean

TILED = ("grid", "crop+grid")
CROPPED = ("crop", "crop+grid")


class ConvertConfig(Section):
    """One conversion of all slides."""

    kind: Literal["grid", "resize", "crop", "crop+grid", "pad"] = Field(
        "grid",
        description=(
            "grid: tiles; resize: the whole slide to `size`; crop: the tissue on a canvas, background removed;"
            " crop+grid: tiles of that canvas; pad: the whole slide, padded to a multiple of `size`"
        ),
    )
    size: int = Field(
        512, ge=32, description="side in pixels of a tile, of the resized slide, or of the padding's multiple"
    )
    reduce: Literal[1, 2, 4] = Field(
        1, description="integer downscale of the original pixels, of the canvas where there is one (not with resize)"
    )
    overlap: float = Field(0.0, ge=0, lt=0.9, description="share of a tile that its neighbour repeats")
    edge: Literal["pad", "shift", "drop"] = Field(
        "pad", description="what the last whole tile leaves over: a padded tile, one moved back to the edge, or none"
    )
    canvas: int = Field(2048, ge=64, description="side of the canvas in original pixels, before `reduce` (crop)")
    keep_scale: bool = Field(
        False,
        description=(
            "crop: keep the slide's scale, and cut what is larger than the canvas around its middle; else fit the"
            " tissue to it"
        ),
    )
    min_tissue: Share = Field(
        0.0,
        description=(
            "drop tiles with less tissue; 0: keep all, 0.7: at most 30 % background, 1: no background at all; what lies"
            " beyond the slide counts as background"
        ),
    )
    pad: Literal["reflect", "white", "mean"] = Field(
        "reflect", description="what fills a picture beyond the slide; the mask is mirrored or empty there"
    )
    labels: Literal["binary", "organ"] = Field("binary", description="mask values: 0/1, or the organ's index 1..5")
    format: Literal["store", "png", "jpeg", "mmseg", "dataset"] = Field(
        "store",
        description=(
            "store: the tile store; png, jpeg: folders images/ and masks/; mmseg: img_dir/ and ann_dir/; dataset: a"
            " store ready to be pushed"
        ),
    )
    val_fold: int = Field(
        0, ge=-1, le=4, description="mmseg: the fold of five that goes to val/; -1: all slides go to train/"
    )

    @model_validator(mode="after")
    def _fits(self) -> ConvertConfig:
        if self.min_tissue > 0 and not self.tiled:
            raise ValueError(
                f"min_tissue chooses tiles, but kind {self.kind} makes one picture of each slide; set it to 0 or kind"
                " to grid or crop+grid"
            )
        if round(self.canvas / self.reduce) < self.size and self.kind == "crop+grid":
            raise ValueError(
                f"a canvas of {self.canvas} px at reduce {self.reduce} is smaller than one tile of {self.size} px;"
                " enlarge canvas"
            )
        if self.stored and self.tiled and (self.size < 64 or self.size % 32):
            raise ValueError(
                "tiles of a store are what networks see, so size must be a multiple of 32 and at least 64, got"
                f" {self.size}"
            )
        return self

    @property
    def tiled(self) -> bool:
        """Whether pictures are cut into tiles."""
        return self.kind in TILED

    @property
    def cropped(self) -> bool:
        """Whether pictures are cut to the tissue first."""
        return self.kind in CROPPED

    @property
    def stored(self) -> bool:
        """Whether the result is a tile store rather than picture files."""
        return self.format in ("store", "dataset")

    @property
    def extends(self) -> bool:
        """Whether pictures are padded to the end of their grid; a store mirrors its edge tiles when they are read."""
        return self.tiled and not (self.stored and self.pad == "reflect")


def _first_team() -> Iterator[tuple[str, dict[str, Any]]]:
    for side, kind in ((3000, "grid"), (2048, "crop+grid")):
        for size in (256, 512, 768):
            for reduce in (1, 2, 4):
                if not (kind == "crop+grid" and size * reduce > 2048):
                    yield f"{side}-{size}-r{reduce}", {"kind": kind, "size": size, "reduce": reduce}
    yield "resize-512", {"kind": "resize", "size": 512}
    yield "bg0", {"kind": "grid", "size": 512, "min_tissue": 1.0}
    yield "bg30", {"kind": "grid", "size": 512, "min_tissue": 0.7}


# The sets that the competition's first team worked with, by name: side of the slide or canvas, tile, reduce.
PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(dict(_first_team()))


class _File(Section):
    convert: ConvertConfig = Field(default_factory=ConvertConfig)


def load(name_or_path: str = "", overrides: Sequence[str] = ()) -> ConvertConfig:
    """The conversion of a preset or a YAML file (its section `convert`), then `convert.key=value` overrides in order.

    Raises ConfigError for an unknown name, malformed YAML, unknown keys, and values that do not fit.
    """
    values = _values(name_or_path)
    for override in overrides:
        key, equals, text = override.partition("=")
        section, _, name = key.strip().partition(".")
        if not equals or section != "convert" or not name:
            raise ConfigError(
                f"--set {override} has no 'convert.key=value' form; write for instance --set convert.size=768"
            )
        values[name] = _yaml(text, f"--set {override}")
    return _checked(
        values, ", ".join([*([name_or_path] if name_or_path else []), *(f"--set {override}" for override in overrides)])
    )


def _values(name_or_path: str) -> dict[str, Any]:
    if not name_or_path or name_or_path in PRESETS:
        return dict(PRESETS.get(name_or_path, {}))
    path = Path(name_or_path)
    if not path.is_file():
        raise ConfigError(
            f"no conversion '{name_or_path}': neither a file nor one of"
            f" {', '.join(PRESETS)}{did_you_mean(name_or_path, PRESETS)}"
        )
    try:
        found = _yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text; expected a YAML file with a section 'convert:'") from error
    if not isinstance(found, dict) or set(found) != {"convert"} or not isinstance(found["convert"], dict):
        keys = ", ".join(map(str, found)) if isinstance(found, dict) else type(found).__name__
        raise ConfigError(
            f"{path} holds {keys} at its top level; expected the section 'convert:' alone, with keys such as 'kind:"
            " grid'"
        )
    return dict(found["convert"])


def _yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin} is not valid YAML; mend it") from error


def _checked(values: dict[str, Any], origin: str) -> ConvertConfig:
    try:
        return _File.model_validate({"convert": values}).convert
    except ValidationError as error:
        first = error.errors()[0]
    key, keys = ".".join(map(str, first["loc"])), list(ConvertConfig.model_fields)
    if first["type"] == "extra_forbidden":
        near = did_you_mean(str(first["loc"][-1]), keys, "convert.")
        raise ConfigError(f"{origin}: unknown key '{key}'; expected one of {', '.join(keys)}{near}")
    reason, found = first["msg"].removeprefix("Value error, "), first.get("input")
    if len(first["loc"]) == 1:  # the keys do not go together
        raise ConfigError(f"{origin}: {reason}")
    near = did_you_mean(
        str(found), (first.get("ctx") or {}).get("expected", "").replace("'", "").replace(" or ", ", ").split(", ")
    )
    raise ConfigError(f"{origin}: {key} is {found!r}: {reason}{near}")
