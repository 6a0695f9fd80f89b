"""Drawing a MuJoCo model fast enough on a CPU. Also for simulators in an environment of their own: NumPy alone."""

from __future__ import annotations

from typing import Any

import numpy as np

THIN_CELL = 0.64
"""Robot meshes are drawn with one vertex per cell of ``THIN_CELL / size`` metres: about two thirds of a pixel."""


def thin_meshes(model: Any, size: int) -> None:
    """Draw detailed meshes coarsely, for pictures of ``size`` pixels; physics, which reads hulls, does not change.

    Software GL spends its time on vertices: the arm alone has 60,000 triangles for a picture of 4,096 pixels.
    """
    cell = THIN_CELL / size
    for mesh in range(model.nmesh):
        start, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
        if count < 2000:
            continue
        vertices = model.mesh_vert[model.mesh_vertadr[mesh] :][: model.mesh_vertnum[mesh]]
        cells = np.floor(vertices / cell).astype(np.int64)
        _, first, cluster = np.unique(cells, axis=0, return_index=True, return_inverse=True)
        corners = np.sort(cluster.reshape(-1)[model.mesh_face[start : start + count]], axis=1)
        whole = np.flatnonzero((corners[:, 0] != corners[:, 1]) & (corners[:, 1] != corners[:, 2]))
        _, kept = np.unique(corners[whole], axis=0, return_index=True)
        kept = start + whole[np.sort(kept)]
        end = start + len(kept)
        model.mesh_face[start:end] = first[cluster.reshape(-1)[model.mesh_face[kept]]]
        model.mesh_facenormal[start:end] = model.mesh_facenormal[kept]
        model.mesh_facetexcoord[start:end] = model.mesh_facetexcoord[kept]
        model.mesh_facenum[mesh] = len(kept)
