"""Loading and showing experiment files: shipped YAMLs by name, others by path, `--set` overrides on top."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from hubmap_kit.config import Experiment
from hubmap_kit.errors import ConfigError, did_you_mean


class _Loader(yaml.SafeLoader):
    """A safe loader that reads 3e-4 as a number; YAML 1.1 wants a dot in it and makes it text otherwise."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)
NETWORK = "net-"  # how experiments begin that are about one network each


def shipped() -> dict[str, Path]:
    """The experiment files inside the package, by name."""
    folder = Path(str(resources.files("hubmap_kit") / "configs"))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def offered() -> str:
    """The shipped experiments in words for a sentence; the many that only name a network are one of them."""
    own = [name for name in shipped() if not name.startswith(NETWORK)]
    return f"{', '.join(own)}, or {NETWORK}NAME for any network of 'hubmap models'"


def load(name_or_path: str, overrides: Sequence[str] = (), data: str = "") -> Experiment:
    """Load an experiment: the name of a shipped file or a path, then `section.key=value` overrides in order.

    `data`, if given, is the data folder, taken as it is: a path is not YAML.

    Raises ConfigError for an unknown name, malformed YAML, unknown keys, and values out of range.
    """
    path = _find(name_or_path)
    values = _read_yaml(path)
    for override in overrides:
        _apply(values, override)
    if data:
        _section(values, "data", "--data")["folder"] = data
    return parse(values, str(path))


def parse(values: dict[str, Any], origin: str) -> Experiment:
    """Check a nested dictionary; `origin` names the file in errors."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_sentence(error, origin)) from error


def read(path: Path) -> Experiment:
    """Read the resolved experiment of a run folder."""
    return parse(_read_yaml(path), str(path))


def dump(experiment: Experiment) -> dict[str, Any]:
    """The experiment as plain nested dictionaries, ready for YAML."""
    return experiment.model_dump(mode="json")


def described(experiment: Experiment) -> Iterator[str]:
    """Lines of YAML with every key's description as a comment."""
    yield f"name: {_scalar(experiment.name)}"
    for section in list(Experiment.model_fields)[1:]:
        yield ""
        yield from _described_section(section, getattr(experiment, section), "")


def _described_section(name: str, section: BaseModel, indent: str) -> Iterator[str]:
    yield f"{indent}{name}:  # {(type(section).__doc__ or '').strip().splitlines()[0]}"
    plain = section.model_dump(mode="json")
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            yield from _described_section(key, value, indent + "  ")
        else:
            yield f"{indent}  {key}: {_scalar(plain[key])}  # {field.description}"


def _scalar(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=1000).strip().removesuffix("...").strip()


def _find(name_or_path: str) -> Path:
    known = shipped()
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    raise ConfigError(
        f"no experiment '{name_or_path}': it is neither a file nor one of the shipped"
        f" {offered()}{did_you_mean(name_or_path, known)}"
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError as error:
        raise ConfigError(f"{path} does not exist; expected an experiment file (YAML)") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        where = getattr(error, "problem_mark", None)
        line = f" near line {where.line + 1}" if where else ""
        raise ConfigError(
            f"{path} is not valid YAML{line}; mend the file, or start from 'hubmap config baseline'"
        ) from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path} holds a {type(values).__name__} at its top level; expected sections such as 'training:'"
        )
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(
            f"--set {override} has no 'section.key=value' form; write for instance --set training.lr=3e-4"
        )
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value after '=' is not valid YAML; quote it") from error
    node = values
    for part in parts[:-1]:
        node = _section(node, part, f"--set {override}")
    # An empty value means the empty string: --set model.encoder_weights= takes the weights away again.
    node[parts[-1]] = "" if value is None and text.strip() == "" else value


def _section(values: dict[str, Any], key: str, origin: str) -> dict[str, Any]:
    node = values.setdefault(key, {})
    if not isinstance(node, dict):
        raise ConfigError(f"{origin}: '{key}' is a value, not a section")
    return node


def _keys_at(location: tuple[Any, ...]) -> list[str]:
    """The keys of the section at a place of an experiment; none where there is no section."""
    model: Any = Experiment
    for part in location:
        if get_origin(model) is dict:  # exceptions by organ
            model = get_args(model)[1]
            continue
        field = model.model_fields.get(part) if _is_section(model) else None
        model = field.annotation if field else None
    return list(model.model_fields) if _is_section(model) else []


def _is_section(model: Any) -> bool:
    return isinstance(model, type) and issubclass(model, BaseModel)


def _sentence(error: ValidationError, origin: str) -> str:
    first = error.errors()[0]
    location = first["loc"]
    key = ".".join(str(part) for part in location)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        keys = _keys_at(location[:-1])
        return (
            f"{origin}: unknown key '{key}'; expected one of"
            f" {', '.join(keys)}{did_you_mean(str(location[-1]), keys)}{more}"
        )
    found = repr(first.get("input"))
    found = found if len(found) <= 80 else found[:77] + "..."
    return f"{origin}: {key} is {found}: {first['msg'].removeprefix('Value error, ')}{more}"
