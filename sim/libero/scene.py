"""What a LIBERO task looks like and weighs: fast drawing, and perturbations of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import mujoco
import numpy as np

from sim.changes import Changeable
from sim.meshes import thin_meshes

CAMERA_FACTORS = frozenset({"camera_shift", "camera_turn", "zoom"})
"""Of agentview; the wrist's camera stays as it is."""
FACTORS = Changeable.FACTORS | {"gain", "latency", "object_shift", "phrasing"}
"""What of ``sim.perturbation.Perturbation`` can be changed, here and in ``sim.libero.task``."""


class Scene:
    """One task's model. What it is when this is made is nominal."""

    def __init__(self, env: Any, fast_size: int | None) -> None:
        """``env``: robosuite's; ``fast_size``: of pictures that are drawn fast, None draws as the benchmark does."""
        self._env, self._sim, self._model = env, env.sim, env.sim.model._model
        self._context = env.sim._render_context_offscreen
        if fast_size is not None:
            self._render_fast(fast_size)
        self._things = {each.root_body for each in (*env.objects_dict.values(), *env.fixtures_dict.values())}
        self._changeable = self._make_changeable()
        self._site_pos = self._model.site_pos.copy()

    def apply(self, changes: Mapping[str, Any]) -> None:
        """Change what is nominal by ``changes``, values by factor, as far as it concerns the model."""
        self._changeable.apply(changes)

    def reset(self) -> None:
        """Put furniture where its file has it, and the table's regions where they are nominally."""
        self._model.site_pos[:] = self._site_pos
        for furniture in self._env.fixtures_dict.values():
            body = self._env.model.root.find(f".//body[@name='{furniture.root_body}']")
            number = self._model.body(furniture.root_body).id
            self._model.body_pos[number] = np.fromstring(body.get("pos", "0 0 0"), sep=" ")
            self._model.body_quat[number] = np.fromstring(body.get("quat", "1 0 0 0"), sep=" ")

    def shift_objects(self, shift: np.ndarray) -> None:
        """Move objects, furniture and the table's regions alike by ``shift``, x and y in metres."""
        model, data = self._model, self._sim.data._data
        for each in self._env.objects_dict.values():
            at = model.joint(each.joints[-1]).qposadr[0]
            data.qpos[at : at + 2] += shift
        for each in self._env.fixtures_dict.values():
            model.body_pos[model.body(each.root_body).id, :2] += shift
        for name in self._env.object_sites_dict:
            site = model.site(name).id
            body = model.site_bodyid[site]
            if model.body(model.body_rootid[body]).name not in self._things:
                model.site_pos[site] += data.xmat[body].reshape(3, 3).T @ [*shift, 0.0]

    def _make_changeable(self) -> Changeable:
        """What things stand on is what is neither them nor the robot: a table, or else the floor."""
        model = self._model
        roots = np.array([model.body(model.body_rootid[body]).name for body in model.geom_bodyid])
        others = {root for root in set(roots) - self._things - {"world"} if not root.startswith("robot0")}
        table = np.flatnonzero(np.isin(roots, list(others - {"floor"} or others)))
        textures = {int(model.mat_texid[material]) for material in model.geom_matid[table] if material >= 0} - {-1}
        return Changeable(model, camera=model.camera("agentview").id, table=table,
                          objects=np.flatnonzero(np.isin(roots, list(self._things))), textures=sorted(textures),
                          upload=self._upload)

    def _upload(self, texture: int) -> None:
        self._context.gl_ctx.make_current()
        mujoco.mjr_uploadTexture(self._model, self._context.con, texture)

    def _render_fast(self, size: int) -> None:
        """Leave shadows, reflections, smooth edges and fine meshes out: on a CPU they are most of the time."""
        thin_meshes(self._sim.model, size)
        quality, buffer = self._sim.model.vis.quality, self._sim.model.vis.global_
        quality.offsamples, quality.shadowsize = 0, 0
        buffer.offwidth = buffer.offheight = size
        self._context.con.free()
        self._context._set_mujoco_context_and_buffers()
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._context.scn.flags[flag] = 0
