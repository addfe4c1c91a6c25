"""Receiving the bytes of an upload, whole, in parts, or cut off."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .state import Blob
from .world import Refusal, Silence, World

if TYPE_CHECKING:
    from .server import Handler

PIECE = 1 << 20


def receive(handler: Handler, world: World, token: str) -> None:
    """Answer a PUT to an upload address: the bytes from the start or from an offset, or the question how many have
    come.
    """
    blob, length = world.state.blobs.get(token), int(handler.headers.get("Content-Length") or 0)
    asked = re.fullmatch(r"bytes (?:\*|(\d+)-\d+)/(\d+)", handler.headers.get("Content-Range") or f"bytes 0-0/{length}")
    if blob is None or asked is None or world.has("upload_refused"):
        _skip(handler, length)
        raise Refusal(403 if world.has("upload_refused") else 404, "Upload not allowed or expired")
    if asked[1] is None:
        if world.first("probe_503_once", 1):
            raise Refusal(503, "Service Unavailable")
        if world.first("probe_silent_once", 1):
            raise Silence
        return _progress(handler, blob)
    blob.puts += 1
    cut = world.has("upload_dropped") and blob.puts == 1
    _take(handler, world, blob, int(asked[1]), length // 2 if cut else length)
    if cut:
        return handler.hang_up()
    with handler.server.lock:
        _finish(world, blob)
        handler.server.uploaded.add(token)
        world.state.save()
    return handler._send(200, b"{}")


def _progress(handler: Handler, blob: Blob) -> None:
    """200 for a finished upload, else 308 with the bytes that have come."""
    if blob.sha256:
        return handler._send(200, b"{}")
    return handler._send(308, b"", {"Range": f"bytes=0-{blob.received - 1}"} if blob.received else {})


def _take(handler: Handler, world: World, blob: Blob, start: int, length: int) -> None:
    path = world.state.folder / "partial" / blob.token
    if start not in (0, blob.received):
        _skip(handler, length)
        raise Refusal(400, f"The upload goes on at byte {blob.received}, not {start}")
    blob.received = start
    with path.open("ab" if start else "wb") as stream:
        while length and (piece := handler.rfile.read(min(PIECE, length))):
            stream.write(piece)
            length -= len(piece)
            blob.received += len(piece)


def _finish(world: World, blob: Blob) -> None:
    if blob.received != blob.size:
        raise Refusal(400, f"The upload has {blob.received} bytes, {blob.size} were announced")
    blob.sha256 = world.state.add(blob.name, world.state.folder / "partial" / blob.token).sha256


def _skip(handler: Handler, length: int) -> None:
    while length and (piece := handler.rfile.read(min(PIECE, length))):
        length -= len(piece)
