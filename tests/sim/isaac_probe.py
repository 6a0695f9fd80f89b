"""What a vectorised task of Isaac Lab does that its callers must know: measured on the real one and on the fake.

``<Isaac Lab's Python> -m tests.sim.isaac_probe tests/sim/isaac_golden.json`` writes the record of Isaac-Cartpole-Direct
that the fake is held to. Both have two rows and episodes of five control steps.
"""

import contextlib
import json
import sys
from pathlib import Path

import torch

STEPS = 5


def probe(env):
    """Facts of ``env``, as ``gymnasium.make`` gives it: no measurements, so that they do not depend on a machine."""
    task = env.unwrapped
    still, push = torch.zeros(2, 1), torch.ones(2, 1)
    starts = [_policy(env.reset(seed=1)[0]) for _ in range(3)]
    first = _policy(env.reset(seed=2)[0])
    observation, reward, terminated, truncated, extras = env.step(push)
    facts = {
        "groups": {name: [list(value.shape), str(value.dtype)] for name, value in observation.items()},
        "rewards": [list(reward.shape), str(reward.dtype)],
        "flags": [[list(flag.shape), str(flag.dtype)] for flag in (terminated, truncated)],
        "actions_are_unbounded": bool((env.action_space.high == float("inf")).all()),
        "numpy_actions_raise": _raises(lambda: env.step(push.numpy())),
        "max_episode_length": task.max_episode_length,
        "the_same_seed_resets_alike_after_a_first_reset": bool((starts[1] == starts[2]).all()),
        "another_seed_resets_otherwise": bool((first != starts[1]).any()),
        "final_obs_before_anything_ended": "final_obs" in extras,
    }
    env.reset(seed=2)
    observation, _, _, truncated, extras = env.step(push)
    weak = _policy(observation)
    env.reset(seed=2)
    strong = _policy(env.step(3 * push)[0])
    facts["actions_beyond_1_are_clipped"] = bool((weak == strong).all())
    before, ended = [], []
    env.reset(seed=2)
    for _ in range(STEPS):
        observation, _, terminated, truncated, extras = env.step(still)
        before.append(_policy(observation))
        ended.append((truncated, truncated.clone()))
    facts |= {
        "steps_until_truncated": [bool(copy.all()) for _, copy in ended].index(True) + 1,
        "reset_within_the_step_that_ended": bool((task.episode_length_buf == 0).all()),
        "final_obs_shape": list(extras["final_obs"]["policy"].shape),
        "final_obs_is_of_the_old_episode": bool((extras["final_obs"]["policy"] != observation["policy"]).any()),
        "shapes_of_logs": sorted({str(list(torch.as_tensor(value).shape)) for value in extras["log"].values()}),
    }
    final = extras["final_obs"]["policy"].clone()
    _, _, _, _, extras = env.step(still)
    facts["flags_of_a_step_are_written_over_in_the_next"] = bool((ended[-1][0] != ended[-1][1]).any())
    facts["final_obs_stays"] = bool((extras["final_obs"]["policy"] == final).all())
    here = _policy(task._get_observations())
    task._reset_idx(torch.tensor([1], dtype=torch.int32))
    after = _policy(task._get_observations())
    facts["a_row_reset_alone_leaves_the_other"] = bool((here[0] == after[0]).all() and (here[1] != after[1]).any())
    return facts


def _policy(observation):
    return observation["policy"].clone()


def _raises(call):
    try:
        call()
    except Exception as error:
        return type(error).__name__
    return None


if __name__ == "__main__":
    from sim.isaac.config import IsaacConfig
    from sim.isaac.launch import build

    with contextlib.ExitStack() as running:
        config = IsaacConfig(task="Isaac-Cartpole-Direct", instructions=["balance the pole"], max_episode_steps=STEPS,
                             overrides=["physics=newton_mjwarp"])
        Path(sys.argv[1]).write_text(json.dumps(probe(build(config, 2, running)), indent=1) + "\n")
