"""Staged datasets: flat folders in build/datasets/<kind>, ready to be uploaded as they are, each with its
BUILD_ID.json.

Every function takes the dataset's folder `out` (default: datasets/<kind> in `root.build_folder()`) and returns it. The
folder is built under a temporary name and swapped in when it is complete; the same input gives the same build id. A
former staged dataset is replaced, any other folder is refused. dataset-metadata.json, which names the account, is added
when it is pushed.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hubmap_kit.build_id import FILE, METADATA, describe, flat_name, unfold, write
from hubmap_kit.errors import PublishError, StoreError
from hubmap_kit.files import atomic_path, sweep, write_json, write_yaml
from hubmap_kit.publish.root import build_folder

# Dataset folders on their way up: built under a temporary name, flat, and free of what Kaggle would change or leave
# out.

MOST_FILES = 50  # of one dataset, at its top level
ARCHIVES = (
    ".zip",
    ".tar",
    ".tar.gz",
    ".tgz",
    ".gz",
    ".bz2",
    ".tar.bz2",
    ".tbz2",
    ".xz",
    ".7z",
)  # unpacked by the server, or reported to be
ZIPPED_WEIGHTS = (".pt", ".pth")  # zip files inside; Kaggle was seen to unpack some
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_LINKED = 1 << 20  # bytes from which a file is linked instead of copied


@contextmanager
def fresh_folder(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out` that takes its place when the block succeeds.

    Raises PublishError where `out` is no dataset.
    """
    out = out.resolve()
    if out.exists() and not (out.is_dir() and ((out / FILE).is_file() or not any(out.iterdir()))):
        raise PublishError(
            f"{out} exists and is no staged dataset (it has no {FILE}); choose another --out, nothing is overwritten"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    sweep(out.parent, f".{out.name}.*.tmp")
    growing, former = (out.with_name(f".{out.name}.{word}.{os.getpid()}.tmp") for word in ("new", "old"))
    growing.mkdir()
    try:
        yield growing
        if out.exists():
            os.replace(out, former)
        os.replace(growing, out)
    finally:
        for left in (growing, former):
            shutil.rmtree(left, ignore_errors=True)


@dataclass
class Growing:
    """A dataset folder while it is filled: `paths` has the logical path of every flat name, `before_end` what looks at
    the whole.
    """

    folder: Path
    paths: dict[str, str] = field(default_factory=dict)
    before_end: list[Callable[[Path], None]] = field(default_factory=list)

    def place(self, path: str) -> Path:
        """Where the file of a logical path goes.

        Raises PublishError for odd names, and when two files would travel under one name.
        """
        for part in path.split("/"):
            if not _PLAIN.fullmatch(part):
                raise PublishError(
                    f"'{part}' cannot be a name in a dataset; use letters, digits, '.', '_' and '-', with a letter or"
                    " digit first"
                )
        name = flat_name(path)
        if name in self.paths:
            raise PublishError(f"'{path}' and '{self.paths[name]}' would both travel as {name}; rename one")
        self.paths[name] = path
        return self.folder / name

    def add(self, source: Path, path: str) -> None:
        """Bring a file in under its logical path."""
        target = self.place(path)
        if not source.is_file():
            raise PublishError(f"{source} does not exist or is not a file; expected it to stage")
        put(source, target)


def put(source: Path, target: Path) -> None:
    """Bring a file into a dataset folder: big ones as hard links where the file system can, so nothing is stored
    twice.
    """
    source = source.resolve()
    if source.stat().st_size >= _LINKED:
        try:
            os.link(source, target)
            return
        except OSError:
            pass  # another file system, or one without hard links
    shutil.copyfile(source, target)


def check_flat(folder: Path) -> None:
    """Raise PublishError where Kaggle would leave out, unpack or refuse a file of the folder."""
    uploaded = sorted(path for path in folder.iterdir() if path.name != METADATA)
    for path in uploaded:
        if not path.is_file():
            raise PublishError(f"{path} is not a file; the client leaves sub-folders out, so a dataset must be flat")
        if path.name.lower().endswith(ARCHIVES):
            raise PublishError(
                f"{path} is an archive, which Kaggle unpacks when it is uploaded; ship wheels and plain files only"
            )
        if path.suffix.lower() in ZIPPED_WEIGHTS:
            raise PublishError(
                f"{path} is a torch file, which Kaggle may unpack like a zip file; ship weights as .safetensors"
            )
    if len(uploaded) > MOST_FILES:
        raise PublishError(
            f"{folder} holds {len(uploaded)} files where Kaggle takes {MOST_FILES} in a dataset; put less into it"
        )


log = logging.getLogger(__name__)
# Beside config.yaml, where the run has them.
RUN_FILES = (
    "thresholds.json",
    "postprocess.json",
    "stain_references.json",
    "oof.csv",
    "folds.csv",
    "metrics.csv",
    "environment.json",
)
LOCAL_PATHS = (("data", "folder"), ("data", "folds_csv"), ("model", "encoder_weights"))
PICKLED = (".pth", ".pt", ".bin")


def stage_code(repository: Path, out: Path | None = None, allow_dirty: bool = False) -> Path:
    """Build the wheel of the checkout `repository` and stage it with the vendored wheels. Raises PublishError."""
    from hubmap_kit.publish.bundle import build_bundle

    folder = out or build_folder(repository) / "datasets" / "code"
    build_bundle(folder, allow_dirty, repository)
    return folder


def stage_weights(
    runs: Sequence[Path],
    out: Path | None = None,
    names: Sequence[str] | None = None,
    allow_unfinished: bool = False,
    blend: Path | None = None,
) -> Path:
    """Stage what inference and a look at a run need: config, thresholds, tables and the weights of each fold; no
    checkpoints.

    `names` are the runs' names in the dataset, by default those of their folders. `allow_unfinished` takes the best
    epoch so far of folds that are not done. `blend` is a blend.json, or its folder, whose runs, in its order, are
    `runs`; it travels along, with the runs' names in the dataset in place of their paths. Raises PublishError, and
    CheckpointError for a folder that is no run.
    """
    if names is not None and len(names) != len(runs):
        raise PublishError(f"{len(names)} names were given for {len(runs)} runs; give one for each run, or none")
    called = list(names) if names is not None else [run.resolve().name for run in runs]
    _check_distinct(called, runs, "give them other names")
    from hubmap_kit.inference.blend import BLEND_FILE, published

    with _staged("weights", runs, out) as growing:
        for run, name in zip(runs, called, strict=True):
            config = _public_config(run)
            for source in _run_files(run, allow_unfinished):
                growing.add(source, f"{name}/{source.relative_to(run).as_posix()}")
            write_yaml(growing.place(f"{name}/config.yaml"), config)
        if blend is not None:
            write_json(growing.place(BLEND_FILE), published(blend, called))
    return _folder("weights", out)


def stage_tiles(stores: Sequence[Path], out: Path | None = None) -> Path:
    """Stage finished tile stores, each under its fingerprint, by which readers look for it.

    Raises PublishError and StoreError.
    """
    from hubmap_kit.tiles.store import IMAGES, MASKS, META, SLIDES

    marks = [_fingerprint(store / META) for store in stores]
    _check_distinct(marks, stores, "they were made from the same slides at the same scale, so one is enough")
    with _staged("tiles", stores, out) as growing:
        for store, mark in zip(stores, marks, strict=True):
            for source in [
                *(store / name for name in (META, SLIDES, IMAGES, MASKS)),
                *sorted(store.glob("tiles-*.parquet")),
            ]:
                growing.add(source, f"{mark}/{source.name}")
        growing.before_end.append(lambda folder: _open_stores(folder, marks))
    return _folder("tiles", out)


def stage_pretrained(files: Sequence[Path], out: Path | None = None) -> Path:
    """Stage encoder weights as safetensors, with their cards; a folder stands for all of its safetensors files.

    Torch files are read without running their code and written anew. Raises PublishError, and WeightsError for a file
    that is damaged or no table of tensors.
    """
    with _staged("pretrained", files, out) as growing:
        for source in _weights_files(files):
            if source.suffix not in (".safetensors", *PICKLED):
                raise PublishError(
                    f"{source} is no weights file by its name; expected .safetensors or {', '.join(PICKLED)}"
                )
            _add_weights(growing, source)
            card = source.with_suffix(".json")
            if source.suffix == ".safetensors" and card.is_file():
                growing.add(card, card.name)
    return _folder("pretrained", out)


def _weights_files(given: Sequence[Path]) -> Iterator[Path]:
    for source in given:
        found = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
        if not found:
            raise PublishError(
                f"{source} holds no .safetensors file; name a folder that 'hubmap pretrained pack' has filled, or files"
            )
        yield from found


@contextmanager
def _staged(kind: str, sources: Sequence[Path], out: Path | None) -> Iterator[Growing]:
    """A dataset that grows, gets its BUILD_ID.json and is checked when the block ends, and only then takes its
    place.
    """
    if not sources:
        raise PublishError(f"nothing was given to stage as {kind}; name at least one path")
    with fresh_folder(_folder(kind, out)) as folder:
        growing = Growing(folder)
        yield growing
        check_flat(folder)
        build = describe(kind, folder, growing.paths)
        write(folder, build)
        check_flat(folder)
        for check in growing.before_end:
            check(folder)
    log.info("%s staged in %s: %d files", build.build_id, _folder(kind, out), len(build.files))


def _folder(kind: str, out: Path | None) -> Path:
    return out or build_folder() / "datasets" / kind


def _check_distinct(names: Sequence[str], sources: Sequence[Path], advice: str) -> None:
    for number, name in enumerate(names):
        first = names.index(name)
        if first != number:
            raise PublishError(
                f"{sources[first]} and {sources[number]} would both be '{name}' in the dataset; {advice}"
            )


def _run_files(run: Path, allow_unfinished: bool) -> list[Path]:
    """The files of a run to stage besides config.yaml, which is written anew."""
    from hubmap_kit.inference.ensemble import MODEL_FILE, fold_folders, run_settings
    from hubmap_kit.training.history import unfinished

    folds = fold_folders(run)
    if not folds:
        raise PublishError(f"{run} holds no trained fold (fold<k>/{MODEL_FILE}); train it first")
    open_folds = "" if allow_unfinished else ", ".join(unfinished(run, run_settings(run).training).values())
    if open_folds:
        raise PublishError(
            f"{run} is not trained to its end ({open_folds}); go on with 'hubmap train --out {run} --resume', or add"
            " --allow-unfinished"
        )
    weights = [folder / MODEL_FILE for folder in folds.values()]
    for path in weights:
        _check_safetensors(path)
    return [*(run / name for name in RUN_FILES if (run / name).is_file()), *weights]


def _public_config(run: Path) -> dict[str, Any]:
    """A run's config.yaml with the paths of this machine cut to their last names; inference reads none of them."""
    from hubmap_kit import experiment
    from hubmap_kit.inference.ensemble import run_settings

    values = experiment.dump(run_settings(run))
    for section, key in LOCAL_PATHS:
        values[section][key] = re.split(r"[/\\]", values[section][key].rstrip("/\\"))[-1]
    return values


def _fingerprint(meta: Path) -> str:
    """The fingerprint that a finished store's store.json names. Raises StoreError when there is none."""
    try:
        return str(json.loads(meta.read_text(encoding="utf-8"))["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{meta.parent} is not a finished tile store ({meta.name}: {type(error).__name__}); build it again"
        ) from error


def _open_stores(folder: Path, marks: Sequence[str]) -> None:
    """Open every staged store as a kernel will. Raises StoreError when one is incomplete."""
    from hubmap_kit.config import TilesConfig
    from hubmap_kit.tiles.store import TileStore

    with tempfile.TemporaryDirectory() as temporary:
        tree = unfold(folder, Path(temporary))
        for mark in marks:
            # A grid that the store has already costs nothing to open.
            names = (
                re.fullmatch(r"tiles-(\d+)-([\d.]+)\.parquet", path.name)
                for path in sorted((tree / mark).glob("tiles-*"))
            )
            grids = [TilesConfig(size=int(name[1]), overlap=float(name[2])) for name in names if name]
            TileStore(tree / mark, grids[0] if grids else TilesConfig())


def _add_weights(growing: Growing, source: Path) -> None:
    if source.suffix == ".safetensors":
        _check_safetensors(source)
        growing.add(source, source.name)
        return
    from safetensors.torch import save_file

    from hubmap_kit.models.pretrained import read_tensors

    tensors = {name: value.contiguous().clone() for name, value in read_tensors(source).items()}
    target = growing.place(f"{source.stem}.safetensors")
    with atomic_path(target) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
    log.info("%s is written as %s: Kaggle may unpack torch files", source, target.name)


def _check_safetensors(path: Path) -> None:
    """Read the header, which says how long the file must be."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "numpy") as handle:
            handle.keys()
    except (SafetensorError, OSError) as error:
        raise PublishError(
            f"{path} is missing or no undamaged safetensors file ({str(error)[:100]}); copy it or train it again"
        ) from error
