"""``python -m tests.wm_rl.ranks STORE DEVICES OUT``: five updates on the same global batches, on DEVICES processes."""

import sys
from pathlib import Path

import torch
from lightning.fabric import Fabric

from data.sampler import DecisionSampler
from data.store import ReplayStore
from tests import examples

if __name__ == "__main__":
    path, devices, out = sys.argv[1:]
    torch.set_num_threads(1)
    fabric = Fabric(accelerator="cpu", devices=int(devices), strategy="ddp" if int(devices) > 1 else "auto")
    fabric.launch()
    learner = examples.learner(fabric)
    sampler = DecisionSampler(ReplayStore.open(Path(path)), examples.REPLAY, chunk=2, seed=3)
    metrics = [learner.update(sampler.sample(step, rank=fabric.global_rank, world_size=fabric.world_size))
               for step in range(5)]
    if fabric.is_global_zero:
        torch.save({"parameters": learner.policy.state_dict(), "metrics": metrics}, out)
