# Sourced by the other scripts: goes to the repository's root and makes its environment.
#
#   use_environment FOLDER      takes this folder as the environment, in place of .venv
#   ensure_environment EXTRA    installs the project with one of its extras into the environment
#
# PYTHON names the interpreter that it is made with; python3 where it is not set.

CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

use_environment() {
    venv=$1
    python=$1/bin/python
}
use_environment .venv

say() { printf '==> %s\n' "$*"; }
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 1
}

# What an installation depends on: when it changes, the project is installed anew.
fingerprint() { cat pyproject.toml constraints.txt | cksum; }

# The extra `test` brings what `race` brings, so it serves for both.
installed() {
    local extra
    [ -x "$python" ] || return 1
    for extra in "$1" test; do
        if [ "$(cat "$venv/installed-$extra" 2>/dev/null)" = "$(fingerprint)" ]; then return 0; fi
    done
    return 1
}

make_venv() {
    local base=${PYTHON:-python3}
    command -v "$base" >/dev/null ||
        fail "no '$base' found: install Python 3.10 or newer, or name one: PYTHON=/path/to/python $0"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "stepwell needs Python 3.10 or newer, '$base' is $("$base" --version 2>&1)" \
            "(name another one: PYTHON=/path/to/python $0)"
    say "making $venv with $("$base" --version 2>&1)"
    "$base" -m venv "$venv" ||
        fail "'$base -m venv' failed (Debian and Ubuntu keep it in the package python3-venv)"
}

ensure_environment() {
    if installed "$1"; then return; fi
    if ! "$python" -m pip --version >/dev/null 2>&1; then make_venv; fi
    say "installing stepwell[$1] into $venv (a few minutes the first time)"
    "$python" -m pip install --quiet --disable-pip-version-check \
        -c constraints.txt -e ".[$1]" || fail "pip could not install stepwell[$1]"
    fingerprint >"$venv/installed-$1"
}

# Style and types, the part that `check` and `test` share.
lint() {
    say "ruff check"
    "$python" -m ruff check .
    say "ruff format --check"
    "$python" -m ruff format --check .
    say "mypy"
    "$python" -m mypy
}
