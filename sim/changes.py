"""A MuJoCo model brought from its nominal form to a perturbed one and back.

NumPy and MuJoCo alone, of version 2 or 3: LIBERO's Python imports it too.
Import this module only after ``sim.gl.ensure_gl``: MuJoCo picks its GL at import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mujoco
import numpy as np

_PERTURBED = ("dof_damping", "geom_friction", "body_mass", "body_inertia", "light_diffuse", "light_ambient",
              "light_specular", "light_dir", "cam_pos", "cam_quat", "cam_fovy", "mat_rgba", "geom_rgba")
_SQUARES = 12
"""Of a checkered texture, along its side."""


class Changeable:
    """One model: what is nominal, and what each factor of ``sim.perturbation.Perturbation`` that it has means in it."""

    FACTORS = frozenset({"damping", "friction", "mass", "light", "light_turn", "camera_shift", "camera_turn", "zoom",
                         "table_colour", "table_texture", "object_colour"})
    """What is changed here. The others are the task's to change."""

    def __init__(
        self, model: Any, *, camera: int, table: np.ndarray, objects: np.ndarray, textures: Sequence[int],
        upload: Callable[[int], None],
    ) -> None:
        """Take the model's present form for nominal.

        Args:
            model: MuJoCo's.
            camera: The one that is moved.
            table: Geometries ``[k]`` of what objects stand on.
            objects: Geometries ``[k]`` of these.
            textures: Of the table.
            upload: Gives a texture whose pixels have changed to whatever draws it.
        """
        self._model, self._camera, self._objects, self._upload = model, camera, objects, upload
        self._nominal = {name: getattr(model, name).copy() for name in _PERTURBED}
        headlight = model.vis.headlight
        self._headlight = {name: getattr(headlight, name).copy() for name in ("diffuse", "ambient", "specular")}
        self._table_materials = np.setdiff1d(model.geom_matid[table], [-1])
        self._object_materials = np.setdiff1d(model.geom_matid[objects], [-1, *self._table_materials])
        self._texture, self._texels = "usual", {each: _texels(model, each).copy() for each in textures}

    def apply(self, changes: Mapping[str, Any]) -> None:
        """Change the nominal model by those of ``changes``, values by factor, that are in ``FACTORS``."""
        for name, values in self._nominal.items():
            getattr(self._model, name)[:] = values
        for name, colour in self._headlight.items():
            getattr(self._model.vis.headlight, name)[:] = colour
        self._draw_table(changes.get("table_texture", "usual"))
        for factor in self.FACTORS & changes.keys() - {"table_texture"}:
            getattr(self, f"_{factor}")(changes[factor])

    def _damping(self, ratio: float) -> None:
        self._model.dof_damping[:] *= ratio

    def _friction(self, ratio: float) -> None:
        self._model.geom_friction[:, 0] *= ratio

    def _mass(self, ratio: float) -> None:
        self._model.body_mass[:] *= ratio
        self._model.body_inertia[:] *= ratio

    def _light(self, ratios: Sequence[float]) -> None:
        model = self._model
        for colours in (model.light_diffuse, model.light_ambient, model.light_specular):
            colours[:] *= np.asarray(ratios)
        for name, colour in self._headlight.items():
            getattr(model.vis.headlight, name)[:] = colour * np.asarray(ratios)

    def _light_turn(self, degrees: float) -> None:
        lean, direction = np.radians(degrees), self._model.light_dir
        y, z = self._nominal["light_dir"][:, 1], self._nominal["light_dir"][:, 2]
        direction[:, 1] = y * np.cos(lean) - z * np.sin(lean)
        direction[:, 2] = y * np.sin(lean) + z * np.cos(lean)

    def _camera_shift(self, metres: Sequence[float]) -> None:
        self._model.cam_pos[self._camera] += np.asarray(metres)

    def _camera_turn(self, turns: Sequence[float]) -> None:
        """About its own x, y and z: right, up and backwards."""
        quaternion = self._model.cam_quat[self._camera]
        for axis, degrees in enumerate(turns):
            if degrees:
                turn, before = np.zeros(4), quaternion.copy()
                mujoco.mju_axisAngle2Quat(turn, np.eye(3)[axis], np.radians(degrees))
                mujoco.mju_mulQuat(quaternion, before, turn)

    def _zoom(self, ratio: float) -> None:
        self._model.cam_fovy[self._camera] *= ratio

    def _table_colour(self, ratios: Sequence[float]) -> None:
        self._model.mat_rgba[self._table_materials, :3] *= np.asarray(ratios)

    def _object_colour(self, ratios: Sequence[float]) -> None:
        self._model.mat_rgba[self._object_materials, :3] *= np.asarray(ratios)
        bare = self._objects[self._model.geom_matid[self._objects] == -1]
        self._model.geom_rgba[bare, :3] *= np.asarray(ratios)

    def _draw_table(self, texture: str) -> None:
        """Replace the table's textures; the mean of the usual ones stays."""
        if texture == self._texture:
            return
        self._texture = texture
        for number, usual in self._texels.items():
            texels = _texels(self._model, number)
            texels[:] = usual if texture == "usual" else usual.mean(axis=(0, 1)).astype(np.uint8)
            if texture == "checker":
                row, column = np.indices(texels.shape[:2]) // (texels.shape[1] // _SQUARES)
                texels[(row + column) % 2 == 0] //= 2
            self._upload(number)


def _texels(model: Any, texture: int) -> np.ndarray:
    """Its pixels ``[h, w, 3]`` in the model's own memory."""
    height, width, start = model.tex_height[texture], model.tex_width[texture], model.tex_adr[texture]
    modern = hasattr(model, "tex_data")  # MuJoCo 2 has colours only
    channels, pixels = (model.tex_nchannel[texture], model.tex_data) if modern else (3, model.tex_rgb)
    return pixels[start : start + height * width * channels].reshape(height, width, channels)
