"""A task for Isaac Lab 3.x: push a cube onto a strip across the table with a Panda's hand, seen by one camera.

All its parts are boxes or the stand-in arm of ``sim.isaac.assets``, so it runs without NVIDIA's assets. The hand points
down at a fixed height; an action moves it over the table. Import it in Isaac Lab's Python, which registers the task.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import isaaclab.sim as sim_utils
import torch
from isaaclab.actuators import ImplicitActuatorCfg
from isaaclab.assets import ArticulationCfg, AssetBaseCfg, RigidObjectCfg
from isaaclab.controllers import DifferentialIKController, DifferentialIKControllerCfg
from isaaclab.envs import DirectRLEnv, DirectRLEnvCfg
from isaaclab.scene import InteractiveSceneCfg
from isaaclab.sensors import CameraCfg
from isaaclab.sim import SimulationCfg
from isaaclab.utils import configclass, replace
from isaaclab.utils.math import sample_uniform
from isaaclab_assets import FRANKA_MINIMAL_CFG
from isaaclab_newton.physics import MJWarpSolverCfg, NewtonCfg
from isaaclab_newton.renderers import NewtonWarpRendererCfg
from isaaclab_newton.sim.schemas import MujocoRigidBodyCfg

TASK = "WmRl-Push-Cube-Franka-StandIn"

STRIP = (0.57, 0.67)
"""A cube whose centre is between these is on the strip: metres in front of the robot's base."""
CUBE = 0.06
HAND_HEIGHT = 0.135
"""Of the hand's frame above the table: the fingertips are 2 cm above it."""
DOWN = (1.0, 0.0, 0.0, 0.0)
"""The hand points down, its fingers side by side in y (x, y, z, w)."""
START = (0.0, 0.2185, 0.0, -2.8958, 0.0, 3.1143, 0.7855)
"""Joint angles (rad) that put the hand at ``START_PLACE`` and ``HAND_HEIGHT``."""
START_PLACE = (0.33, 0.0)
FINGERS = 0.02
"""How far each finger is opened: together they are wider than the cube, and it does not fit between them."""
STRIDE = 0.03
"""Metres that an action of 1 moves the hand's target in one control step."""
LEAD = 0.05
"""The target stays this near to the hand, in metres: a blocked hand does not wind up."""
LOW, HIGH = (0.3, -0.2), (0.72, 0.2)
"""Where the hand may be sent."""


@configclass
class PushSceneCfg(InteractiveSceneCfg):
    """A table top at height 0, the arm at its edge, a cube, a strip painted on the table, and a camera across it."""

    table = AssetBaseCfg(
        prim_path="{ENV_REGEX_NS}/Table", init_state=AssetBaseCfg.InitialStateCfg(pos=(0.45, 0.0, -0.025)),
        spawn=sim_utils.CuboidCfg(size=(1.0, 1.0, 0.05), collision_props=sim_utils.UsdPhysicsCollisionCfg(),
                                  visual_material=sim_utils.PreviewSurfaceCfg(diffuse_color=(0.55, 0.42, 0.3))))
    strip = AssetBaseCfg(
        prim_path="{ENV_REGEX_NS}/Strip", init_state=AssetBaseCfg.InitialStateCfg(pos=(sum(STRIP) / 2, 0.0, 0.001)),
        spawn=sim_utils.CuboidCfg(size=(STRIP[1] - STRIP[0], 0.5, 0.002),
                                  visual_material=sim_utils.PreviewSurfaceCfg(diffuse_color=(0.1, 0.7, 0.25))))
    cube = RigidObjectCfg(
        prim_path="{ENV_REGEX_NS}/Cube", init_state=RigidObjectCfg.InitialStateCfg(pos=(0.45, 0.0, CUBE / 2)),
        spawn=sim_utils.CuboidCfg(size=(CUBE, CUBE, CUBE), rigid_props=sim_utils.UsdPhysicsRigidBodyCfg(),
                                  collision_props=sim_utils.UsdPhysicsCollisionCfg(),
                                  mass_props=sim_utils.MassCfg(mass=0.1),
                                  visual_material=sim_utils.PreviewSurfaceCfg(diffuse_color=(0.8, 0.1, 0.1))))
    robot: ArticulationCfg = replace(
        FRANKA_MINIMAL_CFG, prim_path="{ENV_REGEX_NS}/Robot",
        spawn=replace(FRANKA_MINIMAL_CFG.spawn, variants={"Physics": "mujoco", "Colliders": "gripper_only"},
                      rigid_props=[MujocoRigidBodyCfg(gravcomp=1.0)]),
        init_state=ArticulationCfg.InitialStateCfg(joint_pos={
            **{f"panda_joint{number}": angle for number, angle in enumerate(START, start=1)},
            "panda_finger_joint.*": FINGERS}),
        actuators={
            "arm": ImplicitActuatorCfg(joint_names_expr=["panda_joint[1-4]"], stiffness=800.0, damping=80.0),
            "wrist": ImplicitActuatorCfg(joint_names_expr=["panda_joint[5-7]"], stiffness=100.0, damping=10.0),
            "finger": ImplicitActuatorCfg(joint_names_expr=["panda_finger_joint1"], stiffness=2000.0, damping=100.0),
            "follower": ImplicitActuatorCfg(joint_names_expr=["panda_finger_joint2"], stiffness=0.0, damping=0.0)})
    camera = CameraCfg(
        prim_path="{ENV_REGEX_NS}/Camera", width=64, height=64, data_types=["rgb"],
        offset=CameraCfg.OffsetCfg(pos=(1.15, 0.0, 0.7), rot=(-0.3827, 0.0, 0.9239, 0.0), convention="world"),
        spawn=sim_utils.PinholeCameraCfg(focal_length=24.0, horizontal_aperture=20.0, clipping_range=(0.05, 5.0)),
        renderer_cfg=NewtonWarpRendererCfg())
    light = AssetBaseCfg(prim_path="/World/Light", spawn=sim_utils.DomeLightCfg(intensity=2000.0))


@configclass
class PushEnvCfg(DirectRLEnvCfg):
    """10 control steps per second, each of six steps of physics."""

    decimation = 6
    episode_length_s = 4.0
    action_space = 2
    observation_space = 3
    state_space = 0
    sim: SimulationCfg = SimulationCfg(dt=1 / 60, render_interval=6, physics=NewtonCfg(
        solver_cfg=MJWarpSolverCfg(njmax=80, nconmax=20, cone="pyramidal", integrator="implicitfast", iterations=100,
                                   ls_iterations=50), num_substeps=1))
    scene: PushSceneCfg = PushSceneCfg(num_envs=16, env_spacing=0.0)  # worlds of their own: equal ones round alike
    cube_low: tuple[float, float] = (0.42, -0.12)
    cube_high: tuple[float, float] = (0.48, 0.12)
    """Where the cube's centre begins, drawn uniformly."""


class PushEnv(DirectRLEnv):
    """Observes the hand in the robot's frame (``policy``: x, y, z in metres). Its reward is 1 on the strip."""

    cfg: PushEnvCfg

    def __init__(self, cfg: PushEnvCfg, render_mode: str | None = None, **rest: Any) -> None:
        super().__init__(cfg, render_mode, **rest)
        robot = self.scene["robot"]
        self._hand = robot.find_bodies("panda_hand")[0][0]
        self._arm = robot.find_joints("panda_joint[1-7]")[0]
        self._controller = DifferentialIKController(
            DifferentialIKControllerCfg(command_type="pose", use_relative_mode=False, ik_method="dls",
                                        ik_params={"lambda_val": 0.02}), self.num_envs, self.device)
        self._low, self._high = (torch.tensor(bound, device=self.device) for bound in (LOW, HIGH))
        self._target = self.hand()[:, :2].clone()
        rest_of_pose = torch.tensor([HAND_HEIGHT, *DOWN], device=self.device)
        self._rest = rest_of_pose.repeat(self.num_envs, 1)

    def hand(self) -> torch.Tensor:
        """Position of the hand's frame, ``[n, 3]``, metres from the robot's base."""
        return self.scene["robot"].data.body_link_pose_w.torch[:, self._hand, :3] - self.scene.env_origins

    def cube(self) -> torch.Tensor:
        """Position of the cube's centre, ``[n, 3]``, metres from the robot's base."""
        return self.scene["cube"].data.root_link_pose_w.torch[:, :3] - self.scene.env_origins

    def _pre_physics_step(self, actions: torch.Tensor) -> None:
        hand = self.hand()[:, :2]
        wanted = torch.clamp(self._target + STRIDE * actions, hand - LEAD, hand + LEAD)
        self._target = torch.clamp(wanted, self._low, self._high)
        robot = self.scene["robot"].data
        pose = torch.cat([self.hand(), robot.body_link_pose_w.torch[:, self._hand, 3:]], dim=1)
        self._controller.set_command(torch.cat([self._target, self._rest], dim=1))
        jacobian = robot.body_link_jacobian_w.torch[:, self._hand - 1][:, :, self._arm]  # a fixed base has no row
        self._joints = self._controller.compute(pose[:, :3], pose[:, 3:], jacobian, robot.joint_pos.torch[:, self._arm])

    def _apply_action(self) -> None:
        self.scene["robot"].set_joint_position_target_index(target=self._joints, joint_ids=self._arm)

    def _get_observations(self) -> dict[str, torch.Tensor]:
        return {"policy": self.hand()}

    def _get_rewards(self) -> torch.Tensor:
        return on_strip(self).float()

    def _get_dones(self) -> tuple[torch.Tensor, torch.Tensor]:
        late = self.episode_length_buf >= self.max_episode_length
        return torch.zeros_like(late), late

    def _reset_idx(self, env_ids: torch.Tensor) -> None:
        super()._reset_idx(env_ids)
        robot, cube = self.scene["robot"], self.scene["cube"]
        joints = robot.data.default_joint_pos.torch[env_ids].clone()
        robot.write_joint_position_to_sim_index(position=joints, env_ids=env_ids)
        robot.write_joint_velocity_to_sim_index(velocity=torch.zeros_like(joints), env_ids=env_ids)
        robot.set_joint_position_target_index(target=joints, env_ids=env_ids)
        pose = cube.data.default_root_pose.torch[env_ids].clone()
        low, high = (torch.tensor(bound, device=self.device) for bound in (self.cfg.cube_low, self.cfg.cube_high))
        pose[:, :2] = sample_uniform(low, high, (len(env_ids), 2), self.device)
        pose[:, :3] += self.scene.env_origins[env_ids]
        cube.write_root_pose_to_sim_index(root_pose=pose, env_ids=env_ids)
        cube.write_root_velocity_to_sim_index(root_velocity=torch.zeros(len(env_ids), 6, device=self.device),
                                              env_ids=env_ids)
        self._target[env_ids] = torch.tensor(START_PLACE, device=self.device)


def shift_cube(env: PushEnv, rows: torch.Tensor, shift: torch.Tensor) -> None:
    """Move the cubes of ``rows`` by ``shift``, ``[k, 2]`` metres."""
    cube = env.scene["cube"]
    pose = cube.data.root_link_pose_w.torch[rows].clone()
    pose[:, :2] += shift
    cube.write_root_pose_to_sim_index(root_pose=pose, env_ids=rows)


def on_strip(env: PushEnv) -> torch.Tensor:
    """Success: the cube's centre is over the strip, ``[n]`` bool."""
    x = env.cube()[:, 0]
    return (x > STRIP[0]) & (x < STRIP[1])


def expert(env: PushEnv) -> torch.Tensor:
    """What to do now, ``[n, 2]`` within [-1, 1]: get behind the cube, then push it ahead with both fingers."""
    offset = (env.cube() - env.hand())[:, :2]
    slack = torch.where(offset[:, 0] < CUBE, 0.03, 0.01)  # once it pushes, it goes on while both fingers touch
    behind = offset[:, 1].abs() < slack
    line_up = offset - torch.tensor([CUBE + 0.02, 0.0], device=env.device)
    push = torch.stack([torch.full_like(offset[:, 0], STRIDE), offset[:, 1]], dim=1)
    step = torch.where(behind[:, None], push, line_up) / STRIDE
    return step / step.abs().amax(dim=1, keepdim=True).clamp(min=1.0)


gymnasium.register(id=TASK, entry_point=f"{__name__}:PushEnv", disable_env_checker=True,
                   kwargs={"env_cfg_entry_point": f"{__name__}:PushEnvCfg"})
