"""The double as one object: a server in a thread, its state, and environments that lead a command to it and nowhere
else.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from . import kernels
from .faults import checked
from .server import KEY, TOKEN, Request, Server
from .state import State
from .world import Settings, World


class Double:
    """Context manager.

    `faults`: names of `FAULTS`; `keep`: a folder in which the state outlives the double; the rest: fields of
    `Settings`.

    `state` holds datasets, kernels and submissions; `requests` what came in; `escapes` what tried to leave; `mistakes`
    answers that kagglesdk would not have understood (they were answered 500).
    """

    def __init__(
        self, faults: Iterable[str] = (), owner: str = "alice", keep: str | Path | None = None, **settings: Any
    ) -> None:
        self._private = (
            None if keep else tempfile.TemporaryDirectory(prefix="kaggle-double-", ignore_cleanup_errors=True)
        )
        self.state = State(Path(keep or self._private.name).resolve())
        self.state.load()
        self.world = World(owner, self.state, Settings(**settings), checked(faults))
        self.server = Server(self.world)
        self._thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    @property
    def owner(self) -> str:
        """The account's name."""
        return self.world.owner

    @property
    def faults(self) -> frozenset[str]:
        """The faults that are switched on; assign names to change them while the double runs."""
        return self.world.faults

    @faults.setter
    def faults(self, names: Iterable[str]) -> None:
        self.world.faults = checked(names)

    @property
    def requests(self) -> list[Request]:
        """Every request that came, in order."""
        return self.server.requests

    @property
    def called(self) -> list[str]:
        """The names of the requests in order, such as `GetDatasetStatus` or `PUT /upload`."""
        return [request.name for request in self.server.requests]

    @property
    def escapes(self) -> list[str]:
        """Attempts to reach anything but the double."""
        return self.server.escapes

    @property
    def mistakes(self) -> list[str]:
        """Requests that the double could not answer as Kaggle's types demand."""
        return self.server.mistakes

    def kernel_log(self, slug: str, lines: list[str]) -> None:
        """The log that the next versions of kernel `slug` will have."""
        self.world.logs[slug] = kernels.log(lines)

    def kernel_output(self, slug: str, files: dict[str, bytes]) -> None:
        """The output files that the next versions of kernel `slug` will have."""
        self.world.outputs[slug] = files

    def environment(self, folder: str | Path, token: bool = False) -> dict[str, str]:
        """A whole environment for a subprocess: private folders under `folder`, dummy credentials (`token`: an access
        token instead of name and key), this double as the only way out; of the own environment only PATH and LANG.
        """
        folder = Path(folder).resolve()
        places = {"HOME": folder / "home", "TMPDIR": folder / "tmp", "KAGGLE_CONFIG_DIR": folder / "kaggle"}
        for place in places.values():
            place.mkdir(parents=True, exist_ok=True)
        proxy = f"http://127.0.0.1:{self.server.server_port}"
        credentials = {"KAGGLE_API_TOKEN": TOKEN} if token else {"KAGGLE_USERNAME": self.owner, "KAGGLE_KEY": KEY}
        return {
            **{name: os.environ[name] for name in ("PATH", "LANG") if name in os.environ},
            **{name: str(place) for name, place in places.items()},
            "KAGGLE_API_ENVIRONMENT": "LOCALHOST",
            **dict.fromkeys(("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY"), proxy),
            **({} if "no_credentials" in self.faults else credentials),
        }

    def __enter__(self) -> Self:
        if "network_down" in self.faults:
            port = self.server.server_port
            self.server.server_close()
            # Bound and not listening: every connection is refused, and nobody else can take the port.
            self._silent = socket.socket()
            self._silent.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._silent.bind(("127.0.0.1", port))
        else:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if "network_down" in self.faults:
            self._silent.close()
        else:
            self.server.shutdown()
            self.server.server_close()
            self._thread.join()
        self.state.save()
        if self._private:
            self._private.cleanup()
