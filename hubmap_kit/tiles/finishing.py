"""The end of a conversion: its tables and manifest; and what an earlier one left in the same place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import pandas as pd

from hubmap_kit.competition.organs import ORGANS
from hubmap_kit.config import ScaleConfig, TilesConfig
from hubmap_kit.errors import StoreError
from hubmap_kit.files import atomic_path, write_json
from hubmap_kit.progress import bar
from hubmap_kit.tiles import store as files
from hubmap_kit.tiles.convert_config import ConvertConfig
from hubmap_kit.tiles.grid import plain_name
from hubmap_kit.tiles.store import TileStore

# A folder that grows under a temporary name, remembers which slides it holds, and takes its own name when it is
# complete.

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Growing:
    """`folder` becomes `final`; `journal` beside it has one entry a finished slide."""

    final: Path
    folder: Path
    journal: Path

    def done(self) -> set[int]:
        """The numbers of the slides that are finished."""
        return {int(path.stem) for path in self.journal.glob("[0-9]*.json")}

    def note(self, number: int, facts: Mapping[str, Any]) -> None:
        """Say that a slide is finished, and what later tables need to know of it."""
        write_json(self.journal / f"{number:06d}.json", facts)

    def entries(self) -> Iterator[dict[str, Any]]:
        """What was noted, in the order of the slides."""
        for path in sorted(self.journal.glob("[0-9]*.json")):
            yield json.loads(path.read_text(encoding="utf-8"))

    def forget_damaged(self) -> None:
        """Take slides out of the journal whose own files were taken away or changed between two runs."""
        for number, entry in zip(sorted(self.done()), list(self.entries()), strict=True):
            try:
                check_sizes(self.folder, entry["files"])
            except StoreError:
                (self.journal / f"{number:06d}.json").unlink()

    def finish(self) -> None:
        """Give the folder its name; a kill in between leaves a finished folder, and a journal that the next run
        removes.
        """
        os.replace(self.folder, self.final)
        shutil.rmtree(self.journal, ignore_errors=True)

    def drop(self) -> None:
        """Remove the folder and its journal."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.rmtree(self.journal, ignore_errors=True)


@contextmanager
def growing(final: Path, mark: str) -> Iterator[Growing]:
    """The growing folder of `final`, new or as an earlier run left it.

    Raises StoreError when another process is at it.
    """
    final = final.absolute()
    stem = f".{final.name}.{mark}"
    here = Growing(final, final.with_name(f"{stem}.growing"), final.with_name(f"{stem}.journal"))
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = final.with_name(f"{stem}.lock")
    with open(lock, "w") as handle:
        _lock(handle, final)
        _warn_of_others(final, here.folder)
        here.folder.mkdir(exist_ok=True)
        here.journal.mkdir(exist_ok=True)
        try:
            yield here
        finally:
            if not here.folder.exists():
                lock.unlink(missing_ok=True)


def discard(final: Path, mark: str) -> None:
    """Remove the journal of a folder that took its name just before its process was killed."""
    for word in ("journal", "lock"):
        left = final.absolute().with_name(f".{final.name}.{mark}.{word}")
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a finished conversion; None where there is none, or none that can be read."""
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (
        found
        if isinstance(found, dict) and isinstance(found.get("files"), dict) and isinstance(found.get("tables"), dict)
        else None
    )


def check_sizes(folder: Path, listed: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise StoreError naming the first listed file that is missing or of another size; nothing is read."""
    for name, facts in listed.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else -1
        if found != facts["bytes"]:
            state = "is missing" if found < 0 else f"has {found} bytes"
            raise StoreError(
                f"{path} {state} where {MANIFEST} says {facts['bytes']} bytes; delete {folder} and convert again"
            )


def _warn_of_others(final: Path, mine: Path) -> None:
    for other in sorted(final.parent.glob(f".{final.name}.*.growing")):
        if other != mine:
            log.warning(
                "%s is what a conversion with other settings or slides left; delete it if that is not running", other
            )


def _lock(handle: IO[str], final: Path) -> None:
    """Hold the lock until the process ends, however it ends."""
    try:
        import fcntl
    except ImportError:  # Windows: two conversions into one folder at a time are then not noticed
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise StoreError(
            f"{final} is being written by another process; wait for it, or choose another --out"
        ) from error


FOLDER_TABLE = "tiles.csv"
CLASSES = {"binary": ("background", "unit"), "organ": ("background", *ORGANS)}
_CHUNK = 1 << 20
_PLACES = ("id", "organ", "data_source", "um_per_px", "height", "width", "rows", "cols", "image_offset", "mask_offset")
_CUT_OUT = ("top", "left", "mask_kept")
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Counts:
    """What a conversion made: tiles (or pictures), tiles that min_tissue dropped, and the share of all mask pixels in
    the pictures.
    """

    slides: int
    tiles: int
    dropped: int
    dropped_with_mask: int
    mask_kept: float


@dataclass(frozen=True)
class Conversion:
    """A finished conversion: its folder, its mark, the table of its tiles (a file of the folder), and counts."""

    folder: Path
    mark: str
    table: str
    counts: Counts


def tiles_config(config: ConvertConfig) -> TilesConfig:
    """The grid of a tiled conversion, as a store takes it."""
    return TilesConfig(size=config.size, overlap=config.overlap)


def is_plain(config: ConvertConfig) -> bool:
    """Whether the tiles are all of their grid, the very table that training makes for itself."""
    return config.stored and config.tiled and config.edge == "pad" and config.min_tissue == 0


def table_name(config: ConvertConfig) -> str:
    """The file with a conversion's tiles.

    A choice of tiles has its own, so that it never changes what a training draws.
    """
    if not config.stored:
        return FOLDER_TABLE
    if not config.tiled:
        return files.SLIDES
    plain = plain_name(tiles_config(config))
    return (
        plain
        if is_plain(config)
        else f"{plain.removesuffix('.parquet')}-{config.edge}-tissue{config.min_tissue:g}.parquet"
    )


def open_conversion(folder: Path, config: ConvertConfig) -> TileStore:
    """The store of a tiled conversion with its own tiles.

    Raises StoreError when it is not there, or is another kind.
    """
    if not (config.stored and config.tiled):
        raise StoreError(
            f"{folder}: kind {config.kind} as {config.format} has no tiles in a store; choose kind grid or crop+grid"
            " and format store"
        )
    return TileStore(folder, tiles_config(config), "" if is_plain(config) else table_name(config))


def found(final: Path, mark: str, config: ConvertConfig) -> Conversion | None:
    """This very conversion, if it is finished in `final`.

    Raises StoreError when its files have not the size that they had.
    """
    manifest = read_manifest(final)
    facts = manifest["tables"].get(table_name(config)) if manifest and manifest.get("fingerprint") == mark else None
    if (
        manifest is None
        or facts is None
        or facts["convert"] != config.model_dump(mode="json") | {"format": facts["convert"]["format"]}
    ):
        return None
    check_sizes(final, manifest["files"])
    return Conversion(final, mark, table_name(config), Counts(**facts["counts"]))


def write_store(folder: Path, mark: str, config: ConvertConfig, entries: Sequence[Entry]) -> None:
    """Write what makes a folder of pixels a store: the table of its slides and store.json."""
    columns = _PLACES if config.kind == "grid" else _PLACES + _CUT_OUT
    pd.DataFrame([{key: entry[key] for key in columns} for entry in entries]).to_parquet(folder / files.SLIDES)
    meta = {
        "format": files.FORMAT,
        "fingerprint": mark,
        "slides": len(entries),
        "scale": ScaleConfig(reduce=config.reduce).model_dump(),
    }
    write_json(folder / files.META, meta)


def write_table(folder: Path, config: ConvertConfig, entries: Sequence[Entry]) -> Counts:
    """Write the table of a conversion's tiles, and count. Raises StoreError when there is no tile at all."""
    kept = float(sum(entry["mask_shown"] for entry in entries)) / max(1, sum(entry["mask_pixels"] for entry in entries))
    dropped, with_mask = (sum(entry[key] for entry in entries) for key in ("dropped", "dropped_with_mask"))
    tiles = sum(len(entry["tiles"]) for entry in entries)
    if not tiles:
        raise StoreError(
            f"no tile is left of {len(entries)} slides: size {config.size}, edge {config.edge} and min_tissue"
            f" {config.min_tissue:g} drop all of them; lower convert.min_tissue or convert.size"
        )
    path = folder / table_name(config)
    if is_plain(config):
        open_conversion(folder, config)
    elif config.stored and config.tiled:
        with atomic_path(path) as temporary:
            _store_table(entries, config.size).to_parquet(temporary)
    elif not config.stored:
        with atomic_path(path) as temporary:
            _folder_table(entries).to_csv(temporary, index=False, lineterminator="\n")
    return Counts(
        len(entries), tiles, dropped, with_mask, kept if any(entry["mask_pixels"] for entry in entries) else 1.0
    )


def write_manifest(
    folder: Path, mark: str, config: ConvertConfig, counts: Counts, listed: Mapping[str, Mapping[str, Any]]
) -> None:
    """Write manifest.json: every file's size and sha256, and what each table was made by.

    `listed` are files hashed already.
    """
    earlier = read_manifest(folder)
    tables = dict(earlier["tables"]) if earlier else {}
    tables[table_name(config)] = {
        "convert": config.model_dump(mode="json"),
        "classes": CLASSES[config.labels],
        "counts": asdict(counts),
    }
    known = {**(earlier["files"] if earlier else {}), **listed}
    present = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    new = [path for name, path in present.items() if name not in known]
    with bar(sum(path.stat().st_size for path in new), "manifest", "B") as progress:
        hashed = {
            name: known[name] if name in known else _hashed(path, progress.update) for name, path in present.items()
        }
    whole = {
        "fingerprint": mark,
        "tables": tables,
        "bytes": sum(facts["bytes"] for facts in hashed.values()),
        "files": dict(sorted(hashed.items())),
    }
    write_json(folder / MANIFEST, whole)


def remove_strangers(folder: Path, names: set[str]) -> None:
    """Remove what killed processes left in a growing folder: files that nobody lists."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder).as_posix() not in names:
            path.unlink()


def _store_table(entries: Sequence[Entry], size: int) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "slide": number,
                "id": entry["id"],
                "y": tile["y"],
                "x": tile["x"],
                "row": tile["row"],
                "col": tile["col"],
                "size": size,
                "foreground": tile["foreground"],
                "tissue": tile["tissue"],
            }
            for number, entry in enumerate(entries)
            for tile in entry["tiles"]
        ]
    )


def _folder_table(entries: Sequence[Entry]) -> pd.DataFrame:
    """One row a tile. y, x, um_per_px: its place on the slide in original pixels, and the width of its own pixels in
    um.
    """
    return pd.DataFrame(
        [
            {
                "image": names[0],
                "mask": names[1],
                "id": entry["id"],
                "organ": entry["organ"],
                "data_source": entry["data_source"],
                "um_per_px": round(entry["um_per_px"] * entry["per_row"], 6),
                "y": tile["y"],
                "x": tile["x"],
                "row": tile["row"],
                "col": tile["col"],
                "height": entry["tile_rows"],
                "width": entry["tile_cols"],
                "foreground": tile["foreground"],
                "tissue": tile["tissue"],
            }
            for entry in entries
            for names, tile in zip(entry["names"], entry["tiles"], strict=True)
        ]
    )


def _hashed(path: Path, update: Any) -> dict[str, Any]:
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK):
            digest.update(chunk)
            update(len(chunk))
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}
