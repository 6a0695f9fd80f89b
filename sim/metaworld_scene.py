"""What a Meta-World task looks like and weighs: the camera of ours, fast drawing, and perturbations of one model.

Import this module only after ``sim.gl.ensure_gl``: MuJoCo picks its GL at import.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from jaxtyping import UInt8

from sim.changes import Changeable
from sim.meshes import thin_meshes
from sim.perturbation import Perturbation

WORKSPACE_POSITION, WORKSPACE_TARGET, WORKSPACE_FOVY = (1.05, 0.22, 0.78), (0.0, 0.66, 0.13), 41.0

_TABLE_TEXTURE = "T_table"
_NOT_OBJECTS = ("world", "tablelink", "RetainingWall", "base", "mocap")
"""Bodies of the world that every task has; all others are what it is about."""


class Scene:
    """One task's model, and how to bring it from its nominal form to a perturbed one and back."""

    def __init__(self, model: Any, camera: str, size: int | None) -> None:
        """Put the camera where ``camera`` wants it; what the model is then is nominal. ``size``: None draws nothing."""
        self._model = model
        self._camera = model.camera("corner2" if camera == "workspace" else camera).id
        if camera == "workspace":
            model.cam_pos[self._camera] = WORKSPACE_POSITION
            model.cam_quat[self._camera] = _look_at(WORKSPACE_POSITION, WORKSPACE_TARGET)
            model.cam_fovy[self._camera] = WORKSPACE_FOVY
        roots = [model.body(model.body_rootid[body]).name for body in model.geom_bodyid]
        self._changeable = Changeable(
            model, camera=self._camera, table=np.flatnonzero([root == "tablelink" for root in roots]),
            objects=np.flatnonzero([root not in _NOT_OBJECTS for root in roots]),
            textures=[model.texture(_TABLE_TEXTURE).id], upload=self._upload)
        self._renderer = _make_renderer(model, size) if size is not None else None

    def apply(self, change: Perturbation) -> None:
        """Write dynamics, camera pose, light and colours of ``change`` into the nominal model."""
        self._changeable.apply(change.changes)

    def render(self, data: Any) -> UInt8[np.ndarray, "h w 3"]:
        """What the camera sees."""
        assert self._renderer is not None, "it was made to draw nothing"
        self._renderer.update_scene(data, camera=self._camera)
        return self._renderer.render()

    def close(self) -> None:
        """Free the GL context."""
        if self._renderer is not None:
            self._renderer.close()

    def _upload(self, texture: int) -> None:
        if self._renderer is not None:
            self._renderer._gl_context.make_current()
            mujoco.mjr_uploadTexture(self._model, self._renderer._mjr_context, texture)


def _make_renderer(model: Any, size: int) -> mujoco.Renderer:
    """A renderer of ``size`` by ``size`` pixels that leaves out what costs time and shows little."""
    thin_meshes(model, size)
    quality, buffer = model.vis.quality, model.vis.global_
    quality.offsamples, quality.shadowsize = 0, 0  # the shadow map would be 64 MB and most of the time
    buffer.offwidth = buffer.offheight = size
    renderer = mujoco.Renderer(model, size, size)
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = 0
    return renderer


def _look_at(position: tuple[float, ...], target: tuple[float, ...]) -> np.ndarray:
    """Quaternion of a camera at ``position`` that looks at ``target`` with up upwards (MuJoCo: along -z, y up)."""
    backward = np.subtract(position, target)
    backward /= np.linalg.norm(backward)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([right, np.cross(backward, right), backward], axis=1).ravel())
    return quaternion
