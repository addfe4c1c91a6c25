"""Kernels: saving a version, its session's state, log and output."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubmap_kit.errors import PublishError
from hubmap_kit.files import atomic_path
from hubmap_kit.publish.answers import KaggleRefusal, sentences
from hubmap_kit.publish.kernel_metadata import retired
from hubmap_kit.publish.session import Session, one_line

_SOURCES = ("dataset", "competition", "kernel", "model")


@dataclass(frozen=True)
class KernelPush:
    """A saved kernel version: `ref` is owner/slug."""

    ref: str
    url: str
    version: int


@dataclass(frozen=True)
class KernelStatus:
    """`status` in upper case: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_REQUESTED, CANCEL_ACKNOWLEDGED, NEW_SCRIPT."""

    status: str
    failure: str


class KernelCalls(Session):
    """What the kit asks of kernels. A ref is owner/slug."""

    def save_kernel(self, folder: Path, timeout_s: int | None = None) -> KernelPush:
        """Save a new version of the kernel in a folder (kernel-metadata.json and its script) and run it."""
        metadata = _kernel_metadata(folder)
        ref = str(metadata["id"])
        with self.private_temp(), sentences(f"the push of kernel {ref}"):
            answer = self.api.kernels_push(str(folder), timeout=str(timeout_s) if timeout_s else None)
        if answer.error:
            said = one_line(answer.error)
            raise PublishError(f"Kaggle did not take kernel {ref} ({said}); mend that or wait for running sessions to end, then push again")
        self._look_at_sources(ref, answer)
        landed = "/".join(str(answer.ref or ref).strip("/").split("/")[-2:])
        if landed.lower() != ref.lower():
            raise PublishError(f"kernel {ref} landed at {landed}; make its title slugify to its id, delete the stray kernel, then push again")
        if not answer.version_number:
            raise PublishError(f"Kaggle took kernel {ref} but named no version; look at it on the site, then push again")
        return KernelPush(ref, str(answer.url or f"https://www.kaggle.com/code/{ref}"), int(answer.version_number))

    @staticmethod
    def _look_at_sources(ref: str, answer: Any) -> None:
        # The client prints some of these lists beside its success sentence, and never the one of models.
        for kind in _SOURCES:
            invalid = getattr(answer, f"invalid_{kind}_sources", None)
            if invalid:
                raise PublishError(
                    f"kernel {ref} was saved without its {kind} source {', '.join(map(str, invalid))}, which Kaggle does not know or this account "
                    "may not use; end that version on its page if it runs, push the source first or accept its rules, then push the kernel again"
                )

    def kernel_version(self, ref: str) -> int | None:
        """The number of a kernel's newest version; 0 where Kaggle shows no such kernel (403, 404), None where it names no number."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

        request = ApiGetKernelRequest()
        request.user_name, request.kernel_slug = ref.split("/")[:2]
        try:
            answer = self.sdk(f"kernel {ref}", lambda sdk: sdk.kernels.kernels_api_client.get_kernel(request))
        except KaggleRefusal as error:
            if error.status in (403, 404):
                return 0
            raise
        return int(answer.metadata.current_version_number or 0) or None

    def kernel_status(self, ref: str, version: int | None = None) -> KernelStatus:
        """The state of the session of a kernel's version; None: the latest."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelSessionStatusRequest

        request = _of_version(ApiGetKernelSessionStatusRequest(), ref, version)
        # Asked of the SDK: the package turns 401 and 403 into one text.
        answer = self.sdk(f"the status of kernel {ref}", lambda sdk: sdk.kernels.kernels_api_client.get_kernel_session_status(request))
        return KernelStatus(answer.status.name.upper(), one_line(answer.failure_message))

    def kernel_log(self, ref: str, version: int | None = None) -> str:
        """The log of a version's session (None: the latest) as plain text; empty while there is none."""
        return _plain_log(self._session_output(ref, version, None).log or "")

    def kernel_output(self, ref: str, into: Path, pattern: str | None = None, version: int | None = None) -> list[Path]:
        """Download the output files of a version (None: the latest) whose path matches the regular expression; their paths, sorted."""
        from hubmap_kit.publish.api import timed_session

        paths = []
        with timed_session() as session:
            for name, url in self._output_files(ref, version):
                if pattern is not None and not re.search(pattern, name):
                    continue
                path = into / name
                # Names come from the kernel: none may lead out of the folder.
                if not path.resolve().is_relative_to(into.resolve()):
                    raise PublishError(f"kernel {ref} has an output named '{name}', which leads out of {into}; nothing was written there")
                self.api.read(f"output {name} of kernel {ref}", lambda at=url, to=path: _fetch(session, at, to))
                paths.append(path)
        return sorted(paths)

    def _output_files(self, ref: str, version: int | None) -> Iterator[tuple[str, str]]:
        token = None
        while True:
            page = self._session_output(ref, version, token)
            yield from ((str(file.file_name), str(file.url)) for file in page.files or [])
            token = page.next_page_token
            if not token:
                return

    def _session_output(self, ref: str, version: int | None, token: str | None) -> Any:
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

        request = _of_version(ApiListKernelSessionOutputRequest(), ref, version)
        request.page_size, request.page_token = 100, token or ""
        return self.sdk(f"the output of kernel {ref}", lambda sdk: sdk.kernels.kernels_api_client.list_kernel_session_output(request))


def _of_version(request: Any, ref: str, version: int | None) -> Any:
    """A request about a kernel's session. The API calls version 3 "v3"; that is what the package itself sends, not seen on Kaggle."""
    request.user_name, request.kernel_slug = ref.split("/")[:2]
    if version:
        request.version_label = f"v{version}"
    return request


def _kernel_metadata(folder: Path) -> dict[str, Any]:
    from slugify import slugify

    path = folder / "kernel-metadata.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        slug, title, shape = str(values["id"]).split("/")[1], str(values["title"]), str(values.get("machine_shape") or "")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PublishError(f"{path} cannot be read ({error!r}); render the kernel again with 'hubmap kernels'") from error
    if slugify(title) != slug:
        raise PublishError(f"{path}: the title '{title}' leads to the address '{slugify(title)}', not to '{slug}'; change it")
    if retired(shape):
        raise PublishError(f"{path}: Kaggle has retired the accelerator '{shape}' and would run the kernel on something else; use NvidiaTeslaT4")
    return dict(values)


def _fetch(session: Any, url: str, path: Path) -> None:
    with session.get(url, stream=True) as response:
        response.raise_for_status()
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            for block in response.iter_content(1 << 20):
                file.write(block)


def _plain_log(text: str) -> str:
    # A finished session's log is a JSON list of pieces.
    try:
        pieces = json.loads(text)
    except ValueError:
        return text
    return "".join(str(piece.get("data", "")) for piece in pieces if isinstance(piece, dict)) if isinstance(pieces, list) else text
