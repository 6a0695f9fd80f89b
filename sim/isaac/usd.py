"""Rigid bodies, shapes and joints in USD, as Isaac Lab's physics engines read them. For Isaac Lab's Python."""

from __future__ import annotations

import math
from typing import Any


def body(stage: Any, path: str, frame: Any, *, mass: float, centre: tuple = (0, 0, 0), inertia: float = 0.01) -> None:
    """A rigid body at ``frame`` (a matrix or a position), with an isotropic inertia in kg m²."""
    from pxr import Gf, UsdGeom, UsdPhysics

    matrix = Gf.Matrix4d(1.0).SetTranslate(Gf.Vec3d(*frame)) if isinstance(frame, tuple) else frame
    xform = UsdGeom.Xform.Define(stage, path)
    xform.AddTranslateOp().Set(matrix.ExtractTranslation())
    xform.AddOrientOp(UsdGeom.XformOp.PrecisionDouble).Set(matrix.ExtractRotationQuat())
    UsdPhysics.RigidBodyAPI.Apply(xform.GetPrim())
    api = UsdPhysics.MassAPI.Apply(xform.GetPrim())
    api.CreateMassAttr(mass)
    api.CreateCenterOfMassAttr(Gf.Vec3f(*centre))
    api.CreateDiagonalInertiaAttr(Gf.Vec3f(inertia))
    api.CreatePrincipalAxesAttr(Gf.Quatf(1))


def box(stage: Any, path: str, centre: tuple, size: tuple, colour: tuple) -> Any:
    """A box to look at, as a prim that may be made to collide; metres, colours within [0, 1]."""
    from pxr import Gf, UsdGeom

    box = UsdGeom.Cube.Define(stage, path)
    box.CreateSizeAttr(1.0)
    box.AddTranslateOp().Set(Gf.Vec3d(*centre))
    box.AddScaleOp().Set(Gf.Vec3f(*size))
    box.CreateDisplayColorAttr([colour])
    return box.GetPrim()


def capsule(stage: Any, path: str, one: tuple, other: tuple, radius: float, colour: tuple) -> Any:
    """Like ``box``, between the centres of its two ends."""
    from pxr import Gf, UsdGeom

    a, b = Gf.Vec3d(*one), Gf.Vec3d(*other)
    capsule = UsdGeom.Capsule.Define(stage, path)
    capsule.CreateAxisAttr("Z")
    capsule.CreateHeightAttr((b - a).GetLength())
    capsule.CreateRadiusAttr(radius)
    capsule.AddTranslateOp().Set((a + b) / 2)
    turn = Gf.Rotation(Gf.Vec3d(0, 0, 1), (b - a).GetNormalized())
    capsule.AddOrientOp(UsdGeom.XformOp.PrecisionDouble).Set(turn.GetQuat())
    capsule.CreateDisplayColorAttr([colour])
    return capsule.GetPrim()


def fixed(stage: Any, path: str, parent: str | None, child: str) -> None:
    """A joint that does not move; without a ``parent`` to the world."""
    from pxr import UsdPhysics

    _attach(stage, UsdPhysics.FixedJoint.Define(stage, path), parent, child)


def joint(
    stage: Any, path: str, kind: str, axis: str, parent: str, child: str, limits: tuple[float, float] | None, *,
    stiffness: float = 0.0, damping: float = 0.0, force: float | None = None, armature: float = 0.0,
) -> None:
    """A revolute (limits in degrees) or prismatic (metres) joint; gains per radian or metre."""
    from pxr import Sdf, UsdPhysics

    joint = getattr(UsdPhysics, f"{kind}Joint").Define(stage, path)
    joint.CreateAxisAttr(axis)
    if limits is not None:
        joint.CreateLowerLimitAttr(limits[0])
        joint.CreateUpperLimitAttr(limits[1])
    _attach(stage, joint, parent, child)
    for name in ("newton", "physxJoint"):
        joint.GetPrim().CreateAttribute(f"{name}:armature", Sdf.ValueTypeNames.Float).Set(armature)
    drive = UsdPhysics.DriveAPI.Apply(joint.GetPrim(), "angular" if kind == "Revolute" else "linear")
    per_unit = math.pi / 180 if kind == "Revolute" else 1.0  # USD's angular gains are per degree
    drive.CreateStiffnessAttr(stiffness * per_unit)
    drive.CreateDampingAttr(damping * per_unit)
    if force is not None:
        drive.CreateMaxForceAttr(force)


def _attach(stage: Any, joint: Any, parent: str | None, child: str) -> None:
    """Put a joint's frame at the child's origin."""
    from pxr import Gf, UsdGeom

    cache = UsdGeom.XformCache()
    frame = cache.GetLocalToWorldTransform(stage.GetPrimAtPath(child))
    if parent is not None:
        joint.CreateBody0Rel().AddTarget(parent)
        frame = frame * cache.GetLocalToWorldTransform(stage.GetPrimAtPath(parent)).GetInverse()
    joint.CreateBody1Rel().AddTarget(child)
    joint.CreateLocalPos0Attr(Gf.Vec3f(frame.ExtractTranslation()))
    joint.CreateLocalRot0Attr(Gf.Quatf(frame.ExtractRotationQuat()))
    joint.CreateLocalPos1Attr(Gf.Vec3f(0))
    joint.CreateLocalRot1Attr(Gf.Quatf(1))
