"""Choose an offscreen GL before anything imports MuJoCo.

MuJoCo reads ``MUJOCO_GL`` once, at import. Without a screen it needs EGL (Mesa's is enough) or OSMesa.
"""

from __future__ import annotations

import ctypes
import os
import sys

INSTALL = "apt-get install libegl1 libgl1-mesa-dri"
"""The command that gives a Debian or Ubuntu machine an offscreen GL."""


def ensure_gl() -> str:
    """Set ``MUJOCO_GL`` and ``PYOPENGL_PLATFORM`` to a GL that works here, or keep what the user has set.

    Returns:
        ``egl``, ``osmesa``, or whatever ``MUJOCO_GL`` was already set to; ``""`` on macOS, which needs no choice.

    Raises:
        UserError: when neither EGL nor OSMesa can be loaded.

    """
    if sys.platform == "darwin":
        return ""
    if chosen := os.environ.get("MUJOCO_GL"):
        return chosen
    for name, works in (("egl", _egl_works), ("osmesa", _osmesa_works)):
        if works():
            os.environ["MUJOCO_GL"] = name
            os.environ.setdefault("PYOPENGL_PLATFORM", name)
            return name
    from data.types import UserError  # late: it imports torch, which light processes that call this do without

    raise UserError(f"rendering needs EGL or OSMesa, found neither; type: {INSTALL}")


def _egl_works() -> bool:
    """Tell whether libEGL loads and one of its devices opens; a libEGL without a driver behind it does not."""
    try:
        egl = ctypes.CDLL("libEGL.so.1")
    except OSError:
        return False
    egl.eglGetProcAddress.restype = ctypes.c_void_p
    egl.eglGetProcAddress.argtypes = [ctypes.c_char_p]
    query, display = (egl.eglGetProcAddress(name) for name in (b"eglQueryDevicesEXT", b"eglGetPlatformDisplayEXT"))
    if not query or not display:
        return False
    devices, count = (ctypes.c_void_p * 16)(), ctypes.c_int()
    query_devices = ctypes.CFUNCTYPE(ctypes.c_uint, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(query)
    if not query_devices(len(devices), ctypes.byref(devices), ctypes.byref(count)):
        return False
    get_display = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_void_p)(display)
    egl.eglInitialize.argtypes = [ctypes.c_void_p] * 3
    egl.eglTerminate.argtypes = [ctypes.c_void_p]
    platform_device = 0x313F  # EGL_PLATFORM_DEVICE_EXT
    for device in devices[: count.value]:
        opened = get_display(platform_device, device, None)
        if opened and egl.eglInitialize(opened, None, None):
            egl.eglTerminate(opened)
            return True
    return False


def _osmesa_works() -> bool:
    """Tell whether an OSMesa library loads."""
    for name in ("libOSMesa.so", "libOSMesa.so.8", "libOSMesa.so.6"):
        try:
            ctypes.CDLL(name)
        except OSError:
            continue
        return True
    return False
