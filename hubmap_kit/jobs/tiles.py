"""The tiles job: a folder of slides -> a conversion of them, or the counts of every conversion."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

from hubmap_kit import build_id
from hubmap_kit.competition.tables import Slide, read_train
from hubmap_kit.errors import KernelError, StoreError, TableError
from hubmap_kit.files import sweep
from hubmap_kit.tiles.conversion import conversion_mark, convert
from hubmap_kit.tiles.convert_config import ConvertConfig
from hubmap_kit.tiles.finishing import Conversion, found, open_conversion, read_manifest, table_name
from hubmap_kit.tiles.store import META
from hubmap_kit.tiles.writers import count_text

log = logging.getLogger(__name__)
WHAT = {
    "store": "tile store",
    "dataset": "Kaggle dataset",
    "png": "PNG folders",
    "jpeg": "JPEG folders",
    "mmseg": "img_dir/ and ann_dir/",
}


def tiles(data: Path, out: Path, config: ConvertConfig, jobs: int = 1) -> Conversion:
    """Convert the slides of `data` (a folder with train.csv and train_images/, or the table itself) into `out`.

    Killed at any point and run again, it goes on and leaves the same bytes. Raises TableError, SlideError, RleError,
    StoreError.
    """
    if jobs < 1:
        raise StoreError(f"--jobs is {jobs}; expected the number of processes, at least 1")
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out} is a file; name a folder with --out")
    slides = read_train(train_table(data))
    made = _dataset(slides, out, config, jobs) if config.format == "dataset" else convert(slides, out, config, jobs)
    _warn(made, config)
    return made


def summary(made: Conversion, config: ConvertConfig) -> str:
    """One line on what a conversion made, and where it is."""
    counts = made.counts
    pictures = f"{counts.tiles} tiles of {config.size} px" if config.tiled else f"{counts.tiles} pictures"
    return (
        f"{made.folder}: {WHAT[config.format]}, {pictures} from {counts.slides} slides; table {made.table}, sizes and"
        " hashes in manifest.json"
    )


def count(data: Path, config: ConvertConfig | None = None) -> str:
    """The tiles of every conversion of a table's slides, as text; no slide file is needed."""
    return count_text(read_train(train_table(data), check_files=False), config)


def train_table(data: Path) -> Path:
    """train.csv or train.csv.gz of a folder, or the file that was named. Raises TableError when there is none."""
    if data.is_dir():
        here = [path for path in (data / "train.csv", data / "train.csv.gz") if path.is_file()]
        if not here:
            raise TableError(
                f"{data} holds neither train.csv nor train.csv.gz; name the folder of the competition's data, or the"
                " table itself"
            )
        return here[0]
    if not data.is_file():
        raise TableError(f"{data} does not exist; name the folder of the competition's data, or its train.csv")
    return data


def _dataset(slides: list[Slide], out: Path, config: ConvertConfig, jobs: int) -> Conversion:
    """A store as a flat folder with its BUILD_ID.json, which `hubmap push tiles --staged` takes as it is."""
    out, mark = out.absolute(), conversion_mark(slides, config)
    stores = out.with_name(f".{out.name}.stores")
    if out.exists() and any(out.iterdir()) and not _is_dataset_of(out, mark, config):
        raise StoreError(
            f"{out} is not empty and not the dataset of these slides with these settings; choose another --out or"
            " delete it"
        )
    made = convert(slides, stores, config, jobs) if not _is_dataset_of(out, mark, config) else None
    if made is not None:
        _flatten(made.folder, out)
        shutil.rmtree(stores, ignore_errors=True)
    return _opened(out, mark, config)


def _is_dataset_of(out: Path, mark: str, config: ConvertConfig) -> bool:
    try:
        paths = {facts["path"] for facts in build_id.read(out).files.values()}
    except KernelError:
        return False
    return {f"{mark}/{META}", f"{mark}/{table_name(config)}"} <= paths


def _flatten(store: Path, out: Path) -> None:
    """Link a store's files under their flat names into a folder that takes its name when it is complete."""
    sweep(out.parent, f".{out.name}.*.tmp")
    flat = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    flat.mkdir()
    try:
        paths = {}
        for source in sorted(store.iterdir()):
            path = f"{store.name}/{source.name}"
            name = build_id.flat_name(path)
            _put(source, flat / name)
            paths[name] = path
        build_id.write(flat, build_id.describe("tiles", flat, paths))
        os.replace(flat, out)
    finally:
        shutil.rmtree(flat, ignore_errors=True)


def _put(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)


def _opened(out: Path, mark: str, config: ConvertConfig) -> Conversion:
    """Open the dataset as a kernel will. Raises KernelError and StoreError when it is not whole."""
    with tempfile.TemporaryDirectory() as temporary:
        store = build_id.unfold(out, Path(temporary)) / mark
        made = found(store, mark, config) if read_manifest(store) else None
        if made is None:
            raise StoreError(
                f"{out} is not the dataset of these slides with these settings; delete it and convert again"
            )
        if config.tiled:
            open_conversion(store, config)
    return Conversion(out, mark, made.table, made.counts)


def _warn(made: Conversion, config: ConvertConfig) -> None:
    counts = made.counts
    if counts.dropped:
        share = counts.dropped / (counts.dropped + counts.tiles)
        log.warning(
            "min_tissue %g dropped %d of %d tiles (%.1f %%), %d of them with a part of a unit",
            config.min_tissue,
            counts.dropped,
            counts.dropped + counts.tiles,
            100 * share,
            counts.dropped_with_mask,
        )
    if counts.mask_kept < 1:
        log.warning(
            "the canvas cut off %.2f %% of the mask's pixels; a larger convert.canvas or keep_scale=false keeps them",
            100 * (1 - counts.mask_kept),
        )
