"""Open and close the stand-in gripper: run by a test in Isaac Lab's Python, with the file to write to."""

import contextlib
import json
import sys
from pathlib import Path

import torch

from sim.isaac.config import IsaacConfig
from sim.isaac.launch import build

with contextlib.ExitStack() as running:
    task = build(IsaacConfig(task="WmRl-Push-Cube-Franka-StandIn", modules=["sim.isaac.push"], instructions=["-"]), 2,
                 running).unwrapped
    task.reset()
    robot, reached = task.scene["robot"], {}
    fingers = robot.find_joints(["panda_finger_joint1", "panda_finger_joint2"])[0]
    for name, width in (("open", 0.04), ("closed", 0.0)):
        robot.set_joint_position_target_index(target=torch.full((2, 1), width), joint_ids=fingers[:1])
        for _ in range(10):
            task.step(torch.zeros(2, 2))
        reached[name] = robot.data.joint_pos.torch[:, fingers].tolist()
    Path(sys.argv[1]).write_text(json.dumps(reached))
