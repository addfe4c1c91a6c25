"""Experiment files: every shipped one loads, overrides land where they should, mistakes are named."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import yaml

from hubmap_kit import experiment
from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import Experiment, OrganName, Section
from hubmap_kit.errors import ConfigError


@pytest.mark.parametrize("name", sorted(experiment.shipped()))
def test_every_shipped_file_loads_and_bears_its_own_name(name: str) -> None:
    assert experiment.load(name).name == name


def test_the_organ_names_are_the_competitions() -> None:
    assert get_args(OrganName) == ORGANS


@pytest.mark.parametrize("name", sorted(experiment.shipped()))
def test_what_is_dumped_loads_as_the_same_experiment(name: str, tmp_path: Path) -> None:
    settings = experiment.load(name)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(experiment.dump(settings)))
    assert experiment.read(path) == settings


@pytest.mark.parametrize("name", sorted(experiment.shipped()))
def test_the_described_listing_is_yaml_of_the_same_experiment(name: str, tmp_path: Path) -> None:
    path = tmp_path / "listing.yaml"
    path.write_text("\n".join(experiment.described(experiment.load(name))))
    assert experiment.read(path) == experiment.load(name)


def test_every_key_has_a_description() -> None:
    for name, section in Experiment.model_fields.items():
        model = section.annotation
        if isinstance(model, type) and issubclass(model, Section):
            assert model.__doc__, name
            for key, field in model.model_fields.items():
                assert field.description, f"{name}.{key}"


def test_overrides_apply_in_order_and_reach_nested_keys() -> None:
    settings = experiment.load("baseline", ["training.lr=3e-4", "training.lr=5e-4", "inference.thresholds={lung: 0.1}", "model.options={}"])
    assert settings.training.lr == 5e-4
    assert settings.inference.thresholds == {"lung": 0.1}


def test_an_empty_override_takes_a_text_away() -> None:
    settings = experiment.load("baseline", ["model.encoder_weights=x.pth", "model.encoder_weights="])
    assert settings.model.encoder_weights == ""


def test_experiments_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        experiment.load("baseline").training.lr = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.lrr=1", ["training.lrr", "did you mean 'lr'"]),
        ("trainin.lr=1", ["trainin", "did you mean 'training'"]),
        ("training.lr=-1", ["training.lr", "-1", "greater than 0"]),
        ("training.lr=fast", ["training.lr", "fast", "number"]),
        ("tiles.size=100", ["tiles.size", "100", "multiple of 32"]),
        ("scale.reduce=3", ["scale.reduce", "3", "1, 2 or 4"]),
        ("model.std=[0, 1, 1]", ["std", "above 0"]),
        ("inference.thresholds={liver: 0.4}", ["liver", "kidney"]),
        ("inference.thresholds={lung: 1.5}", ["lung", "1.5", "less than 1"]),
        ("data.n_folds=1", ["data.n_folds", "1", "greater than or equal to 2"]),
        ("training.lr=.nan", ["training.lr", "finite"]),
        ("training", ["section.key=value"]),
        ("training.lr.x=1", ["lr", "is a value, not a section"]),
    ],
)
def test_a_wrong_override_is_named(override: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        experiment.load("baseline", [override])
    for word in words:
        assert word in str(error.value)
