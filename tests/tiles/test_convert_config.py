"""Conversions by name, by file and by --set; every mistake is one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from hubmap_kit.errors import ConfigError
from hubmap_kit.tiles.convert_config import PRESETS, ConvertConfig, load


def test_every_preset_is_a_conversion() -> None:
    assert {"3000-512-r2", "2048-768-r1", "resize-512", "bg0", "bg30"} <= set(PRESETS)
    for name, values in PRESETS.items():
        assert load(name) == ConvertConfig(**values)


def test_overrides_go_on_top_of_a_file_in_order(tmp_path: Path) -> None:
    path = tmp_path / "tiles.yaml"
    path.write_text("convert:\n  kind: crop\n  canvas: 1024\n  keep_scale: true\n")
    found = load(str(path), ["convert.canvas=2048", "convert.kind=crop+grid", "convert.canvas=4096"])
    assert (found.kind, found.canvas, found.keep_scale, found.size) == ("crop+grid", 4096, True, 512)
    assert load() == ConvertConfig()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("convert.kind=gird", "did you mean 'grid'"),
        ("convert.sise=5", "did you mean 'convert.size'"),
        ("convert.size=0", "convert.size is 0"),
        ("convert.size=100", "multiple of 32"),
        ("convert.reduce=3", "convert.reduce is 3"),
        ("convert.overlap=1", "convert.overlap is 1"),
        ("convert.min_tissue=1.5", "convert.min_tissue is 1.5"),
        ("convert.pad=black", "convert.pad is 'black'"),
        ("convert.labels=", "convert.labels is None"),
        ("convert.format=tfrecord", "'store', 'png', 'jpeg', 'mmseg' or 'dataset'"),
        ("training.lr=1", "'convert.key=value'"),
        ("convert.size", "'convert.key=value'"),
        ("convert.size=[", "not valid YAML"),
    ],
)
def test_a_wrong_setting_is_one_sentence(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=".") as caught:
        load("", [override])
    assert said in str(caught.value) and "\n" not in str(caught.value) and override in str(caught.value)


def test_settings_that_contradict_each_other() -> None:
    with pytest.raises(ConfigError, match="min_tissue chooses tiles, but kind resize"):
        load("", ["convert.kind=resize", "convert.min_tissue=0.5"])
    with pytest.raises(ConfigError, match="smaller than one tile"):
        load("", ["convert.kind=crop+grid", "convert.canvas=500"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- 1\n", "list"),
        ("kind: grid\n", "holds kind"),
        ("convert: 3\n", "section 'convert:'"),
        ("convert: {\n", "not valid YAML"),
        ("", "NoneType"),
    ],
)
def test_a_file_without_the_section(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "wrong.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=str(path)) as caught:
        load(str(path))
    assert said in str(caught.value)


def test_an_unknown_name_gets_a_hint() -> None:
    with pytest.raises(ConfigError, match="did you mean '3000-512-r2'"):
        load("3000-512r2")
