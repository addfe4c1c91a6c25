"""Datasets and the uploads they are made of."""

from __future__ import annotations

import secrets
import tempfile
import zipfile
from pathlib import Path
from urllib.parse import quote

from .state import Blob, Dataset, DatasetVersion, File, find
from .unpack import unpacked
from .world import Body, Redirect, Refusal, World, now

PROCESSING = "INDIVIDUAL_BLOBS_COMPRESSED"
DENIED = "Permission 'datasets.get' was denied"


def start_upload(world: World, body: Body) -> Body:
    """Announce an upload; the bytes come with PUT to `createUrl`."""
    token = secrets.token_hex(12)
    world.state.blobs[token] = Blob(token, body["name"], int(body.get("contentLength", 0)))
    return {"token": token, "createUrl": f"http://localhost/upload/{token}"}


def create(world: World, body: Body) -> Body:
    """A new dataset with its first version."""
    owner, slug = body.get("ownerSlug") or world.owner, body["slug"]
    world.own(owner)
    ref = f"{owner}/{slug}"
    if ref in world.state.datasets:
        return _error(f'The requested slug "{slug}" is already in use by a dataset. Please choose another slug.')
    if world.has("create_error"):
        return _error("Incompatible Dataset Type")
    dataset = Dataset(
        owner,
        slug,
        body.get("title", ""),
        body.get("licenseName", ""),
        body.get("isPrivate", False),
        world.settings.hidden_calls,
    )
    dataset.versions.append(_version(world, 1, "Initial release", body))
    world.state.datasets[ref] = dataset
    return _done(ref)


def create_version(world: World, body: Body) -> Body:
    """A new version of a dataset: it holds what is uploaded now, and nothing of the version before."""
    ref = f"{body.get('ownerSlug', '')}/{body.get('datasetSlug', '')}"
    world.own(body.get("ownerSlug", ""))
    if ref not in world.state.datasets:
        raise Refusal(404, "Not found")
    if world.has("version_error"):
        return _error("The dataset version could not be created")
    dataset, inner = world.state.datasets[ref], body["body"]
    version = _version(world, dataset.versions[-1].number + 1, inner.get("versionNotes", ""), inner)
    dataset.versions.append(version)
    dataset.status = "READY" if world.has("ready_too_early") else PROCESSING
    return _done(ref)


def _version(world: World, number: int, notes: str, body: Body) -> DatasetVersion:
    files: list[File] = []
    for item in body.get("files", []):
        blob = world.state.blobs.get(item.get("token", ""))
        if blob is None or not blob.sha256:
            raise Refusal(400, "An uploaded file is unknown or incomplete")
        files += unpacked(world.state, File(blob.name, blob.sha256, blob.size))
    if world.has("missing_file"):
        lost = min((file.name for file in files if file.name != "BUILD_ID.json"), default="")
        files = [file for file in files if file.name != lost]
    return DatasetVersion(number, notes, sorted(files, key=lambda file: file.name), now())


def _done(ref: str) -> Body:
    return {"status": "ok", "ref": f"/{ref}", "url": f"https://www.kaggle.com/datasets/{ref}", "error": ""}


def _error(sentence: str) -> Body:
    return {"status": "error", "error": sentence}


def _visible(world: World, body: Body) -> Dataset:
    """The dataset a call asks for. One that is still being made looks like one that does not exist."""
    dataset = world.state.datasets.get(f"{body.get('ownerSlug', '')}/{body.get('datasetSlug', '')}")
    if dataset is None:
        raise Refusal(world.settings.absent_status, DENIED if world.settings.absent_status == 403 else "Not found")
    if world.has("pending_403_forever") and len(dataset.versions) == 1:
        raise Refusal(403, DENIED)
    if dataset.hidden > 0:
        dataset.hidden -= 1
        raise Refusal(403, DENIED)
    return dataset


def _shown(world: World, dataset: Dataset) -> DatasetVersion:
    """The version that number and file list describe: the last one only once it has been processed."""
    last = dataset.versions[-1]
    moved = last.polls > _delay(world, last)
    if len(dataset.versions) > 1 and (not moved or world.has("version_never_moves") or dataset.status != "READY"):
        return dataset.versions[-2]
    return last


def _chosen(world: World, dataset: Dataset, body: Body) -> DatasetVersion:
    """The version a call names by its number, else the shown one."""
    number = int(body.get("datasetVersionNumber") or 0)
    if number > len(dataset.versions):
        raise Refusal(404, "Not found")
    return dataset.versions[number - 1] if number else _shown(world, dataset)


def _delay(world: World, version: DatasetVersion) -> int:
    early = 2 if world.has("ready_too_early") and version.number > 1 else 0
    return world.settings.polls_until_ready + early


def status(world: World, body: Body) -> Body:
    """Status of a dataset; each call moves its last version one step on."""
    dataset = _visible(world, body)
    version = dataset.versions[-1]
    version.polls += 1
    if dataset.status == "FAILED":
        return {"status": "FAILED"}  # until there is another version
    if world.has("ready_too_early") and version.number > 1 and version.polls <= 2:
        dataset.status = "READY"
    elif version.polls <= _delay(world, version) or world.has("never_ready"):
        dataset.status = PROCESSING
    else:
        dataset.status = "FAILED" if world.has("dataset_failed") else "READY"
    return {"status": dataset.status}


def view(world: World, body: Body) -> Body:
    """A dataset with its current version number."""
    dataset = _visible(world, body)
    version = _shown(world, dataset)
    ref = f"{dataset.owner}/{dataset.slug}"
    return {
        "id": 1000 + list(world.state.datasets).index(ref),
        "ref": ref,
        "title": dataset.title,
        "url": f"https://www.kaggle.com/datasets/{ref}",
        "ownerName": dataset.owner,
        "ownerRef": dataset.owner,
        "licenseName": dataset.licence,
        "isPrivate": dataset.private and not world.has("dataset_public"),
        "currentVersionNumber": version.number,
        "lastUpdated": version.created,
        "totalBytes": sum(file.size for file in version.files),
    }


def metadata(world: World, body: Body) -> Body:
    """The settings of a dataset; the client reads them before a download."""
    dataset = _visible(world, body)
    info = {
        "datasetSlug": dataset.slug,
        "ownerUser": dataset.owner,
        "title": dataset.title,
        "isPrivate": dataset.private,
    }
    return {"info": {**info, "licenses": [{"name": dataset.licence}]}}


def files(world: World, body: Body) -> Body:
    """One page of the file list."""
    if world.first("files_403_briefly"):
        raise Refusal(403, DENIED)
    version = _chosen(world, _visible(world, body), body)
    start, size = int(body.get("pageToken") or 0), int(body.get("pageSize") or 20)
    page = [
        {"ref": file.name, "name": file.name, "totalBytes": file.size, "creationDate": version.created}
        for file in version.files[start : start + size]
    ]
    return {"datasetFiles": page, "nextPageToken": str(start + size) if start + size < len(version.files) else ""}


def download(world: World, body: Body) -> Body:
    """Send a download on to the storage: one file, or all as one archive."""
    dataset = _visible(world, body)
    version = _chosen(world, dataset, body)
    ref, name = f"{dataset.owner}/{dataset.slug}", body.get("fileName") or ""
    if not name:
        raise Redirect(f"/storage/{ref}/{version.number}/{dataset.slug}.zip?all=1")
    number = version.number
    if version is dataset.versions[-1]:
        version.downloads += 1
        if number > 1 and (
            world.has("stale_build_id") or (world.has("stale_build_id_briefly") and version.downloads <= 2)
        ):
            number -= 1
    if find(dataset.versions[number - 1].files, name) is None:
        raise Refusal(404, "Not found")
    zipped = world.has("file_zipped")
    raise Redirect(f"/storage/{ref}/{number}/{quote(name)}{'.zip?zipped=1' if zipped else '?signature=none'}")


def stored(world: World, path: str, query: str) -> tuple[Path, bool]:
    """The file behind a storage path `owner/slug/version/name`, and whether it is a temporary one that the caller
    deletes.
    """
    owner, slug, number, name = path.split("/", 3)
    version = world.state.datasets[f"{owner}/{slug}"].versions[int(number) - 1]
    if query == "signature=none":
        return world.state.path(find(version.files, name)), False
    chosen = version.files if query == "all=1" else [find(version.files, name.removesuffix(".zip"))]
    with (
        tempfile.NamedTemporaryFile(dir=world.state.folder / "partial", delete=False) as stream,
        zipfile.ZipFile(stream, "w") as archive,
    ):
        for file in chosen:
            archive.write(world.state.path(file), file.name)
    return Path(stream.name), True


SERVICE = "datasets.DatasetApiService/"
METHODS = {
    "blobs.BlobApiService/StartBlobUpload": start_upload,
    SERVICE + "CreateDataset": create,
    SERVICE + "CreateDatasetVersion": create_version,
    SERVICE + "GetDatasetStatus": status,
    SERVICE + "GetDataset": view,
    SERVICE + "GetDatasetMetadata": metadata,
    SERVICE + "ListDatasetFiles": files,
    SERVICE + "DownloadDataset": download,
}
