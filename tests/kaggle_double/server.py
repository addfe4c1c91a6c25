"""The HTTP side: requests in a proxy's absolute form, credentials, uploads, downloads, and a record of every
request.
"""

from __future__ import annotations

import base64
import json
import logging
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from . import answers, competitions, datasets, kernels
from .uploads import receive
from .variants import VARIANTS, Raw, Variant
from .world import Body, Redirect, Refusal, Silence, World

log = logging.getLogger(__name__)
KEY, TOKEN = "dummy-key", "KGAT_dummy-token"
INTROSPECT = "security.OAuthService/IntrospectToken"
READS = ("Get", "List", "Download")
PIECE = 1 << 20
SILENCE_S = 120


@dataclass
class Request:
    """One request as it came: the API's method name (or `PUT /upload`, `GET /storage`, ...), its JSON, its headers
    without secrets, the status.
    """

    name: str
    body: Body
    headers: dict[str, str]
    status: int = 0
    answer: Body = field(default_factory=dict)


def introspect(world: World, body: Body) -> Body:
    """Whose token it is."""
    good = body.get("token") == TOKEN and not world.has("wrong_token")
    return {"active": True, "username": world.owner} if good else {"active": False}


METHODS: dict[str, Callable[[World, Body], Body]] = {
    **datasets.METHODS,
    **kernels.METHODS,
    **competitions.METHODS,
    INTROSPECT: introspect,
}


class Server(ThreadingHTTPServer):
    """Listens on 127.0.0.1 at a free port."""

    daemon_threads = True

    def __init__(self, world: World) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.world, self.lock = world, threading.RLock()
        self.requests: list[Request] = []
        self.escapes: list[str] = []
        self.mistakes: list[str] = []
        self.uploaded: set[str] = set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no news."""
        log.debug("a connection of %s broke off", client_address)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: Server
    # One write per answer, so that no answer waits for an acknowledgement.
    wbufsize = 1 << 16

    def handle_one_request(self) -> None:
        """The client holds a request's body back until its head is acknowledged, which Linux would put off for 40
        ms.
        """
        if hasattr(socket, "TCP_QUICKACK"):
            self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        super().handle_one_request()

    def do_CONNECT(self) -> None:
        """HTTPS through the proxy would leave this computer."""
        self._escape()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def _escape(self) -> None:
        self.entry = Request(self.command, {}, {})
        self.server.escapes.append(f"{self.command} {self.path}")
        self.close_connection = True
        self._send(502, json.dumps({"code": 502, "message": f"the double lets nothing out: {self.path}"}).encode())

    def _serve(self) -> None:
        url = urlsplit(self.path)
        if url.hostname not in (None, "localhost", "127.0.0.1"):
            return self._escape()
        path = unquote(url.path)
        first, _, rest = path.lstrip("/").partition("/")
        self.entry = Request(
            f"{self.command} /{first}",
            {},
            {name: value for name, value in self.headers.items() if name != "Authorization"},
        )
        with self.server.lock:
            self.server.requests.append(self.entry)
        try:
            if path.startswith("/api/v1/kernels/logs/stream/"):
                self._logs(path.removeprefix("/api/v1/kernels/logs/stream/"))
            elif path.startswith("/api/v1/"):
                self._call(path.removeprefix("/api/v1/"))
            elif first == "upload" and self.command == "PUT":
                receive(self, self.server.world, rest)
            elif first == "storage":
                self._file(*datasets.stored(self.server.world, rest, url.query))
            elif first == "output":
                self._file(kernels.written(self.server.world, rest), False)
            else:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                raise Refusal(404, "Not found")
        except Redirect as redirect:
            self._send(302, b"", {"Location": f"http://localhost{redirect.path}"})
        except Refusal as refusal:
            self._refuse(refusal.status, refusal.message)
        except (ConnectionError, TimeoutError):
            raise
        except Silence:
            self.close_connection = True
            time.sleep(SILENCE_S)
        except Exception as error:
            log.exception("the double made a mistake")
            self.server.mistakes.append(f"{self.entry.name}: {error!r}")
            self._refuse(500, f"mistake of the double: {error!r}")

    def _call(self, method: str) -> None:
        """One method of the API."""
        content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.entry.name, self.entry.body = method.rpartition("/")[2], json.loads(content or b"{}")
        if method not in METHODS:
            raise Refusal(501, f"the double does not stand in for {method}")
        with self.server.lock:
            self._transport_faults()
            if method != INTROSPECT:
                self._authorise()
            answers.parse_request(method, self.entry.body)
            variants = self._variants()
            for variant in variants:
                if variant.before:
                    if self.entry.name.startswith(READS):  # what is looked at goes on all the same
                        with suppress(Refusal, Redirect):
                            METHODS[method](self.server.world, self.entry.body)
                    variant.change({})
            answer: Body | Raw = METHODS[method](self.server.world, self.entry.body)
            answers.parse_answer(method, answer)
            self.server.world.state.save()
        self.entry.answer = answer
        for variant in variants:
            answer = variant.change(answer)
        if isinstance(answer, Raw) and not answer.status:
            return self._break_off(answer.content)
        if isinstance(answer, Raw):
            return self._send(answer.status, answer.content, {"Content-Type": answer.kind})
        return self._send(200, json.dumps(answer).encode())

    def _variants(self) -> list[Variant]:
        """The variants of this call's answer that are switched on and have still to strike."""
        world, mine = (
            self.server.world,
            [(name, variant) for name, variant in VARIANTS.items() if variant.method == self.entry.name],
        )
        return [
            variant
            for name, variant in mine
            if (world.first(name, variant.times) if variant.times else world.has(name))
        ]

    def _transport_faults(self) -> None:
        world = self.server.world
        if world.has("server_500"):
            raise Refusal(500, "Internal Server Error")
        if world.first("server_503_briefly"):
            raise Refusal(503, "Service Unavailable")
        if world.has("rate_limited_429") or world.first("rate_limited_briefly"):
            raise Refusal(429, "Too Many Requests")

    def _authorise(self) -> None:
        """Refuse all but the account's key or token."""
        world, shown = self.server.world, self.headers.get("Authorization") or ""
        basic = "Basic " + base64.b64encode(f"{world.owner}:{KEY}".encode()).decode()
        if world.has("wrong_token") or shown not in (basic, f"Bearer {TOKEN}"):
            raise Refusal(401, "Unauthenticated")

    def _logs(self, path: str) -> None:
        with self.server.lock:
            self._authorise()
            kind, text = kernels.stream(self.server.world, path)
        self._send(200, text.encode(), {"Content-Type": kind})

    def _file(self, path: Path, temporary: bool) -> None:
        """Send a stored file."""
        try:
            self.entry.status = 200
            self.send_response(200)
            headers = {"Content-Length": str(path.stat().st_size), "Last-Modified": formatdate(usegmt=True)}
            for name, value in {"Content-Type": "application/octet-stream", **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with path.open("rb") as stream:
                while piece := stream.read(PIECE):
                    self.wfile.write(piece)
        finally:
            if temporary:
                path.unlink()

    def _refuse(self, status: int, message: str) -> None:
        headers = {"Retry-After": "1"} if status == 429 else {}
        self._send(status, json.dumps({"code": status, "message": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.entry.status = status
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json; charset=utf-8",
            "Content-Length": str(len(content)),
            **(headers or {}),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def _break_off(self, content: bytes) -> None:
        """Begin an answer, unless there is nothing of it, and break the connection."""
        if content:
            self.send_response(200)
            self.send_header("Content-Length", str(len(content) + 1000))
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()
        self.hang_up()

    def hang_up(self) -> None:
        """Break the connection without an answer."""
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)
