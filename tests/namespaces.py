"""Whether this machine lets the rehearsal's sandbox make its namespaces; tests that need it are skipped with the reason where not."""

from __future__ import annotations

import pytest

from hubmap_kit.errors import RehearsalError
from hubmap_kit.publish.rehearsal.sandbox import check_machine


def _forbidden() -> str:
    try:
        check_machine()
    except RehearsalError as error:
        return str(error)
    return ""


needs_namespaces = pytest.mark.skipif(bool(_forbidden()), reason=_forbidden() or "namespaces work")
