"""Kernels: saving a version, its session's state, log and output."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hubmap_kit.errors import PublishError, finding
from hubmap_kit.files import atomic_path
from hubmap_kit.publish.answers import Answer, AnswerLost, printable
from hubmap_kit.publish.session import Session, kernel_page, one_line

_SOURCES = ("dataset", "competition", "kernel", "model")
_PIECE = re.compile(r'\{\s*"(stream_name|time|data)"')  # not within the text of one: a quotation mark is escaped there
_MANY = r"\b(count|max|maximum|limit|too many|already|concurrent|simultaneous)\b"
_BUSY = re.compile(rf"\bsessions?\b.*{_MANY}|{_MANY}.*\bsessions?\b", re.IGNORECASE)


class SessionsBusy(PublishError):
    """The account has as many sessions as Kaggle lets it have at a time (two with a GPU), so nothing was saved."""


@dataclass(frozen=True)
class KernelPush:
    """A saved kernel version.

    `ref` is where Kaggle says it is, as owner/slug, the one asked for where it says nothing; `version` is 0 where it
    names none. `lacking`: the sources that Kaggle saved it without, in words.
    """

    ref: str
    url: str
    version: int
    lacking: str = ""


@dataclass(frozen=True)
class KernelFacts:
    """What Kaggle shows of a kernel: its newest version's number (0: there is no kernel, None: not told), and whether
    it is private.
    """

    version: int | None
    private: bool | None


@dataclass(frozen=True)
class KernelStatus:
    """`status` in upper case: QUEUED, RUNNING, COMPLETE, ERROR, CANCEL_REQUESTED, CANCEL_ACKNOWLEDGED, NEW_SCRIPT, or
    what Kaggle adds; it may be empty.
    """

    status: str
    failure: str


class KernelCalls(Session):
    """What the kit asks of kernels. A ref is owner/slug."""

    def save_kernel(self, folder: Path, timeout_s: int | None = None) -> KernelPush:
        """Save a new version of the kernel in a folder (kernel-metadata.json and its script) and run it.

        Raises AnswerLost where that may have been done, SessionsBusy and other PublishErrors where it was not.
        """
        ref, what = kernel_ref(folder), f"the push of kernel {kernel_ref(folder)}"
        with self.private_temp():
            try:
                answer = self._fields(
                    what, lambda: self.api.kernels_push(str(folder), timeout=str(timeout_s) if timeout_s else None)
                )
            except PublishError as error:
                if not isinstance(error, AnswerLost) and _BUSY.search(str(error)):
                    raise SessionsBusy(f"{finding(error)}; {_FREE}") from error
                raise
        said, version = one_line(answer.text("error")), answer.number("versionNumber") or 0
        there = f"version {version}" if version else answer.text("ref") or answer.text("url")
        if said and there:
            raise AnswerLost(f"Kaggle names {there} of kernel {ref} and an error ({said})")
        if said:
            busy = _BUSY.search(said)
            advice = _FREE if busy else "mend that, then push again"
            raise (SessionsBusy if busy else PublishError)(f"Kaggle did not take kernel {ref} ({said}); {advice}")
        lacking = [
            f"{kind} source {', '.join(names)}" for kind in _SOURCES if (names := answer.texts(f"invalid{kind}Sources"))
        ]
        landed = _landed(answer.text("ref") or answer.text("url"), ref)
        return KernelPush(landed, answer.text("url") or kernel_page(ref), version, " and ".join(lacking))

    def _fields(self, what: str, call: Callable[[], Any]) -> Answer:
        """The answer to a call of the package that must not be repeated."""
        from hubmap_kit.publish.api import answer_of

        return answer_of(self.api.write(what, call))

    def kernel(self, ref: str) -> KernelFacts:
        """What Kaggle shows of a kernel."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelRequest

        request = ApiGetKernelRequest()
        request.user_name, request.kernel_slug = ref.split("/")[:2]
        found = self.ask_if_shown(f"kernel {ref}", lambda sdk: sdk.kernels.kernels_api_client.get_kernel(request))
        if found is None:
            return KernelFacts(0, None)
        facts = found.part("metadata")
        return KernelFacts(facts.number("currentVersionNumber") or None, facts.flag("isPrivate"))

    def kernel_status(self, ref: str, version: int | None = None) -> KernelStatus:
        """The state of the session of a kernel's version; None: the latest."""
        from kagglesdk.kernels.types.kernels_api_service import ApiGetKernelSessionStatusRequest

        request = _of_version(ApiGetKernelSessionStatusRequest(), ref, version)
        answer = self.ask(
            f"the status of kernel {ref}", lambda sdk: sdk.kernels.kernels_api_client.get_kernel_session_status(request)
        )
        return KernelStatus(answer.word("status"), one_line(answer.text("failureMessage")))

    def kernel_log(self, ref: str, version: int | None = None) -> str:
        """The log of a version's session (None: the latest) as plain text; empty while there is none."""
        first = next(self._outputs(ref, version))
        return plain_log(first.text("log")) or "".join(piece.text("data") for piece in first.parts("log"))

    def output_files(self, ref: str, version: int | None = None) -> dict[str, str]:
        """Names and addresses of the output files of a version; None: the latest."""
        files = (file for page in self._outputs(ref, version) for file in page.parts("files"))
        return {file.text("fileName"): file.text("url") for file in files if file.text("fileName")}

    def kernel_output(self, ref: str, into: Path, pattern: str | None = None, version: int | None = None) -> list[Path]:
        """Download the output files of a version (None: the latest) whose path matches the regular expression; their
        paths, sorted.
        """
        from hubmap_kit.publish.api import timed_session

        paths = []
        with timed_session() as session:
            for name, url in self.output_files(ref, version).items():
                if pattern is not None and not re.search(pattern, name):
                    continue
                path = into / name
                # Names come from the kernel: none may lead out of the folder.
                if not path.resolve().is_relative_to(into.resolve()):
                    raise PublishError(
                        f"kernel {ref} has an output named '{name}', which leads out of {into}; nothing was written"
                        " there"
                    )
                self.api.read(f"output {name} of kernel {ref}", lambda at=url, to=path: _fetch(session, at, to))
                paths.append(path)
        return sorted(paths)

    def _outputs(self, ref: str, version: int | None) -> Iterator[Answer]:
        from kagglesdk.kernels.types.kernels_api_service import ApiListKernelSessionOutputRequest

        def ask(sdk: Any, token: str) -> Any:
            request = _of_version(ApiListKernelSessionOutputRequest(), ref, version)
            request.page_size, request.page_token = 100, token
            return sdk.kernels.kernels_api_client.list_kernel_session_output(request)

        return self.pages(f"the output of kernel {ref}", ask)


_FREE = "wait for a running session to end, or push with --follow, which tries again until one has ended"


def _of_version(request: Any, ref: str, version: int | None) -> Any:
    """A request about a kernel's session.

    The API calls version 3 "v3"; that is what the package itself sends, not seen on Kaggle.
    """
    request.user_name, request.kernel_slug = ref.split("/")[:2]
    if version:
        request.version_label = f"v{version}"
    return request


def kernel_ref(folder: Path) -> str:
    """The address (owner/slug) that the kernel in a folder is for.

    Raises PublishError where its title would lead to another one.
    """
    from slugify import slugify

    path = folder / "kernel-metadata.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        ref, title = str(values["id"]), str(values["title"])
        slug = ref.split("/")[1]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise PublishError(
            f"{path} cannot be read ({error!r}); render the kernel again with 'hubmap kernels'"
        ) from error
    if slugify(title) != slug:
        raise PublishError(
            f"{path}: the title '{title}' leads to the address '{slugify(title)}', not to '{slug}'; change it"
        )
    return ref


def _landed(said: str, ref: str) -> str:
    """Where Kaggle says that a kernel is: `owner/slug`, `/code/owner/slug`, a bare slug, an address with a version
    behind it.
    """
    owner, slug = ref.lower().split("/")[:2]
    words = [word for word in re.sub(r"^\w+://[^/]*|[?#].*$", "", said).split("/") if word]
    lower = [word.lower() for word in words]
    if slug in lower:
        before = lower[: lower.index(slug)]
        return ref if not before or before[-1] in (owner, "code", "kernels") else "/".join([before[-1], slug])
    return "/".join(words) or ref


def _fetch(session: Any, url: str, path: Path) -> None:
    with session.get(url, stream=True) as response:
        response.raise_for_status()
        with atomic_path(path) as temporary, temporary.open("wb") as file:
            for block in response.iter_content(1 << 20):
                file.write(block)


def plain_log(text: str) -> str:
    """A log as people read it.

    Kaggle stores pieces {stream_name, time, data}: as a list, which may be cut off, or as lines, maybe prefixed.
    """
    if not _PIECE.match(text, max(text.find("{", 0, 200), 0)):
        return text
    pieces, end, after, decoder = [], 0, 0, json.JSONDecoder(strict=False)
    while begin := _PIECE.search(text, after):
        try:
            piece, after = decoder.raw_decode(text, begin.start())
        except (ValueError, RecursionError):
            after = begin.end()
            continue
        if isinstance(piece.get("data"), str):
            pieces += [*_whole_lines(text[end : begin.start()]), piece["data"]]
        end = after
    if not pieces:
        return text
    tail = text[end:]
    if cut := re.search(r'"data"\s*:\s*"((?:[^"\\]|\\[^u]|\\u[0-9a-fA-F]{4})*)', tail):
        try:
            pieces.append(json.loads(f'"{cut[1]}"', strict=False))
        except ValueError:  # an escape that JSON does not know
            pieces.append(cut[1])
    else:
        pieces += _whole_lines(tail + "\n")
    return printable(("" if any("\n" in piece for piece in pieces) else "\n").join(pieces))


def _whole_lines(between: str) -> list[str]:
    """The lines of their own in what stands between two pieces, which otherwise is commas, brackets and prefixes."""
    return [f"{line}\n" for line in between.split("\n")[1:-1] if re.search(r"\w", line)]
