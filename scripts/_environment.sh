# shellcheck shell=bash
# Sourced by the other scripts: makes or reuses the virtual environment and installs the kit into it, with the versions of
# Kaggle's image. HUBMAP_VENV names another folder for the environment; PYTHON another interpreter (3.11 to 3.13).
# After it, $HUBMAP_PYTHON runs in that environment.

hubmap_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
hubmap_venv=${HUBMAP_VENV:-$hubmap_root/.venv}
HUBMAP_PYTHON=$hubmap_venv/bin/python

hubmap_die() { printf 'error: %s\n' "$1" >&2; exit 1; }

# Anything that changes what would be installed changes this stamp.
hubmap_stamp() { cat "$hubmap_root/setup.py" "$hubmap_root/constraints.txt" "$hubmap_root/scripts/constraints-tools.txt" | cksum; printf '%s %s\n' "$1" "$hubmap_root"; }

hubmap_make_venv() {
    local python=${PYTHON:-python3}
    command -v "$python" >/dev/null || hubmap_die "no '$python' on the PATH; install Python 3.11 to 3.13 or set PYTHON=/path/to/python"
    "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
        || hubmap_die "'$python' is $("$python" --version 2>&1); the kit needs Python 3.11 to 3.13, set PYTHON=/path/to/python"
    [ -x "$HUBMAP_PYTHON" ] && "$HUBMAP_PYTHON" -c '' 2>/dev/null && return
    echo "making a virtual environment in $hubmap_venv"
    "$python" -m venv --clear "$hubmap_venv" || hubmap_die "could not make a virtual environment in $hubmap_venv (on Debian: apt install python3-venv)"
}

# uv resolves and installs several times faster than pip; it comes from PyPI like everything else. Plain pip where it cannot be had. Both compile
# what they install: where PYTHONDONTWRITEBYTECODE is set, as in many containers, every process would compile torch again.
hubmap_pip_install() {
    if "$HUBMAP_PYTHON" -m uv --version >/dev/null 2>&1 || "$HUBMAP_PYTHON" -m pip install --quiet uv 2>/dev/null; then
        "$HUBMAP_PYTHON" -m uv pip install --compile-bytecode --python "$HUBMAP_PYTHON" -c "$hubmap_root/constraints.txt" -c "$hubmap_root/scripts/constraints-tools.txt" "$@"
    else
        echo "uv could not be installed; going on with pip, which takes minutes"
        "$HUBMAP_PYTHON" -m pip install -c "$hubmap_root/constraints.txt" -c "$hubmap_root/scripts/constraints-tools.txt" "$@"
    fi
}

# hubmap_setup [EXTRAS]: for instance `hubmap_setup test` installs what the tests need as well.
hubmap_setup() {
    local extras=${1:-} stamp=$hubmap_venv/.hubmap-stamp-${1:-core}
    hubmap_make_venv
    if [ "$(cat "$stamp" 2>/dev/null)" != "$(hubmap_stamp "$extras")" ]; then
        echo "installing hubmap_kit${extras:+[$extras]} into $hubmap_venv"
        hubmap_pip_install -e "$hubmap_root${extras:+[$extras]}" \
            || hubmap_die "the installation failed; the lines above say why. Check the network and the free disk space (about 8 GB), then run this again"
        hubmap_stamp "$extras" >"$stamp"
    fi
}
