"""Datasets of the account: state, files, creation, versions."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubmap_kit.errors import PublishError
from hubmap_kit.files import atomic_path
from hubmap_kit.progress import bar
from hubmap_kit.publish.answers import KaggleRefusal, sentences
from hubmap_kit.publish.session import Session, one_line


@dataclass(frozen=True)
class DatasetState:
    """`status` in lower case, such as ready, failed or blobs_received; `version` is the current version's number; `private` as Kaggle says."""

    status: str
    version: int
    private: bool = True


class DatasetCalls(Session):
    """What the kit asks of datasets. Slugs are those of the account's own."""

    def dataset(self, slug: str) -> DatasetState | None:
        """The state of one's own dataset; None where Kaggle answers 403 or 404, as it does for an absent one and for one being created."""
        from kagglesdk.datasets.types.dataset_api_service import ApiGetDatasetRequest, ApiGetDatasetStatusRequest

        def ask(sdk: Any) -> DatasetState:
            api, requests = sdk.datasets.dataset_api_client, (ApiGetDatasetStatusRequest(), ApiGetDatasetRequest())
            for request in requests:
                request.owner_slug, request.dataset_slug = self.owner, slug
            status, facts = api.get_dataset_status(requests[0]).status, api.get_dataset(requests[1])
            return DatasetState(status.name.lower(), int(facts.current_version_number or 0), bool(facts.is_private))

        try:
            return self.sdk(f"the state of {slug}", ask)
        except KaggleRefusal as error:
            if error.status in (403, 404):
                return None
            raise

    def create_dataset(self, folder: Path) -> None:
        """Create the private dataset that the folder's dataset-metadata.json describes, with the folder's files."""
        with self._uploading(folder):
            answer = self.api.dataset_create_new(str(folder), public=False, quiet=True)
        _taken(answer, f"the dataset of {folder}")

    def new_version(self, folder: Path, notes: str) -> None:
        """Replace the files of an existing dataset by the folder's. A version is complete in itself."""
        with self._uploading(folder):
            answer = self.api.dataset_create_version(str(folder), notes, quiet=True)
        _taken(answer, f"the new version of {folder}")

    def files(self, slug: str) -> list[str]:
        """Names of the files in the current version, sorted."""
        names: list[str] = []
        token = None
        while True:
            page = self.api.read(f"the files of {slug}", lambda at=token: self.api.dataset_list_files(f"{self.owner}/{slug}", at, 100))
            if page.error_message:
                raise PublishError(f"Kaggle does not list the files of {slug} ({page.error_message}); run this again in some minutes")
            names += [file.name for file in page.files or []]
            token = page.next_page_token
            if not token:
                return sorted(names)

    def download_file(self, slug: str, name: str, into: Path) -> Path:
        """Download one file of the current version into a folder. Raises KaggleRefusal where there is none."""
        with tempfile.TemporaryDirectory(dir=self.scratch.name) as folder:
            self.api.read(f"{name} of {slug}", lambda: self.api.dataset_download_file(f"{self.owner}/{slug}", name, folder, force=True, quiet=True))
            got = [path for path in Path(folder).rglob("*") if path.is_file() and not path.name.endswith(".kaggle-partial")]
            if len(got) != 1:
                raise PublishError(f"the download of {name} from {slug} left {len(got)} files; expected one, run this again")
            with atomic_path(into / name) as temporary:
                _unwrap(got[0], name, temporary)
        return into / name

    @contextmanager
    def _uploading(self, folder: Path) -> Iterator[None]:
        """One bar over the bytes of a folder's files."""
        total = sum(path.stat().st_size for path in folder.iterdir() if path.name != self.api.DATASET_METADATA_FILE)
        with bar(total, f"uploading {folder.name}", "B") as progress:
            progress.unit_scale, progress.unit_divisor = True, 1024
            self.api.progress = progress
            try:
                with self.private_temp(), sentences(f"the upload of {folder}"):
                    yield
            finally:
                self.api.progress = None


def _taken(answer: Any, what: str) -> None:
    if str(answer.status or "").lower() != "ok":
        said = one_line(answer.error) or answer.status or "no reason given"
        raise PublishError(f"Kaggle did not take {what} ({said}); mend that, then run this again")


def _unwrap(got: Path, name: str, into: Path) -> None:
    # Kaggle sends large files as name.zip.
    if got.name != f"{name}.zip":
        shutil.copyfile(got, into)
        return
    with zipfile.ZipFile(got) as archive, archive.open(archive.namelist()[0]) as source, into.open("wb") as target:
        shutil.copyfileobj(source, target)
