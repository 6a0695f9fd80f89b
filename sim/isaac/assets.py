"""Stand-in assets: boxes and capsules at the paths where Isaac Lab's tasks look for NVIDIA's assets.

NVIDIA's asset bucket is not always in reach. Isaac Lab reads it from ``ISAACSIM_ASSET_ROOT``, and a folder made here
does in its place: the Panda has the real arm's joint frames, limits and a working gripper (Franka Emika's published
kinematics), everything else is plain shapes. Good for running and for learning on one machine, never for scores.

Runs in Isaac Lab's Python, which has ``pxr``: ``python -m sim.isaac.assets FOLDER``.
"""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path
from typing import Any

from sim.isaac.usd import body, box, capsule, fixed, joint

STAND_IN = "wm_rl_stand_in"
"""Custom data of every asset's default prim, and part of provenance."""

GROUND = "Isaac/IsaacLab/Environments/Grid/default_ground_plane_checker_v1/default_ground_plane.usda"
CARTPOLE = "Isaac/IsaacLab/Robots/Classic/Cartpole/cartpole.usd"
PANDA = "Isaac/IsaacLab/Robots/FrankaEmika/franka_panda.usda"
CUBE = "Isaac/Props/Blocks/DexCube/dex_cube_instanceable.usd"
TABLE = "Isaac/Props/Mounts/SeattleLabTable/table_instanceable.usd"

_HALF = math.pi / 2
_JOINTS = (  # x, y, z of the joint's frame in its parent's, rotation about x, lower and upper limit (rad)
    (0, 0, 0.333, 0, -2.8973, 2.8973), (0, 0, 0, -_HALF, -1.7628, 1.7628), (0, -0.316, 0, _HALF, -2.8973, 2.8973),
    (0.0825, 0, 0, _HALF, -3.0718, -0.0698), (-0.0825, 0.384, 0, -_HALF, -2.8973, 2.8973),
    (0, 0, 0, _HALF, -0.0175, 3.7525), (0.088, 0, 0, _HALF, -2.8973, 2.8973))
_SHAPES = (  # of links 0 to 7: the two ends of a capsule in the link's frame, and its radius (m)
    ((0, 0, 0.05), (0, 0, 0.2), 0.07), ((0, 0, -0.13), (0, 0, 0), 0.06), ((0, -0.13, 0), (0, 0, 0), 0.06),
    ((0, 0, -0.12), (0.0825, 0, 0), 0.055), ((0, 0, 0), (-0.0825, 0.1, 0), 0.055),
    ((0, 0, -0.26), (0, 0.03, 0), 0.055), ((0, 0, 0), (0.088, 0, 0), 0.05), ((0, 0, 0.0), (0, 0, 0.09), 0.045))
_MASSES = (3.0, 3.0, 3.0, 2.5, 2.5, 2.5, 1.5, 0.7)
_WHITE, _DARK, _WOOD, _GREY = (0.85, 0.85, 0.87), (0.2, 0.2, 0.22), (0.55, 0.4, 0.28), (0.5, 0.5, 0.52)
_HAND_OFFSET, _FINGER_OFFSET, _FINGER_RANGE = 0.107, 0.0584, 0.04


def make_assets(root: Path) -> Path:
    """Write every stand-in under ``root``, unless it is there already, and return ``root``."""
    for path, write in ((GROUND, _ground), (CARTPOLE, _cartpole), (PANDA, _panda), (CUBE, _cube), (TABLE, _table)):
        if (root / path).is_file():
            continue
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        partial = (root / path).with_suffix(f".{os.getpid()}{(root / path).suffix}")
        stage = _new_stage(partial)
        write(stage)
        stage.GetRootLayer().Save()
        partial.rename(root / path)
    return root


def _new_stage(path: Path) -> Any:
    from pxr import Usd, UsdGeom

    stage = Usd.Stage.CreateNew(str(path))
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.z)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    return stage


def _root(stage: Any, name: str) -> Any:
    from pxr import UsdGeom

    prim = UsdGeom.Xform.Define(stage, f"/{name}").GetPrim()
    prim.SetCustomDataByKey(STAND_IN, True)
    stage.SetDefaultPrim(prim)
    return prim


def _ground(stage: Any) -> None:
    """A collision plane, a mesh to look at, and the shader that Isaac Lab tints."""
    from pxr import Gf, Sdf, UsdGeom, UsdPhysics, UsdShade

    _root(stage, "World")
    plane = UsdGeom.Plane.Define(stage, "/World/CollisionPlane")
    plane.CreateAxisAttr("Z")
    UsdGeom.Imageable(plane).MakeInvisible()
    UsdPhysics.CollisionAPI.Apply(plane.GetPrim())
    UsdGeom.Xform.Define(stage, "/World/Environment").AddScaleOp().Set(Gf.Vec3d(1, 1, 1))
    mesh = UsdGeom.Mesh.Define(stage, "/World/Environment/Geometry")
    mesh.CreatePointsAttr([(-50, -50, 0), (50, -50, 0), (50, 50, 0), (-50, 50, 0)])
    mesh.CreateFaceVertexCountsAttr([4])
    mesh.CreateFaceVertexIndicesAttr([0, 1, 2, 3])
    mesh.CreateDisplayColorAttr([_GREY])
    UsdGeom.PrimvarsAPI(mesh).CreatePrimvar("st", Sdf.ValueTypeNames.TexCoord2fArray, "vertex").Set(
        [(0, 0), (1, 0), (1, 1), (0, 1)])
    UsdShade.Shader.Define(stage, "/World/Looks/theGrid/Shader")


def _cartpole(stage: Any) -> None:
    """A cart on a rail that slides along y, and a pole that turns about x."""
    from pxr import UsdPhysics

    prim = _root(stage, "cartpole")
    UsdPhysics.ArticulationRootAPI.Apply(prim)
    body(stage, "/cartpole/slider", (0, 0, 0), mass=1.0)
    box(stage, "/cartpole/slider/shape", (0, 0, 0), (0.03, 8.0, 0.03), _DARK)
    body(stage, "/cartpole/cart", (0, 0, 0), mass=1.0)
    box(stage, "/cartpole/cart/shape", (0, 0, 0), (0.2, 0.25, 0.2), (0.2, 0.4, 0.8))
    body(stage, "/cartpole/pole", (0, 0, 0), mass=0.5, centre=(0, 0, 0.47), inertia=0.04)
    box(stage, "/cartpole/pole/shape", (0, 0, 0.5), (0.04, 0.06, 1.0), (0.85, 0.65, 0.3))
    fixed(stage, "/cartpole/root_joint", None, "/cartpole/slider")
    joint(stage, "/cartpole/slider_to_cart", "Prismatic", "Y", "/cartpole/slider", "/cartpole/cart", (-4.0, 4.0))
    joint(stage, "/cartpole/cart_to_pole", "Revolute", "X", "/cartpole/cart", "/cartpole/pole", None)


def _panda(stage: Any) -> None:
    """The arm with the real joint frames; fingers as boxes, the second one follows the first."""
    from pxr import Gf, UsdPhysics

    prim = _root(stage, "panda")
    UsdPhysics.ArticulationRootAPI.Apply(prim)
    world = [Gf.Matrix4d(1.0)]
    for x, y, z, roll, _, _ in _JOINTS:
        turned = Gf.Matrix4d().SetRotate(Gf.Rotation(Gf.Vec3d(1, 0, 0), math.degrees(roll)))
        world.append(turned.SetTranslateOnly(Gf.Vec3d(x, y, z)) * world[-1])
    for link, (ends, mass) in enumerate(zip(_SHAPES, _MASSES, strict=True)):
        path = f"/panda/panda_link{link}"
        middle = tuple((a + b) / 2 for a, b in zip(ends[0], ends[1], strict=True))
        body(stage, path, world[link], mass=mass, centre=middle, inertia=0.01 * mass)
        capsule(stage, f"{path}/shape", *ends, _WHITE if link % 2 else _GREY)
    fixed(stage, "/panda/root_joint", None, "/panda/panda_link0")
    for number, (_, _, _, _, low, high) in enumerate(_JOINTS, start=1):
        joint(stage, f"/panda/panda_joint{number}", "Revolute", "Z", f"/panda/panda_link{number - 1}",
               f"/panda/panda_link{number}", (math.degrees(low), math.degrees(high)), stiffness=400.0, damping=80.0,
               force=87.0 if number < 5 else 12.0, armature=0.1)
    turned = Gf.Matrix4d().SetRotate(Gf.Rotation(Gf.Vec3d(0, 0, 1), -45))
    hand = turned.SetTranslateOnly(Gf.Vec3d(0, 0, _HAND_OFFSET)) * world[-1]
    body(stage, "/panda/panda_hand", hand, mass=0.7, centre=(0, 0, 0.03), inertia=0.003)
    box(stage, "/panda/panda_hand/shape", (0, 0, 0.03), (0.05, 0.2, 0.07), _WHITE)
    fixed(stage, "/panda/panda_hand_joint", "/panda/panda_link7", "/panda/panda_hand")
    _fingers(stage, hand)
    _variants(prim)


def _fingers(stage: Any, hand: Any) -> None:
    from pxr import Gf, Sdf, UsdPhysics

    for side, name, finger in ((1, "left", 1), (-1, "right", 2)):
        path, about = f"/panda/panda_{name}finger", Gf.Rotation(Gf.Vec3d(0, 0, 1), 0 if side == 1 else 180)
        frame = Gf.Matrix4d().SetRotate(about).SetTranslateOnly(Gf.Vec3d(0, 0, _FINGER_OFFSET)) * hand
        body(stage, path, frame, mass=0.05, centre=(0, 0.01, 0.025), inertia=2e-5)
        box(stage, f"{path}/shape", (0, 0.0105, 0.027), (0.02, 0.019, 0.054), _DARK)
        drive = {"stiffness": 2000.0, "damping": 100.0} if finger == 1 else {}
        joint(stage, f"/panda/panda_finger_joint{finger}", "Prismatic", "Y", "/panda/panda_hand", path,
               (0.0, _FINGER_RANGE), force=200.0, armature=0.1, **drive)
    follower = stage.GetPrimAtPath("/panda/panda_finger_joint2")
    follower.AddAppliedSchema("NewtonMimicAPI")
    follower.CreateRelationship("newton:mimicJoint").AddTarget("/panda/panda_finger_joint1")
    follower.CreateAttribute("newton:mimicCoef1", Sdf.ValueTypeNames.Float).Set(1.0)
    UsdPhysics.FilteredPairsAPI.Apply(stage.GetPrimAtPath("/panda/panda_leftfinger")).CreateFilteredPairsRel().AddTarget(
        "/panda/panda_rightfinger")


def _variants(prim: Any) -> None:
    """The variant sets that Isaac Lab selects from: how much of the arm collides. Both physics variants are alike."""
    from pxr import UsdPhysics

    physics = prim.GetVariantSets().AddVariantSet("Physics")
    for name in ("mujoco", "physx"):
        physics.AddVariant(name)
    physics.SetVariantSelection("mujoco")
    colliders = prim.GetVariantSets().AddVariantSet("Colliders")
    gripper = ["panda_hand", "panda_leftfinger", "panda_rightfinger"]
    for name in ("gripper_only", "primitives", "convex_hull"):
        colliders.AddVariant(name)
        colliders.SetVariantSelection(name)
        with colliders.GetVariantEditContext():
            for link in gripper + ([] if name == "gripper_only" else [f"panda_link{i}" for i in range(8)]):
                UsdPhysics.CollisionAPI.Apply(prim.GetStage().GetPrimAtPath(f"{prim.GetPath()}/{link}/shape"))
    colliders.SetVariantSelection("gripper_only")


def _cube(stage: Any) -> None:
    from pxr import UsdPhysics

    prim = _root(stage, "cube")
    UsdPhysics.RigidBodyAPI.Apply(prim)
    UsdPhysics.MassAPI.Apply(prim).CreateMassAttr(0.2)
    UsdPhysics.CollisionAPI.Apply(box(stage, "/cube/shape", (0, 0, 0), (0.06, 0.06, 0.06), (0.8, 0.15, 0.1)))


def _table(stage: Any) -> None:
    """Its top is at height 0, as that of NVIDIA's table."""
    from pxr import UsdPhysics

    _root(stage, "table")
    UsdPhysics.CollisionAPI.Apply(box(stage, "/table/top", (0, 0, -0.025), (0.9, 1.3, 0.05), _WOOD))


if __name__ == "__main__":
    print(make_assets(Path(sys.argv[1])))
