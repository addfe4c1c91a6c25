#!/usr/bin/env bash
# Puts the kit's datasets and kernels on Kaggle, with the Kaggle token of this machine. A step that fails ends the script with its exit code.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=_environment.sh
. "$(dirname "${BASH_SOURCE[0]}")/_environment.sh"

usage() {
    cat <<'EOF'
usage: scripts/push.sh WHAT [OPTIONS] [--rehearse]

  code        the kit's wheels, from the committed state of this checkout
  weights     trained runs:     --run RUN, may be repeated; --blend BLEND
  tiles       tile stores:      --store STORE, may be repeated
  pretrained  encoder weights:  --weights FILE, may be repeated
  kernels     render the kernels, push one with --run train|infer|tiles
  all         code, then weights if --run RUN is given, then kernels; what follows '--' goes to kernels

Datasets take --dry-run (upload nothing), --force (upload in any case) and --timeout MIN, and code --allow-dirty as well. A push uploads
nothing that Kaggle holds already, and ends when Kaggle shows exactly these files. 'scripts/push.sh WHAT --help' lists every option.

--rehearse runs the same command against a stand-in for Kaggle on this machine: nothing leaves it, and no credentials are needed or read. What
it stages and renders lies in build/rehearsed-push, apart from that of real pushes in build.

The token comes from KAGGLE_API_TOKEN, ~/.kaggle/access_token or ~/.kaggle/kaggle.json; make one at https://www.kaggle.com/settings/api

  scripts/push.sh code --dry-run
  scripts/push.sh weights --run runs/baseline --run runs/second
  scripts/push.sh kernels --run train --config baseline --folds 0,1 --follow
  scripts/push.sh all --run runs/baseline -- --run infer --follow
  scripts/push.sh all --run runs/baseline --rehearse -- --run infer --follow
EOF
}

hubmap() { "$HUBMAP_PYTHON" -m hubmap_kit "$@"; }

fetch_wheels() {
    "$HUBMAP_PYTHON" - "$hubmap_root" <<'EOF'
import sys
from pathlib import Path

from hubmap_kit.publish.bundle import BUILD_TOOLS, VENDORED
from hubmap_kit.publish.bundle import fetch

for name in (VENDORED, BUILD_TOOLS):
    fetch(Path(sys.argv[1]) / name)
EOF
}

# Options of `all` before '--': --run belongs to weights, --allow-dirty to code, --dry-run to every step, the rest to both datasets.
push_all() {
    local code=() weights=() both=() kernels=()
    while [ $# -gt 0 ]; do
        case $1 in
            --) shift; kernels+=("$@"); break ;;
            --run) [ $# -gt 1 ] || hubmap_die "--run needs a run folder"; weights+=(--run "$2"); shift ;;
            --run=*) weights+=("$1") ;;
            --allow-dirty) code+=("$1") ;;
            --dry-run) both+=("$1"); kernels+=("$1") ;;
            *) both+=("$1") ;;
        esac
        shift
    done
    # Bash before 4.4, as on macOS, calls an empty array unset.
    hubmap push code ${code[@]+"${code[@]}"} ${both[@]+"${both[@]}"}
    [ ${#weights[@]} -eq 0 ] || hubmap push weights "${weights[@]}" ${both[@]+"${both[@]}"}
    hubmap kernels ${kernels[@]+"${kernels[@]}"}
}

rehearse='' words=()
for word in "$@"; do
    if [ "$word" = --rehearse ]; then rehearse=yes; else words+=("$word"); fi
done
set -- ${words[@]+"${words[@]}"}
case ${1:-} in
    -h | --help) usage; exit ;;
    '') usage >&2; exit 2 ;;
    code | weights | tiles | pretrained | kernels | all) ;;
    *) hubmap_die "'$1' is nothing to push; expected code, weights, tiles, pretrained, kernels or all (scripts/push.sh --help)" ;;
esac
[ "$*" != "all --help" ] || { usage; exit; }

hubmap_setup push
if [ -n "$rehearse" ]; then
    # The stand-in lets nothing out, so what the bundle needs of the package index is fetched before.
    export XDG_CACHE_HOME=${XDG_CACHE_HOME:-$HOME/.cache}
    case $1 in code | all) fetch_wheels ;; esac
    # It runs this very script again, in an environment that holds no credentials and leads nowhere else.
    HUBMAP_VENV=$hubmap_venv PYTHONPATH=$hubmap_root/tests exec "$HUBMAP_PYTHON" -m kaggle_double --no-waits --pass XDG_CACHE_HOME \
        -- bash "$hubmap_root/scripts/push.sh" "$@"
fi
what=$1
shift
case $what in
    all) push_all "$@" ;;
    kernels) hubmap kernels "$@" ;;
    *) hubmap push "$what" "$@" ;;
esac
