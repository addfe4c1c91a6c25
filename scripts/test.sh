#!/usr/bin/env bash
# Installs the kit with what its tests need, then runs every check: format, lint, types, tests.
# With arguments, only pytest runs and takes them: scripts/test.sh -k rle -x
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
hubmap_setup test
cd "$hubmap_root"
if [ $# = 0 ]; then
    "$HUBMAP_PYTHON" -m ruff format --check .
    "$HUBMAP_PYTHON" -m ruff check .
    "$HUBMAP_PYTHON" -m mypy
fi
# One thread per process: two pytest workers that each start two OpenMP threads only wait for each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$HUBMAP_PYTHON" -m pytest -n "${HUBMAP_TEST_WORKERS:-auto}" "$@"
