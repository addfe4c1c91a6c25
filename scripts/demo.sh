#!/usr/bin/env bash
# Installs the kit, then runs the main job on the embedded slides: two folds trained, test slides predicted, pictures drawn.
# Arguments go to `hubmap demo`: scripts/demo.sh --out my-demo
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
hubmap_setup
exec "$HUBMAP_PYTHON" -m hubmap_kit demo "$@"
