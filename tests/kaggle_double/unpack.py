"""What Kaggle does to uploaded archives: .zip, .tar and .tar.gz become folders, a bare .gz loses its suffix; wheels
stay as they are.
"""

from __future__ import annotations

import gzip
import tarfile
import zipfile

from .state import File, State


def unpacked(state: State, file: File) -> list[File]:
    """The files that an uploaded file becomes; a damaged archive stays what it is."""
    path, name = state.path(file), file.name
    try:
        if name.endswith(".zip"):
            with zipfile.ZipFile(path) as archive:
                members = [(entry.filename, archive.read(entry)) for entry in archive.infolist() if not entry.is_dir()]
        elif name.endswith((".tar", ".tar.gz")):
            with tarfile.open(path) as archive:
                members = [
                    (entry.name, archive.extractfile(entry).read()) for entry in archive.getmembers() if entry.isfile()
                ]
        elif name.endswith(".gz"):
            return [state.add(name.removesuffix(".gz"), gzip.decompress(path.read_bytes()))]
        else:
            return [file]
    except (OSError, tarfile.TarError, zipfile.BadZipFile):
        return [file]
    folder = name.removesuffix(".gz").removesuffix(".tar").removesuffix(".zip")
    return [state.add(f"{folder}/{inner.removeprefix('./')}", content) for inner, content in members]
