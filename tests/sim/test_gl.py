from __future__ import annotations

import pytest

from data.types import UserError
from sim import gl


def test_says_what_to_install_when_there_is_no_gl(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(gl.sys, "platform", "linux")
    monkeypatch.setattr(gl, "_egl_works", lambda: False)
    monkeypatch.setattr(gl, "_osmesa_works", lambda: False)
    with pytest.raises(UserError, match="apt-get install libegl1 libgl1-mesa-dri"):
        gl.ensure_gl()


def test_falls_back_to_osmesa_and_keeps_a_choice(monkeypatch):
    monkeypatch.setattr(gl.sys, "platform", "linux")
    monkeypatch.setattr(gl, "_egl_works", lambda: False)
    monkeypatch.setattr(gl, "_osmesa_works", lambda: True)
    monkeypatch.setenv("PYOPENGL_PLATFORM", "")
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    assert gl.ensure_gl() == "glfw"
    monkeypatch.delenv("MUJOCO_GL")
    assert gl.ensure_gl() == "osmesa"


def test_a_missing_library_is_not_an_error(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(gl.ctypes, "CDLL", missing)
    assert not gl._egl_works()
    assert not gl._osmesa_works()
