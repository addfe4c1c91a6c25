#!/usr/bin/env bash
# Installs the kit with what pushing needs, then runs kernels on this machine as Kaggle would: no network, Kaggle's folders,
# versions and limits, a hidden test set. Linux only. Arguments go to `hubmap rehearse`: scripts/rehearse.sh infer --slides 529
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
hubmap_setup push
cd "$hubmap_root"
exec "$HUBMAP_PYTHON" -m hubmap_kit rehearse "$@"
