#!/usr/bin/env bash
# offscreen_gl.sh PYTHON: find EGL or OSMesa; install EGL when root, else say what to type.
set -euo pipefail
python=$1
found() { "$python" -c 'from sim.gl import ensure_gl; ensure_gl()' 2>/dev/null; }

found && exit 0
if [ "$(id -u)" = 0 ]; then
  apt-get update -q && apt-get install -y -q libegl1 libgl1-mesa-dri
fi
found || {
  echo "no offscreen OpenGL on this machine; type: sudo apt-get install libegl1 libgl1-mesa-dri" >&2
  exit 2
}
