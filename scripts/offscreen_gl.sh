#!/usr/bin/env bash
# offscreen_gl.sh PYTHON: find EGL or OSMesa, and what PushT's cv2 links to; install it when root, else say what to type.
set -euo pipefail
python=$1
packages="libegl1 libgl1-mesa-dri libgl1 libglib2.0-0"
found() { "$python" -c 'from sim.gl import ensure_gl; from sim.pusht import PushTConfig; ensure_gl(); PushTConfig().prepare()' 2>/dev/null; }

found && exit 0
if [ "$(id -u)" = 0 ]; then
  apt-get update -q && apt-get install -y -q $packages
fi
found || {
  echo "no offscreen OpenGL on this machine; type: sudo apt-get install $packages" >&2
  exit 2
}
