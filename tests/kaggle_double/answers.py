"""What kagglesdk itself knows about requests and answers; an answer that its types do not know is a mistake of the
double.
"""

from __future__ import annotations

import functools
import inspect
import json
from typing import Any

from kagglesdk.blobs.services.blob_api_service import BlobApiClient
from kagglesdk.competitions.services.competition_api_service import CompetitionApiClient
from kagglesdk.datasets.services.dataset_api_service import DatasetApiClient
from kagglesdk.kaggle_object import KaggleObject
from kagglesdk.kernels.services.kernels_api_service import KernelsApiClient
from kagglesdk.security.services.oauth_service import OAuthClient

CLIENTS = (BlobApiClient, CompetitionApiClient, DatasetApiClient, KernelsApiClient, OAuthClient)


class UnknownAnswer(Exception):
    """The double was about to answer something that kagglesdk's type for it does not hold."""


class _Listener:
    """Stands where the SDK's HTTP client stands and notes what each method of a service client would send and
    expect.
    """

    def __init__(self) -> None:
        self.calls: dict[str, tuple[type[KaggleObject], type[KaggleObject] | None]] = {}

    def call(self, service: str, method: str, request: KaggleObject, answer: type[KaggleObject] | None) -> None:
        self.calls[f"{service}/{method}"] = type(request), answer


@functools.cache
def types() -> dict[str, tuple[type[KaggleObject], type[KaggleObject] | None]]:
    """Request and answer type of every method `service/Method` of the services that the double stands in for."""
    listener = _Listener()
    for client in CLIENTS:
        for name, method in inspect.getmembers(client(listener), inspect.ismethod):
            if not name.startswith("_"):
                method()
    return listener.calls


def parse_request(method: str, body: dict[str, Any]) -> None:
    """Raise what kagglesdk raises when `body` is no request of `method`."""
    types()[method][0].from_dict(body)


def parse_answer(method: str, answer: dict[str, Any]) -> None:
    """Raise UnknownAnswer unless kagglesdk reads `answer` of `method` and knows every field of it."""
    kind = types()[method][1]
    if kind is None:
        return
    if unknown := list(_unknown(kind, answer, kind.__name__)):
        raise UnknownAnswer(f"{method}: kagglesdk knows no field {', '.join(unknown)}")
    try:
        kind.from_json(json.dumps(answer))
    except Exception as error:
        raise UnknownAnswer(f"{method}: kagglesdk cannot read the answer: {error!r}") from error


def _unknown(kind: type[KaggleObject], value: dict[str, Any], where: str):
    fields = {field.json_name: field.field_type for field in kind._fields}
    for name, inner in value.items():
        if name not in fields:
            yield f"{where}.{name}"
        elif inspect.isclass(fields[name]) and issubclass(fields[name], KaggleObject):
            for item in inner if isinstance(inner, list) else [inner]:
                yield from _unknown(fields[name], item, f"{where}.{name}")
