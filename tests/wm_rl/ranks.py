"""``python -m tests.wm_rl.ranks STORE OUT [setting=value]...``: five updates on the same global batches.

Settings are those of ``make_fabric`` and of the learner. ``resume=FILE`` goes on from what another one left in its OUT,
``last=N`` stops after update N.
"""

import dataclasses
import sys
from pathlib import Path

import torch
import yaml

from data.sampler import DecisionSampler
from data.store import ReplayStore
from tests import examples
from wm_rl.fabric import make_fabric

UPDATES = 5

if __name__ == "__main__":
    path, out, *settings = sys.argv[1:]
    given = {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in settings)}
    resumed, last = given.pop("resume", None), given.pop("last", UPDATES)
    fabric_settings = {"accelerator": "cpu", "precision": "32-true", "strategy": "auto", "devices": 1}
    fabric_settings |= {name: given.pop(name) for name in list(given) if name in fabric_settings}
    torch.set_num_threads(1)
    fabric = make_fabric(**fabric_settings)
    fabric.launch()
    learner = examples.learner(fabric, dataclasses.replace(examples.LEARNER, **given))
    if resumed:
        learner.load_state_dict(torch.load(resumed, weights_only=True)["state"])
    sampler = DecisionSampler(ReplayStore.open(Path(path)), examples.REPLAY, chunk=2, seed=3)
    metrics = [learner.update(sampler.sample(step, rank=fabric.global_rank, world_size=fabric.world_size))
               for step in range(learner.policy.version, last)]
    own = sum(getattr(parameter, "_local_tensor", parameter).numel() for parameter in learner.trained.parameters())
    held = own / sum(parameter.numel() for parameter in learner.trained.parameters())
    learner.gather()
    state = learner.state_dict()
    if fabric.is_global_zero:
        torch.save({"parameters": learner.policy.state_dict(), "metrics": metrics, "state": state,
                    "held": held}, out)
