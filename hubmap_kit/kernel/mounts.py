"""What is attached to a kernel: the competition's data, published datasets, runs, tile stores.

Kaggle's paths have moved before (`/kaggle/input/<slug>`, then `/kaggle/input/datasets/<owner>/<slug>`), so everything
is found by what lies in it, at limited depth. Folders with very many entries, such as those of slides, are never gone
through.
"""

from __future__ import annotations

import itertools
import logging
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hubmap_kit import build_id
from hubmap_kit.competition.lenient import SAMPLE
from hubmap_kit.errors import KernelError
from hubmap_kit.inference.blend import BLEND_FILE
from hubmap_kit.inference.ensemble import MODEL_FILE, fold_folders
from hubmap_kit.tiles import store as tile_store

log = logging.getLogger(__name__)
COMPETITION = "hubmap-organ-segmentation"
TABLES = ("train.csv", "test.csv")
DEPTH = 6  # notebooks/<owner>/<slug>/stores/<fingerprint>, and one to spare
CROWD = 400  # more entries than this: a folder of pictures or the like
SHOWN = 40
WAIT_S, PAUSE_S = 60.0, 5.0  # for a dataset's new version, which may be mounted a little after a session's start


@dataclass(frozen=True)
class Folder:
    """A folder below the root of the mounts and the names in it; of a crowded one only some."""

    path: Path
    names: frozenset[str]


@dataclass(frozen=True)
class Inputs:
    """Everything below `root`, as it was when `scan` looked. Datasets are unfolded into `scratch` as symbolic links."""

    root: Path
    scratch: Path
    folders: list[Folder]
    datasets: dict[str, list[Path]] = field(default_factory=dict)

    def competition(self, tables: tuple[str, ...] = TABLES) -> Path:
        """The folder with these tables of the competition. Raises KernelError unless there is exactly one."""
        for known in (self.root / "competitions" / COMPETITION, self.root / COMPETITION):
            if all((known / name).exists() for name in tables):
                return known
        found = [folder.path for folder in self.folders if folder.names.issuperset(tables)]
        if len(found) != 1:
            seen = ", ".join(str(path) for path in found) or "none"
            raise KernelError(
                f"{self.root} holds {len(found)} folders with {' and '.join(tables)} ({seen}), expected one; attach the"
                f" competition {COMPETITION} and accept its rules; mounted are {self.tree()}"
            )
        return found[0]

    def test_table(self) -> Path:
        """test.csv of the competition; where it is not mounted, its place beside what else tells the ids.

        Raises KernelError as `competition`.

        A rerun need not mount what training uses.
        """
        for name in ("test.csv", SAMPLE, "test_images"):
            with suppress(KernelError):
                return self.competition((name,)) / "test.csv"
        return self.competition(("test.csv",))

    def runs(self) -> list[Path]:
        """All trained runs: folders in the outputs of kernels, and those of published weights, whose hashes are
        checked.

        A run whose weights are all in another one too, such as an earlier output of the same training, is left out.
        """
        found = [folder.path for folder in self.folders if "config.yaml" in folder.names and fold_folders(folder.path)]
        for dataset in self.datasets.get("weights", []):
            build = build_id.verify(dataset)
            unfolded = build_id.unfold(dataset, self.scratch / build.build_id)
            found += [path.parent for path in sorted(unfolded.glob("*/config.yaml")) if fold_folders(path.parent)]
        return _distinct(found)

    def blend(self) -> Path | None:
        """The blend.json of the published weights; None without one. Raises KernelError where several are attached."""
        found = []
        for dataset in self.datasets.get("weights", []):
            build = build_id.read(dataset)
            if any(facts["path"] == BLEND_FILE for facts in build.files.values()):
                found.append(build_id.unfold(dataset, self.scratch / build.build_id) / BLEND_FILE)
        if len(found) > 1:
            raise KernelError(
                f"{len(found)} attached datasets of weights hold a {BLEND_FILE}; attach the one that is to be used"
            )
        return found[0] if found else None

    def weights_ids(self) -> list[str]:
        """The builds of the published weights."""
        return [build_id.read(dataset).build_id for dataset in self.datasets.get("weights", [])]

    def run_to_resume(self, name: str) -> Path | None:
        """The run folder `name` in the output of a kernel, with its checkpoints; of several the one with most
        epochs.
        """
        found = [folder.path for folder in self.folders if folder.path.name == name and "config.yaml" in folder.names]
        begun = [path for path in found if any(path.glob("fold*/last.ckpt"))]
        return max(begun, key=_progress) if begun else None

    def store(self, fingerprint: str) -> Path | None:
        """The finished tile store with this fingerprint, or None."""
        for dataset in self.datasets.get("tiles", []):
            # Not hashed again: a store is gigabytes, and whoever opens it compares its sizes.
            build_id.unfold(dataset, self.scratch / build_id.read(dataset).build_id)
        unfolded = sorted(self.scratch.glob(f"tiles-*/*/{tile_store.META}"))
        candidates = [
            *(folder.path for folder in self.folders if tile_store.META in folder.names),
            *(path.parent for path in unfolded),
        ]
        return next((path for path in candidates if tile_store.is_finished(path, fingerprint)), None)

    def weights_file(self, name: str) -> Path:
        """The pretrained weights `name`; safetensors of the same name serve too.

        Raises KernelError unless there is one.

        Published datasets come first, and their hashes are checked.
        """
        wanted = {name, f"{Path(name).stem}.safetensors"}
        for dataset in self.datasets.get("pretrained", []):
            if any(Path(facts["path"]).name in wanted for facts in build_id.read(dataset).files.values()):
                build = build_id.verify(dataset)
                unfolded = build_id.unfold(dataset, self.scratch / build.build_id)
                return next(
                    unfolded / facts["path"] for facts in build.files.values() if Path(facts["path"]).name in wanted
                )
        found = [folder.path / match for folder in self.folders for match in sorted(wanted & folder.names)]
        if not found:
            raise KernelError(
                f"{name} is in none of the attached inputs; attach the pretrained dataset; mounted are {self.tree()}"
            )
        return found[0]

    def tree(self) -> str:
        """The folders at the top, for messages."""
        shown = [
            str(folder.path.relative_to(self.root))
            for folder in self.folders
            if len(folder.path.relative_to(self.root).parts) <= 3
        ]
        return ", ".join(shown[1:SHOWN]) or "no folders"


def inputs(root: Path, scratch: Path) -> Inputs:
    """Look through `root`; nothing is read but names and the small BUILD_ID.json files.

    `scratch` is for symbolic links.
    """
    folders = sorted(_walk(root, DEPTH), key=lambda folder: (len(folder.path.parts), folder.path))
    datasets: dict[str, dict[str, Path]] = {}
    for folder in folders:
        if build_id.FILE in folder.names:
            try:
                build = build_id.read(folder.path)
            except KernelError as error:
                log.warning("%s is left alone: %s", folder.path, error)
                continue
            datasets.setdefault(build.kind, {}).setdefault(build.build_id, folder.path)
    return Inputs(root, scratch, folders, {kind: list(found.values()) for kind, found in datasets.items()})


def with_weights(root: Path, scratch: Path, wanted: str) -> Inputs:
    """Look through `root` until the published weights of build `wanted` are mounted whole; "" takes what is there.

    Raises KernelError when they are not there after WAIT_S seconds.
    """
    deadline = time.monotonic() + WAIT_S
    while True:
        found = inputs(root, scratch)
        whole = {build_id.read(folder).build_id: _is_whole(folder) for folder in found.datasets.get("weights", [])}
        if not wanted or whole.get(wanted):
            return found
        if time.monotonic() >= deadline:
            break
        time.sleep(PAUSE_S)
    if wanted in whole:
        return found  # the file that is missing or cut off is named by whoever reads it
    held = f"the weights {', '.join(whole)}" if whole else "no published weights"
    raise KernelError(
        f"{root} holds {held}, expected build {wanted}: the dataset's new version has not propagated, or is not"
        " attached; run this again, or push weights and kernel again"
    )


def _is_whole(folder: Path) -> bool:
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == facts["bytes"]
        for name, facts in build_id.read(folder).files.items()
    )


def _walk(top: Path, depth: int) -> Iterator[Folder]:
    try:
        with os.scandir(top) as entries:
            seen = list(itertools.islice(entries, CROWD + 1))
            below = sorted(entry.path for entry in seen if entry.is_dir())
    except OSError:
        return
    yield Folder(top, frozenset(entry.name for entry in seen))
    if depth and len(seen) <= CROWD:
        for path in below:
            yield from _walk(Path(path), depth - 1)


def _distinct(runs: Iterable[Path]) -> list[Path]:
    """The runs, by name, without those whose weights another one holds as well."""
    hashes = {run: {build_id.sha256(folder / MODEL_FILE) for folder in fold_folders(run).values()} for run in runs}
    kept: list[Path] = []
    for run in sorted(hashes, key=lambda run: (-len(hashes[run]), run.name, str(run))):
        if any(hashes[run] <= hashes[other] for other in kept):
            log.info("%s is the same training as another attached run; it is used once", run)
        else:
            kept.append(run)
    return sorted(kept, key=lambda run: (run.name, str(run)))


def _progress(run: Path) -> tuple[int, int]:
    """Finished epochs of all folds, and folds begun; metrics.csv has one row an epoch below its header."""
    tables = [path.read_text(encoding="utf-8").count("\n") - 1 for path in run.glob("fold*/metrics.csv")]
    return sum(tables), len(tables)
