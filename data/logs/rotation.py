"""Rotations from one representation to another."""

from __future__ import annotations

import warnings

import numpy as np
from jaxtyping import Float64
from scipy.spatial.transform import Rotation

from data.logs.mapping import ROTATIONS


def rotate(values: np.ndarray, given: str, wanted: str) -> Float64[np.ndarray, "k d"]:
    """Rotations in another of the ``ROTATIONS``. Rows that are none (not finite, or of no length) become NaN."""
    result = np.full((len(values), ROTATIONS[wanted]), np.nan)
    usable = np.isfinite(values).all(1)
    if given.startswith("quaternion"):
        usable &= np.abs(np.linalg.norm(values, axis=1) - 1) < 0.1
    rows = values[usable]
    if given in ("matrix", "rotation_6d"):
        matrices = rows.reshape(-1, 3, 3) if given == "matrix" else _from_columns(rows)
        right = np.linalg.det(matrices) > 0.5
        usable[np.flatnonzero(usable)[~right]] = False
        rotation = Rotation.from_matrix(matrices[right])
    elif given == "euler_xyz":
        rotation = Rotation.from_euler("xyz", rows)
    elif given == "rotation_vector":
        rotation = Rotation.from_rotvec(rows)
    else:
        rotation = Rotation.from_quat(rows if given == "quaternion_xyzw" else np.roll(rows, -1, axis=1))
    if wanted.startswith("quaternion"):
        quaternion = rotation.as_quat(canonical=True)
        result[usable] = quaternion if wanted == "quaternion_xyzw" else np.roll(quaternion, 1, axis=1)
    elif wanted == "euler_xyz":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # at gimbal lock any of the equal triples will do
            result[usable] = rotation.as_euler("xyz")
    elif wanted == "rotation_vector":
        result[usable] = rotation.as_rotvec()
    else:
        matrix = rotation.as_matrix()
        flat = matrix.reshape(-1, 9) if wanted == "matrix" else np.concatenate([matrix[..., 0], matrix[..., 1]], axis=1)
        result[usable] = flat
    return result


def _from_columns(columns: Float64[np.ndarray, "k 6"]) -> Float64[np.ndarray, "k 3 3"]:
    first, second = columns[:, :3], columns[:, 3:]
    first = first / np.linalg.norm(first, axis=1, keepdims=True)
    second = second - (first * second).sum(1, keepdims=True) * first
    second = second / np.linalg.norm(second, axis=1, keepdims=True)
    return np.stack([first, second, np.cross(first, second)], axis=2)
