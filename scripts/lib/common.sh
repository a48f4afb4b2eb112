# shellcheck shell=bash
# What scripts/* share: progress lines, and the interpreter they run. Sourced, never run.

# Before the change of folder below, which would give a relative path another meaning.
if [[ "${ENGRAM_PYTHON:-}" == */* && "$ENGRAM_PYTHON" != /* ]]; then
    export ENGRAM_PYTHON="$PWD/$ENGRAM_PYTHON"
fi

SCRIPT="$(cd "$(dirname "$0")" && pwd)/$(basename "$0")"
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
cd "$ROOT" || exit 1

# The checkout's own package first: the interpreter may have another checkout installed.
export PYTHONPATH="$ROOT/python${PYTHONPATH:+:$PYTHONPATH}"

# say TEXT: one progress line with the seconds since the script began.
say() { printf '[%4ds] %s\n' "$SECONDS" "$*"; }

# fail TEXT: an error line, then exit status 2, which no check or test run returns.
fail() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

# usage: the comment at the head of the script, without its marks.
usage() { awk 'NR == 1 { next } !/^#/ { exit } { sub(/^# ?/, ""); print }' "$SCRIPT"; }

# ensure_python: set PY to an interpreter that has everything python/pyproject.toml asks for.
# With ENGRAM_PYTHON that one, as it is; else .venv, made or brought up to date where needed.
ensure_python() {
    if [[ -n "${ENGRAM_PYTHON:-}" ]]; then
        PY="$ENGRAM_PYTHON"
        command -v "$PY" >/dev/null || fail "ENGRAM_PYTHON=$PY is not an executable"
        local lacking
        if ! lacking="$("$PY" scripts/lib/environment.py)"; then
            printf '%s\n' "$lacking" >&2
            fail "ENGRAM_PYTHON=$PY lacks the above. To install it:" \
                "$PY -m pip install -e '$ROOT/python[dev]'"
        fi
    else
        PY="$ROOT/.venv/bin/python"
        is_current || install_venv
    fi
}

STAMP="$ROOT/.venv/.engram-installed"

# fingerprint: changes when .venv has to be installed again.
fingerprint() {
    "$PY" -c 'import hashlib, pathlib, sys
built = (p for p in pathlib.Path("sgl-kernel").rglob("*") if p.suffix in {".toml", ".py", ".cpp", ".h"})
files = [pathlib.Path("python/pyproject.toml"), *sorted(p for p in built if "build" not in p.parts)]
content = b"".join(file.read_bytes() for file in files)
print(hashlib.sha256(content).hexdigest(), *sys.version_info[:2])'
}

is_current() { [[ -x "$PY" && -f "$STAMP" && "$(fingerprint)" == "$(cat "$STAMP")" ]]; }

install_venv() {
    if [[ ! -x "$PY" ]]; then
        make_venv "$ROOT/.venv"
    fi
    say "installing Engram, SGLang and the tools (the first time: several minutes, about 11 GB)"
    "$PY" -m pip install --disable-pip-version-check --no-input -e "python/[dev]" ||
        fail "the installation stopped; mend what pip names above, then run this again"
    "$PY" -m pip install --disable-pip-version-check --no-input ./sgl-kernel ||
        fail "the native kernel was not built; it needs g++: mend what pip names above, then run this again"
    # Last, so that an installation cut short is taken up again.
    fingerprint >"$STAMP"
    say "installed in .venv"
}

# make_venv FOLDER: a virtual environment of the interpreter in PYTHON, else of python3.
make_venv() {
    local base="${PYTHON:-python3}"
    command -v "$base" >/dev/null || fail "$base not found; install Python 3.10 or newer"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        fail "$base is older than Python 3.10; name a newer one, for example PYTHON=python3.12"
    "$base" -c 'import venv, ensurepip' ||
        fail "$base cannot make virtual environments; install its venv package (python3-venv)"
    say "making a virtual environment with $("$base" --version)"
    "$base" -m venv "$1"
}
