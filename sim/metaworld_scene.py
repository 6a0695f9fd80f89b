"""What a Meta-World task looks like and weighs: the camera of ours, fast drawing, and perturbations of one model.

Import this module only after ``sim.gl.ensure_gl``: MuJoCo picks its GL at import.
"""

from __future__ import annotations

from typing import Any

import mujoco
import numpy as np
from jaxtyping import UInt8

from sim.meshes import thin_meshes
from sim.perturbation import Perturbation

WORKSPACE_POSITION, WORKSPACE_TARGET, WORKSPACE_FOVY = (1.05, 0.22, 0.78), (0.0, 0.66, 0.13), 41.0

_PERTURBED = ("dof_damping", "geom_friction", "body_mass", "body_inertia", "light_diffuse", "light_ambient",
              "light_specular", "light_dir", "cam_pos", "cam_quat", "cam_fovy", "mat_rgba", "geom_rgba")
_TABLE_TEXTURE, _SQUARES = "T_table", 12
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
        self._nominal = {name: getattr(model, name).copy() for name in _PERTURBED}
        headlight = model.vis.headlight
        self._headlight = {name: getattr(headlight, name).copy() for name in ("diffuse", "ambient", "specular")}
        roots = [model.body(model.body_rootid[body]).name for body in model.geom_bodyid]
        self._objects = np.flatnonzero([root not in _NOT_OBJECTS for root in roots])
        table = np.flatnonzero([root == "tablelink" for root in roots])
        self._table_materials = np.unique(model.geom_matid[table])
        self._object_materials = np.setdiff1d(model.geom_matid[self._objects], [-1, *self._table_materials])
        self._texture, self._texels = "usual", _texels(model, _TABLE_TEXTURE).copy()
        self._renderer = _make_renderer(model, size) if size is not None else None

    def apply(self, change: Perturbation) -> None:
        """Write dynamics, camera pose, light and colours of ``change`` into the nominal model."""
        model = self._model
        for name, values in self._nominal.items():
            getattr(model, name)[:] = values
        model.dof_damping[:] *= change.damping
        model.geom_friction[:, 0] *= change.friction
        model.body_mass[:] *= change.mass
        model.body_inertia[:] *= change.mass
        for colours in (model.light_diffuse, model.light_ambient, model.light_specular):
            colours[:] *= np.asarray(change.light)
        for name, colour in self._headlight.items():
            getattr(model.vis.headlight, name)[:] = colour * np.asarray(change.light)
        if change.light_turn:
            lean = np.radians(change.light_turn)
            y, z = self._nominal["light_dir"][:, 1], self._nominal["light_dir"][:, 2]
            model.light_dir[:, 1] = y * np.cos(lean) - z * np.sin(lean)
            model.light_dir[:, 2] = y * np.sin(lean) + z * np.cos(lean)
        model.cam_pos[self._camera] += np.asarray(change.camera_shift)
        model.cam_fovy[self._camera] *= change.zoom
        for axis, degrees in enumerate(change.camera_turn):
            if degrees:
                _turn(model.cam_quat[self._camera], axis, degrees)
        model.mat_rgba[self._table_materials, :3] *= np.asarray(change.table_colour)
        model.mat_rgba[self._object_materials, :3] *= np.asarray(change.object_colour)
        bare = self._objects[model.geom_matid[self._objects] == -1]
        model.geom_rgba[bare, :3] *= np.asarray(change.object_colour)
        if change.table_texture != self._texture:
            self._draw_table(change.table_texture)

    def render(self, data: Any) -> UInt8[np.ndarray, "h w 3"]:
        """What the camera sees."""
        assert self._renderer is not None, "it was made to draw nothing"
        self._renderer.update_scene(data, camera=self._camera)
        return self._renderer.render()

    def close(self) -> None:
        """Free the GL context."""
        if self._renderer is not None:
            self._renderer.close()

    def _draw_table(self, texture: str) -> None:
        """Replace the table's texture; the mean of the usual one stays."""
        self._texture, texels = texture, _texels(self._model, _TABLE_TEXTURE)
        texels[:] = self._texels if texture == "usual" else self._texels.mean(axis=(0, 1)).astype(np.uint8)
        if texture == "checker":
            row, column = np.indices(texels.shape[:2]) // (texels.shape[1] // _SQUARES)
            texels[(row + column) % 2 == 0] //= 2
        if self._renderer is not None:
            self._renderer._gl_context.make_current()
            mujoco.mjr_uploadTexture(
                self._model, self._renderer._mjr_context, self._model.texture(_TABLE_TEXTURE).id)


def _texels(model: Any, texture: str) -> np.ndarray:
    """Its pixels ``[h, w, 3]`` in the model's own memory."""
    found = model.texture(texture).id
    height, width, channels = model.tex_height[found], model.tex_width[found], model.tex_nchannel[found]
    start = model.tex_adr[found]
    return model.tex_data[start : start + height * width * channels].reshape(height, width, channels)


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


def _turn(quaternion: np.ndarray, axis: int, degrees: float) -> None:
    """Turn a camera's ``quaternion`` in place about its own x, y or z (right, up, backwards)."""
    turn = np.zeros(4)
    mujoco.mju_axisAngle2Quat(turn, np.eye(3)[axis], np.radians(degrees))
    nominal = quaternion.copy()
    mujoco.mju_mulQuat(quaternion, nominal, turn)


def _look_at(position: tuple[float, ...], target: tuple[float, ...]) -> np.ndarray:
    """Quaternion of a camera at ``position`` that looks at ``target`` with up upwards (MuJoCo: along -z, y up)."""
    backward = np.subtract(position, target)
    backward /= np.linalg.norm(backward)
    right = np.cross([0.0, 0.0, 1.0], backward)
    right /= np.linalg.norm(right)
    quaternion = np.zeros(4)
    mujoco.mju_mat2Quat(quaternion, np.stack([right, np.cross(backward, right), backward], axis=1).ravel())
    return quaternion
