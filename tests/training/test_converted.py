"""Learning from a conversion: which tiles are drawn, from which slides, and what does not go together."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import pytest
import torch
from tiny import TINY

from hubmap_kit import experiment
from hubmap_kit.competition.tables import read_train
from hubmap_kit.config import Experiment
from hubmap_kit.errors import ConfigError
from hubmap_kit.jobs.lr_find import lr_find
from hubmap_kit.training.dataset import TileDataset
from hubmap_kit.training.run import check_conversion, converted_store, plan, train_fold

PLAIN = (
    "scale.policy=reduce",
    "scale.reduce=4",
    "tiles.size=64",
    "augment.pipeline=none",
    "training.sampler=grid",
    "training.epochs=1",
)


def settings_of(data: Path, conversion: str, *changes: str) -> Experiment:
    return experiment.load("baseline", [*TINY, *PLAIN, f"data.conversion={conversion}", *changes], str(data))


def conversion_file(folder: Path, text: str) -> str:
    path = folder / "conversion.yaml"
    path.write_text(f"convert: {{{text}}}\n", encoding="utf-8")
    return str(path)


def test_only_the_kept_tiles_are_drawn(sample_data: Path, tmp_path: Path) -> None:
    slides = read_train(sample_data / "train.csv")
    shares = {}
    for least in (0, 0.2):
        name = conversion_file(tmp_path, f"kind: grid, size: 64, reduce: 4, min_tissue: {least}")
        store = converted_store(settings_of(sample_data, name), slides, tmp_path / "stores")
        assert store is not None
        dataset = TileDataset(store, range(len(slides)), settings_of(sample_data, name))
        drawn = {tuple(place) for place in dataset.places(range(len(dataset))).tolist()}
        assert drawn == set(store.tiles[["slide", "row", "col"]].itertuples(index=False, name=None))
        shares[least] = len(drawn)
    assert 0 < shares[0.2] < shares[0]


def test_a_fold_learns_from_the_canvas_and_is_judged_on_whole_slides(sample_data: Path, tmp_path: Path) -> None:
    name = conversion_file(tmp_path, "kind: crop+grid, size: 64, reduce: 4, canvas: 512")
    settings, slides = settings_of(sample_data, name), read_train(sample_data / "train.csv")
    planned = plan(settings, slides, tmp_path / "run", tmp_path / "stores", [0])
    assert planned.tiles is not None
    assert {planned.tiles.image(row).shape for row in range(len(slides))} == {(128, 128, 3)}
    train_fold(planned, 0, torch.device("cpu"))
    assert (tmp_path / "run" / "fold0" / "oof_counts.parquet").is_file()
    assert len({planned.store.image(row).shape for row in range(len(slides))} - {(128, 128, 3)}) > 0


def test_the_range_test_learns_from_the_conversion_too(sample_data: Path, tmp_path: Path) -> None:
    packed = tmp_path / "packed"
    shutil.copytree(sample_data, packed)
    with gzip.open(packed / "train.csv.gz", "wb") as file:
        file.write((packed / "train.csv").read_bytes())
    (packed / "train.csv").unlink()
    name = conversion_file(tmp_path, "kind: crop+grid, size: 64, reduce: 4, canvas: 512")
    tables = []
    for number, (data, conversion) in enumerate([(sample_data, "''"), (sample_data, name), (packed, name)]):
        settings = settings_of(data, conversion, "training.sampler=random")
        tables.append(
            lr_find(
                settings, tmp_path / str(number), steps=20, device="cpu", stores=tmp_path / "stores"
            ).table.read_bytes()
        )
    assert tables[0] != tables[1] == tables[2]


@pytest.mark.parametrize(
    ("text", "changes", "words"),
    [
        ("kind: grid, size: 128, reduce: 4", (), "tiles of 128 px and overlap 0, but tiles.size is 64"),
        (
            "kind: grid, size: 64, reduce: 2",
            (),
            "at reduce 2, but held-out slides would be predicted at another scale; set scale.policy=reduce",
        ),
        ("kind: grid, size: 64, reduce: 4, format: png", (), "format is png; training reads stores"),
    ],
)
def test_what_does_not_go_together_is_said(
    text: str, changes: tuple[str, ...], words: str, sample_data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=words):
        check_conversion(settings_of(sample_data, conversion_file(tmp_path, text), *changes))


def test_an_unknown_conversion_is_named(sample_data: Path) -> None:
    with pytest.raises(ConfigError, match="no conversion '2048-512': neither a file nor one of .*did you mean"):
        check_conversion(settings_of(sample_data, "2048-512"))
