"""Signing in to Kaggle with what the user has: a token, a kaggle.json, or `kaggle auth login`.

No value of them is ever shown.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hubmap_kit.errors import PublishError
from hubmap_kit.publish.answers import SIGNING_IN, TOKEN_HELP, KaggleRefusal, sentences
from hubmap_kit.publish.root import PROD, place

log = logging.getLogger(__name__)
TOKEN_PREFIX = "KGAT_"
INSTALL_HELP = "run scripts/push.sh, which installs it, or: pip install -e '.[push]'"


def sign_in(pause_s: float):  # type: ignore[no-untyped-def]  # the class comes with the lazy import
    """A signed-in client.

    Raises PublishError without credentials, on refused ones, and where the package is not installed.
    """
    if place() not in (PROD, "LOCALHOST"):
        # The package knows two places only, and sends what is meant for any other to the real Kaggle.
        raise PublishError(
            f"KAGGLE_API_ENVIRONMENT is '{place()}'; the kaggle package knows PROD and LOCALHOST only, unset it or"
            " correct it"
        )
    try:
        from hubmap_kit.publish.api import Api
    except ImportError as error:
        raise PublishError(f"the kaggle package cannot be imported ({error}); {INSTALL_HELP}") from error
    from kagglesdk.kaggle_env import get_access_token_from_env

    api, misplaced = Api(pause_s), False
    token, source = get_access_token_from_env()
    if not token:
        token, source = _token_as_key(api)
        misplaced = token is not None
    if token and (not token.isprintable() or " " in token):
        # An HTTP header cannot hold it, and the refusal of the header would show it.
        raise PublishError(
            f"{_named(source)} holds a blank or a line break; store the token alone, without a line break after it"
        )
    try:
        with _token_in_environment(token if misplaced else None):
            api.read(SIGNING_IN, api.authenticate)
    except KaggleRefusal as error:
        raise PublishError(f"Kaggle does not accept {_named(source)} (HTTP {error.status}); {TOKEN_HELP}") from error
    except PublishError as error:
        if not isinstance(error.__cause__, SystemExit):
            raise
        if token:
            raise PublishError(f"Kaggle does not accept {_named(source)}; {TOKEN_HELP}") from error
        if os.path.isfile(api.config):
            raise PublishError(f"{api.config} holds no username and key that can be read; {TOKEN_HELP}") from error
        raise PublishError(
            f"no Kaggle credentials were found (KAGGLE_API_TOKEN, ~/.kaggle/access_token, kaggle.json); {TOKEN_HELP}"
        ) from error
    # The package goes on with kaggle.json when a token is refused, which may be another account's.
    if token and api.config_values.get(api.CONFIG_NAME_TOKEN) != token:
        instead = "" if misplaced else ", or unset it to use kaggle.json"
        raise PublishError(f"Kaggle does not accept {_named(source)}; {TOKEN_HELP}{instead}")
    if not api.config_values.get(api.CONFIG_NAME_USER):
        raise PublishError(f"the Kaggle credentials name no account; {TOKEN_HELP}")
    return api


def _token_as_key(api: Any) -> tuple[str | None, str | None]:
    """An access token that stands where the old key of name and key belongs, and where that is.

    Kaggle refuses it as a key.
    """
    with sentences(SIGNING_IN):
        values = api.read_config_environment(api.read_config_file(quiet=True))
        key = str(values.get(api.CONFIG_NAME_KEY) or "").strip()
    if not key.startswith(TOKEN_PREFIX):
        return None, None
    source = "KAGGLE_KEY" if "KAGGLE_KEY" in os.environ else api.config
    log.info(
        "the key in %s is an access token and is used as one; KAGGLE_API_TOKEN or ~/.kaggle/access_token is the place"
        " for it",
        source,
    )
    return key, source


@contextmanager
def _token_in_environment(token: str | None) -> Iterator[None]:
    """The package takes a token from the environment or from a file of its own only.

    It is there no longer than the signing in takes.
    """
    if token:
        os.environ["KAGGLE_API_TOKEN"] = token
    try:
        yield
    finally:
        if token:
            del os.environ["KAGGLE_API_TOKEN"]


def _named(source: str | None) -> str:
    if source == "KAGGLE_API_TOKEN" and os.path.exists(os.environ.get(source, "")):
        return "the token in the file that KAGGLE_API_TOKEN names"
    return {None: "the credentials", "access_token": "the token in ~/.kaggle/access_token"}.get(
        source, f"the token in {source}"
    )
