#!/usr/bin/env bash
# Make a virtual environment and install hymeg into it. Usage: tools/setup.sh VENV [PYTHON]
# PYTHON, when given, is the only interpreter tried; otherwise PATH is searched, then pyenv's versions.
set -euo pipefail
venv=$1
wanted=${2:-}
cd "$(dirname "$0")/.."

# megatron-core 0.19.2 has wheels for 3.12 and 3.13 alone. A pyenv shim may bear a right name and yet fail: so each candidate is run.
usable() {
    "$1" -c 'import sys, venv, ensurepip; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1
}

find_python() {
    if [ -n "$wanted" ]; then
        usable "$wanted" && echo "$wanted"
        return
    fi
    local root candidate
    root=$(pyenv root 2>/dev/null || echo "${PYENV_ROOT:-$HOME/.pyenv}")
    for candidate in python3.12 python3.13 python3 python "$root"/versions/3.12*/bin/python "$root"/versions/3.13*/bin/python; do
        if usable "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    return 1
}

if usable "$venv/bin/python" && [ -z "$wanted" ]; then
    echo "setup: $venv is there: bringing its packages up to date"
else
    if ! python=$(find_python); then
        looked=${wanted:-PATH (python3.12, python3.13, python3, python) and pyenv}
        echo "error: found no working Python 3.12 or 3.13 with its venv module: looked at $looked." \
            "Install one (pyenv install 3.12; uv python install 3.12; apt install python3.12-venv where the system has it)," \
            "then: make setup, or make setup PYTHON=/path/to/python3.12" >&2
        exit 2
    fi
    echo "setup: making $venv with $("$python" --version) ($python)"
    "$python" -m venv --clear "$venv"
fi

echo "setup: installing hymeg and its dependencies (PyTorch comes with CUDA libraries: 5 GB on disk)"
"$venv/bin/python" -m pip install --disable-pip-version-check --quiet -e '.[dev]' -c constraints.txt
echo "setup: done"
