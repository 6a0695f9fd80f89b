#!/usr/bin/env bash
# environment.sh PYTHON VENV: make the virtual environment and install the project with pinned versions.
set -euo pipefail
python=$1 venv=$2

"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || {
  echo "wm-rl needs Python 3.11 or 3.12, $python is $("$python" --version 2>&1); type: make PYTHON=python3.12 setup" >&2
  exit 2
}
if ! "$python" -c 'import ensurepip' 2>/dev/null; then
  if [ "$(id -u)" = 0 ]; then
    apt-get update -q && apt-get install -y -q python3-venv
  else
    echo "Python has no venv module; type: sudo apt-get install python3-venv" >&2
    exit 2
  fi
fi
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  --constraint constraints.txt --editable '.[metaworld,pusht,ray,dev]'
