# shellcheck shell=bash
# Sourced by the other scripts: goes to the repository's root and puts a Python environment that has
# moec in front of PATH.
#
#   use_env        what running moec needs
#   use_env dev    the tests and linters too
#
# The environment is .venv in the root, made on first use and left alone until pyproject.toml or
# constraints.txt change. MOEC_VENV=/path takes an existing environment instead, installing nothing;
# PYTHON=/path/to/python3 names the Python that .venv is made with.

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root" || exit

die() {
    echo "$(basename -- "$0"): $*" >&2
    exit 1
}

use_env() {
    local extra=${1:-}
    if [[ -n ${MOEC_VENV:-} ]]; then
        [[ -x $MOEC_VENV/bin/python ]] || die "MOEC_VENV=$MOEC_VENV holds no bin/python"
        # moec need not be installed there: src goes on the path, `moec` becomes its entry point.
        export PATH="$MOEC_VENV/bin:$PATH" PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
        moec() {
            python -c 'import sys; from moeconsolidate.cli import main; sys.argv[0] = "moec"; sys.exit(main())' "$@"
        }
        return
    fi

    local venv=$root/.venv
    if ! _is_installed "$venv" "$extra"; then
        _install "$venv" "$extra"
    fi
    export PATH="$venv/bin:$PATH"
}

# The stamp holds a hash of everything that an installation depends on, one file an extra. An
# environment that is up to date for dev is so for running, too.
_digest() {
    "$1" -c '
import hashlib, pathlib, sys
files = (pathlib.Path(name).read_bytes() for name in ("pyproject.toml", "constraints.txt"))
print(hashlib.sha256(b"\0".join([sys.argv[1].encode(), *files])).hexdigest())
' "$root"
}

_is_installed() {
    local venv=$1 extra=$2 digest stamp
    digest=$(_digest "$venv/bin/python" 2>/dev/null) || return 1
    for stamp in "$venv/.moec-dev" "$venv/.moec-$extra"; do
        if [[ -f $stamp && $(<"$stamp") == "$digest" ]]; then return 0; fi
    done
    return 1
}

_install() {
    local venv=$1 extra=$2 python=${PYTHON:-python3}
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null ||
        die "$python is not Python 3.11 or later: name one with PYTHON=/path/to/python3"
    echo "Installing moec${extra:+ with the $extra tools} into .venv (the first time takes minutes)" >&2
    # A half-made environment, after an interruption, has a python and no pip: start it again.
    "$venv/bin/python" -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear "$venv"
    # constraints.txt names torch's version, not its build: the index decides between CPU and CUDA.
    "$venv/bin/python" -m pip install -qq --disable-pip-version-check --no-input \
        -c constraints.txt -e ".${extra:+[$extra]}"
    # Written last, so that a failed installation is tried again.
    _digest "$venv/bin/python" >"$venv/.moec-$extra"
}
