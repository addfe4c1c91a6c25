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
    settings = experiment.load(
        "baseline", ["training.lr=3e-4", "training.lr=5e-4", "inference.thresholds={lung: 0.1}", "model.options={}"]
    )
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


def test_an_exception_for_an_organ_changes_only_what_it_names() -> None:
    settings = experiment.parse(
        {
            "scale": {"policy": "physical", "um_per_px": 0.8, "organs": {"prostate": {"um_per_px": 1.6}}},
            "augment": {
                "pipeline": "strong",
                "stain": "jitter",
                "zoom": [0.5, 2],
                "organs": {"lung": {"zoom": [0.8, 1.2]}},
            },
            "inference": {"postprocess": {"fill_holes": True, "organs": {"spleen": {"shrink": 3}}}},
        },
        "here",
    )
    assert (
        settings.scale.of("prostate").policy,
        settings.scale.of("prostate").um_per_px,
        settings.scale.of("lung").um_per_px,
    ) == ("physical", 1.6, 0.8)
    assert (
        settings.augment.of("lung").stain,
        settings.augment.of("lung").zoom,
        settings.augment.of("kidney").zoom,
    ) == ("jitter", (0.8, 1.2), (0.5, 2.0))
    assert settings.inference.postprocess.organs["spleen"].model_dump() == {
        "fill_holes": True,
        "opening": 0,
        "min_area": 0.0,
        "shrink": 3,
        "rescue": False,
    }
    # What a run keeps is complete, so a later change of what is common does not reach into it.
    again = experiment.parse(experiment.dump(settings), "there")
    assert again == settings


def test_an_unknown_key_of_an_organ_is_named() -> None:
    with pytest.raises(ConfigError, match=r"augment.organs.lung.zom.*did you mean 'zoom'"):
        experiment.load("baseline", ["augment.organs.lung.zom=1"])
    with pytest.raises(ConfigError, match="zoom goes from 2 to 1; put the smaller number first"):
        experiment.load("baseline", ["augment.zoom=[2, 1]"])
