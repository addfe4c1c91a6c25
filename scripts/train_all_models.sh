#!/usr/bin/env bash
# Trains every network of `hubmap models` for two short epochs, on a CPU in about half an hour, and tells which of them learn:
#   scripts/train_all_models.sh --data FOLDER [--out all-models] [--only NAME] [--write]
# The same command again goes on with what is missing. `--write` puts the table into docs/models.md; `--help` lists the rest.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
hubmap_setup
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$HUBMAP_PYTHON" "$hubmap_root/scripts/train_all_models.py" "$@"
