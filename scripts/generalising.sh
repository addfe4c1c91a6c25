#!/usr/bin/env bash
# Trains the recipes on real tissue, small enough for a CPU, and measures what carries over to other stains, scales and slides:
#   scripts/generalising.sh ingredients|seeds|crossing|best|folds --data FOLDER [--out runs/generalising] [--write]
# FOLDER holds glas/, hubmap-mini/, stain-references/ and weights/. The same command again goes on with what is missing; two at once
# share the work. `--write` puts the tables into docs/generalising.md; `--help` lists the rest.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
hubmap_setup
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$HUBMAP_PYTHON" "$hubmap_root/scripts/generalising.py" "$@"
