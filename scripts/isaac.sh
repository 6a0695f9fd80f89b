#!/usr/bin/env bash
# isaac.sh: make the environment of env=isaac, Isaac Lab without Isaac Sim, in the user's cache: 8 GB.
# ISAACLAB_PYTHON names one that exists already. Isaac Sim, and accepting NVIDIA's licence, stay with the user.
set -euo pipefail
pins=scripts/isaac_constraints.txt
folder=${XDG_CACHE_HOME:-$HOME/.cache}/wm-rl/isaac
if [ -n "${ISAACLAB_PYTHON:-}" ]; then
  echo "ISAACLAB_PYTHON names $ISAACLAB_PYTHON: nothing to make"
  exit 0
fi
cmp -s "$pins" "$folder/ready" && exit 0
is_right() { "$1" -c 'import sys, ensurepip; sys.exit(sys.version_info[:2] != (3, 12))' 2>/dev/null; }
for python in "${PYTHON312:-}" python3.12 "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python; do
  is_right "$python" && break
done
is_right "$python" || {
  echo "Isaac Lab 3 needs Python 3.12 with venv, found none; install it, or type: make isaac PYTHON312=<path>" >&2
  exit 2
}
echo "making $folder: Isaac Lab, 8 GB, some minutes"
rm -f "$folder/ready"
[ -x "$folder/bin/python" ] || "$python" -m venv "$folder"
"$folder/bin/python" -m pip install --quiet --disable-pip-version-check --constraint "$pins" isaaclab
cp "$pins" "$folder/ready"
