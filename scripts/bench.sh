#!/usr/bin/env bash
# Installs the kit with the rivals that it is measured against, then measures: scripts/bench.sh [rle|windows|data|predict|all]
# `--write docs/benchmarks.md` puts the tables there; `--help` lists the rest. One thread; keep the machine quiet meanwhile.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"
hubmap_setup bench
# pytorch-toolbelt asks for opencv-python, which would overwrite files of the headless build. All else it needs is there already.
"$HUBMAP_PYTHON" -c 'import importlib.metadata as m; m.version("pytorch-toolbelt")' 2>/dev/null \
    || hubmap_pip_install --no-deps pytorch-toolbelt || echo "pytorch-toolbelt could not be installed; it is left out of the comparison"
cd "$hubmap_root"
export PYTHONPATH=$hubmap_root/scripts${PYTHONPATH:+:$PYTHONPATH}
# Before the first import: threads that wait for each other on few cores would be most of what is measured.
export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
exec "$HUBMAP_PYTHON" -m benchmarks "$@"
