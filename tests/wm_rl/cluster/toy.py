"""A toy simulator with faults, and a loop that stands at its last stage.

``python -m tests.wm_rl.cluster.toy FOLDER ITERATIONS`` runs that stage in FOLDER, or resumes it, as the command does.
"""

import hashlib
import os
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from lightning.fabric import Fabric

from data.budget import StoreConfig
from data.sampler import ReplayConfig
from data.store import ReplayStore
from data.types import Source
from tests import examples
from wm_rl import interrupts
from wm_rl.cluster.config import RayRuntime
from wm_rl.cluster.writer import Writer
from wm_rl.fabric import make_fabric
from wm_rl.journal import Journal
from wm_rl.loop import STAGES, Loop, LoopConfig, _sha256
from wm_rl.objectives import Gipo
from world_model.audit import Drift
from world_model.config import ImaginationConfig, WorldModelConfig
from world_model.learner import WorldModelLearner

MODEL = WorldModelConfig(widths=(16, 24), batch=2, success_batch=2, warmup=2, steps=2, round_steps=1, success_windows=2,
                         success_ratio=0.5, sources={"sim": 1.0})


class ToyEnv:
    """An episode of seed ``s`` lasts ``4 + s % 5`` steps and succeeds when ``s`` is even.

    ``faults``: what happens in the sixth step of the first, second, … one that is made, as the file ``marks`` counts:
    ``hang``, ``exit`` or ``raise``. ``nan``: the last reward of every seed that 3 divides is.
    """

    spec, statistics, source, embodiment = examples.SPEC, examples.STATISTICS, Source.SIM, "toy"
    world_model_version, max_episode_steps, metadata = -1, 8, {"autoreset_mode": "disabled"}
    provenance = {"simulator": "toy"}

    def __init__(self, num_envs, workers=0, only=None, faults=(), marks=None, nan=False, latency=0.0):
        num_envs = num_envs if only is None else len(only)
        self.num_envs, self.nan, self.latency, self.steps = num_envs, nan, latency, 0
        marks = None if only and only[0] else marks  # the first row of a collector has the faults
        life = Path(marks).stat().st_size if marks and Path(marks).exists() else 0
        self.fault = faults[life] if marks and life < len(faults) else None
        if marks:
            with Path(marks).open("a") as file:
                file.write(".")
        self.seed, self.count = np.zeros(num_envs, int), np.zeros(num_envs, int)
        self.over = np.ones(num_envs, bool)

    def reset(self, *, seed, options):
        for row in np.flatnonzero(options["reset_mask"]):
            self.seed[row], self.count[row], self.over[row] = seed[row], 0, False
        return self._look()

    def step(self, actions):
        time.sleep(self.latency)
        self.steps += 1
        if self.steps == 6 and self.fault:
            if self.fault == "exit":
                os._exit(3)
            if self.fault == "raise":
                raise RuntimeError("the simulator lost its mind")
            time.sleep(1e6)
        playing = ~self.over
        self.count[playing] += 1
        self.over |= self.count >= 4 + self.seed % 5
        ended = self.over & self.won()
        reward = (ended & playing).astype(np.float32)
        if self.nan:
            reward[self.over & playing & (self.seed % 3 == 0)] = np.nan
        observation, info = self._look()
        return observation, reward, ended, self.over & ~ended, info

    def won(self):
        """Of each row, should it be over."""
        return self.seed % 2 == 0

    def close(self):
        pass

    def _look(self):
        size = self.spec.image_size
        frames = np.zeros((self.num_envs, size, size, 3), np.uint8)
        frames += (self.count * 20 + self.seed % 7).astype(np.uint8)[:, None, None, None]
        info = {"instruction": ["reach the goal"] * self.num_envs, "task": ["reach"] * self.num_envs,
                "success": self.over & self.won(), "uncertainty": np.zeros(self.num_envs, np.float32),
                "time": self.count / 10}
        proprio = np.stack([self.count, self.seed % 7], axis=1).astype(np.float32)
        return {"frames": {"front": frames}, "proprio": proprio}, info


class LearnableEnv(ToyEnv):
    """Succeeds when the first action pointed, on average, where the second proprio said: to -1 or to 1.

    Whoever draws actions at random succeeds in about one of three.
    """

    def __init__(self, num_envs, **settings):
        super().__init__(num_envs, **settings)
        self.sum = np.zeros(self.num_envs)

    def reset(self, *, seed, options):
        self.sum[options["reset_mask"]] = 0
        return super().reset(seed=seed, options=options)

    def step(self, actions):
        playing = ~self.over
        self.sum[playing] += (actions[:, 0] * self.side())[playing]
        return super().step(actions)

    def side(self):
        return np.where(self.seed % 2 == 1, 1, -1)

    def won(self):
        return self.sum > 0.3 * np.maximum(self.count, 1)

    def _look(self):
        observation, info = super()._look()
        observation["proprio"][:, 1] = self.side()
        return observation, info


def fingerprint(trajectory):
    """Of what was played and with which seed, not of where it lies."""
    parts = [trajectory.action_token, trajectory.log_prob, trajectory.reward, trajectory.proprio,
             trajectory.policy_version, *trajectory.frames.values()]
    found = hashlib.sha256(f"{trajectory.source} {trajectory.provenance['seed']}".encode())
    for part in parts:
        found.update(np.ascontiguousarray(part).tobytes())
    return found.hexdigest()


class RecordingWriter(Writer):
    """A writer that notes what it is about to acknowledge in a file outside the run, synced to disk."""

    def __init__(self, store, storage, quarantine):
        super().__init__(store, storage, quarantine)
        self.ledger = store.parent.parent / "acknowledged"

    def append(self, trajectory):
        super().append(trajectory)
        descriptor = os.open(self.ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, f"{fingerprint(trajectory)}\n".encode())
        os.fsync(descriptor)
        os.close(descriptor)


class LatentToy(ToyEnv):
    """With latency as ``sim.latency.LatentVectorEnv`` takes it; it never varies."""

    def __init__(self, latency_ms, variation=0.0, **rows):
        super().__init__(latency=latency_ms / 1e3, **rows)


def runtime(*, strategy="auto", **changes):
    """On a cluster of its own, or on that which RAY_ADDRESS names."""
    values = {"address": os.environ.get("RAY_ADDRESS"), "object_store_bytes": 100 * 2**20, "collectors": 1,
              "rows_per_thread": 1, "inference_servers": 1, "imaginers": 1, "learners": 1, "learner_nodes": 1,
              "copies": None, "batch_size": 4, "max_age_ms": 5.0, "publish_every": 2, "max_lag": 20.0,
              "updates_per_episode": None, "patience": 120.0, "max_restarts": 3} | changes
    fabric = partial(make_fabric, accelerator="cpu", precision="32-true", strategy=strategy)
    return RayRuntime(fabric=fabric, **values)


def loop(folder, *, iterations=3, imagined=0.0, kind=ToyEnv, episodes=4, updates=4, windows=4, seed=0,
         learner=examples.LEARNER, fabric=None, **env):
    """A new one, or one that is resumed. ``imagined``: weight of that source; 0 goes without a world model."""
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    folder.mkdir(exist_ok=True)
    config = LoopConfig(iterations=iterations, episodes_per_iteration=episodes, updates_per_iteration=updates,
                        logs=None, log_episodes_per_task=1, demonstrations_per_task=1, prefill_episodes=1,
                        branches_per_iteration=2, refit_every=1, warm_start=None, keep_checkpoints=2)
    mix = {"sim": 1.0, "real": 0.0, "imagined": imagined}
    replay = ReplayConfig(windows=windows, decisions=4, discount=0.9, mix=mix, capacity=dict.fromkeys(mix))
    made = Loop(
        folder=folder, seed=seed, config=config, env=partial(kind, **{"num_envs": 2} | env), stand_in=None, expert=None,
        logs=None, policy=examples.POLICY, objective=Gipo(beta=0.5), replay=replay,
        storage=StoreConfig(segment_bytes=2**20), trust=examples.TRUST, learner=learner, cloning=None,
        world_model=MODEL, imagination=ImaginationConfig(horizon=3, micro_batch=2, audit_every=1, sources=("sim",)),
        fabric=fabric, journal=Journal(folder, [], enabled=fabric.is_global_zero))
    made.cloning = type("", (), {"steps": 0})
    if not (folder / "checkpoints").exists():
        store = ReplayStore.create(folder / "replay.zarr", spec=examples.SPEC, statistics=examples.STATISTICS,
                                   embodiment="toy", config=made.storage)
        store.append([examples.trajectory(seed, 6, Source.SIM) for seed in range(4)])
        made._opened, made.policy = store, examples.policy()
        made.policy.save(folder / "warm_start")
        if made.imagines:
            made.world_model = WorldModelLearner(MODEL, spec=store.spec, statistics=store.statistics, seed=0)
            made.fit_world_model(2, None)
        store.close()
        made.progress = {"stage": len(STAGES) - 1, "iteration": 0, "seconds": {}, "position": {},
                         "drift": asdict(Drift()),
                         "warm_start": _sha256(folder / "warm_start" / "policy.safetensors")}
        made.save()
    return made


if __name__ == "__main__":
    interrupts.remember()
    made = loop(Path(sys.argv[1]), iterations=int(sys.argv[2]), imagined=0.5, latency=0.02)
    try:
        made.run(runtime(collectors=2).improve)
    except KeyboardInterrupt:
        sys.exit(interrupts.exit_status())
