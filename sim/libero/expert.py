"""A scripted expert for tasks of picking one thing up and placing it in another: it reads the simulator's state.

It remembers nothing: what to do follows from where hand, thing and goal are, so it can begin anywhere, and a row that
is put back needs no more than the simulator's state.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from sim.remote.protocol import BadInputError

OPEN, CLOSE = -1.0, 1.0
STEP = 0.05
"""Metres that an action of 1 asks for."""
HOVER, CARRY = 0.12, 0.28
"""Metres above the thing before the hand goes down to it, and above the goal's floor while it carries."""
ALIGNED, REACHED, INSIDE = 0.012, 0.02, 0.07
"""Metres: beside the thing's axis, from the place to grasp, and from the goal's axis where the thing has arrived."""
FINGERS = 0.03
"""Metres that they reach below the palm, beyond what they hold."""
FULLY_OPEN = 0.077
"""Metres between the fingers."""


def pick_and_place(env: Any) -> np.ndarray:
    """The action ``[7]`` now. The hand keeps its rotation.

    Raises:
        BadInputError: the task's goal is not to have one thing in another.
    """
    thing, goal = _places(env)
    robot, data = env.robots[0], env.sim.data
    hand = np.array(data.site_xpos[robot.eef_site_id])
    gap = float(np.abs(data.qpos[robot._ref_gripper_joint_pos_indexes]).sum())
    still = float(np.abs(data.qvel[robot._ref_gripper_joint_vel_indexes]).max()) < 0.01
    beside, away = np.linalg.norm((hand - thing)[:2]), np.linalg.norm((thing - goal)[:2])
    reached = np.linalg.norm(hand - thing) < 2 * REACHED
    if away < INSIDE and not reached:
        return _action(hand, hand, OPEN)  # it is in there
    if reached and still and gap < FULLY_OPEN:
        if away < ALIGNED * 2:
            return _action(hand, hand, OPEN)
        if hand[2] < goal[2] + CARRY - STEP and away > INSIDE:
            return _action(hand, np.array([*hand[:2], goal[2] + CARRY]), CLOSE)
        return _action(hand, np.array([*goal[:2], goal[2] + CARRY]), CLOSE)
    if (beside > ALIGNED and hand[2] < thing[2] + HOVER / 2) or beside > ALIGNED * 3:
        return _action(hand, np.array([*thing[:2], thing[2] + HOVER]), OPEN)
    if np.linalg.norm(hand - thing) > REACHED:
        return _action(hand, thing, OPEN)
    return _action(hand, thing, CLOSE)


def _action(hand: np.ndarray, target: np.ndarray, gripper: float) -> np.ndarray:
    move = np.clip((target - hand) / STEP, -1, 1)
    return np.array([*move, 0, 0, 0, gripper], np.float32)


def _places(env: Any) -> tuple[np.ndarray, np.ndarray]:
    """Where to grasp the thing, and the middle of where it shall be: ``[3]`` metres each."""
    goals = env.parsed_problem["goal_state"]
    if len(goals) != 1 or goals[0][0] != "in" or goals[0][1] not in env.objects_dict:
        raise BadInputError(f"no scripted expert knows how to do {goals}: it puts one thing into another, as in "
                            "env.suite=libero_object; start from a policy, loop.warm_start=<folder>, or from logs")
    _, thing, region = goals[0]
    place = np.array(env.sim.data.body_xpos[env.obj_body_id[thing]])
    place[2] += max(0.0, env.get_object(thing).top_offset[2] - FINGERS)
    return place, np.array(env.sim.data.get_site_xpos(region))
