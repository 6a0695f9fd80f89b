"""Isaac Lab's cube lifting, written for PhysX, on Newton: a task of one's own, registered in Isaac Lab's Python."""

import gymnasium
from isaaclab.utils import configclass
from isaaclab_newton.physics import MJWarpSolverCfg, NewtonCfg
from isaaclab_tasks.contrib.lift.config.franka.joint_pos_env_cfg import FrankaCubeLiftEnvCfg


@configclass
class LiftOnNewton(FrankaCubeLiftEnvCfg):
    def __post_init__(self):
        super().__post_init__()
        self.scene.robot.spawn.variants["Physics"] = "mujoco"
        self.sim.physics = NewtonCfg(solver_cfg=MJWarpSolverCfg(njmax=300, nconmax=100, integrator="implicitfast"))


gymnasium.register(id="Test-Lift-Cube", entry_point="isaaclab.envs:ManagerBasedRLEnv", disable_env_checker=True,
                   kwargs={"env_cfg_entry_point": f"{__name__}:LiftOnNewton"})
