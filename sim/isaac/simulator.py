"""The served side of Isaac Lab: a vectorised task behind ``sim.remote.serve.Simulator``, in Isaac Lab's Python.

Isaac Lab resets a finished row inside the step that finished it. Here that row shows the last observation of the old
episode, and begins another only when it is asked to. Rows are reset by Isaac Lab's ``_reset_idx``, which both kinds of
task have and which its own documentation lets tasks override; a manager-based task's public ``reset(env_ids=…)`` does
the same. Its random numbers are those of the whole process: ``IsaacConfig.seeds`` says what a seed means then.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch

from sim.isaac.changes import Changes
from sim.isaac.config import IsaacConfig
from sim.remote.protocol import Answers, BadInputError, Description


def make(settings: Mapping[str, Any]) -> IsaacSimulator:
    """Serve ``settings["num_envs"]`` rows of the task that the rest, an ``IsaacConfig``, describes."""
    from sim.isaac.launch import build, versions

    config = IsaacConfig(**{key: value for key, value in settings.items() if key != "num_envs"})
    running = contextlib.ExitStack()
    env = build(config, settings["num_envs"], running)
    if "omni.kit.app" not in sys.modules:
        running.callback(os._exit, 0)  # without Kit, what an orderly end takes 3 s of a core for ends with the process
    serve = Demonstrating if config.expert else IsaacSimulator
    return serve(env, config, running, versions())


class Look(NamedTuple):
    """What every row shows at one moment; arrays of the caller's own."""

    frames: dict[str, np.ndarray]
    proprio: np.ndarray
    success: np.ndarray


class IsaacSimulator:
    """See ``sim.remote.serve.Simulator``."""

    def __init__(self, env: Any, config: IsaacConfig, running: contextlib.ExitStack, simulator: str) -> None:
        """``env``: as ``gymnasium.make`` gives it. Raises ``BadInputError`` for what it has not."""
        self._env, self._config, self._running = env.unwrapped, config, running
        self._reset_rows: Callable[[torch.Tensor | slice], None] = self._env._reset_idx
        self._env._reset_idx = self._before_reset
        self._asked = np.zeros(self._env.num_envs, bool)
        """Rows of the step that is under way."""
        self._final: Look | None = None
        """What rows showed that Isaac Lab reset in it."""
        self._success = _success(config.success, self._env)
        observation, _ = self._env.reset()
        observation, _ = self._env.reset()  # on Newton a first reset differs from later ones
        self._changes = Changes(self._env, config, _function(config.object_shift) if config.object_shift else None)
        self._proprio, names = _columns(self._env, observation, config.proprio)
        self._steps, self._left = np.zeros((2, self._env.num_envs), np.int64)
        """Control steps since each row's reset, and those left after its success."""
        self._seen = np.zeros(self._env.num_envs, bool)
        """Rows that have succeeded in this episode."""
        self.description = self._describe(names, simulator)

    def perturb(self, row: int, changes: Mapping[str, Any]) -> None:
        """From the next reset on."""
        self._changes.set(row, changes)

    @torch.no_grad()
    def reset(self, mask: np.ndarray, seeds: np.ndarray, answers: Answers) -> dict[int, str]:
        """Begin episodes; nothing moves in the other rows."""
        rows = np.flatnonzero(mask)
        groups = [[row] for row in rows] if self._config.seeds == "episode" else [rows]
        for group in groups:
            self._env.seed(_thirty_two_bits(seeds[group]))
            self._reset_rows(torch.as_tensor(np.asarray(group), dtype=torch.int32, device=self._env.device))
        self._changes.begin(rows)
        self._env.scene.write_data_to_sim()
        self._env.sim.forward()
        self._show(self._look(self._observe()), rows, answers)
        self._steps[rows], self._left[rows], self._seen[rows] = 0, self._config.steps_after_success, False
        for flags in (answers.terminated, answers.truncated, answers.success, answers.decided):
            flags[rows] = False
        answers.reward[rows], answers.time[rows] = 0, 0
        return {int(row): self._instruction(int(row), int(seeds[row])) for row in rows}

    @torch.no_grad()
    def step(self, actions: np.ndarray, mask: np.ndarray, answers: Answers) -> None:
        """All rows move, those of the mask are shown."""
        low, high = self._config.action_low, self._config.action_high
        normalised = self._changes.execute(np.where(mask[:, None], np.clip(actions, -1, 1), 0), mask)
        raw = torch.as_tensor(low + (normalised + 1) / 2 * (high - low), dtype=torch.float32, device=self._env.device)
        self._asked, self._final = mask, None
        observation, reward, terminated, truncated, _ = self._env.step(raw)
        ended, cut = terminated.cpu().numpy().copy(), truncated.cpu().numpy().copy()  # direct tasks reuse them
        look = self._look(observation)
        self._asked = np.zeros_like(mask)
        rows = np.flatnonzero(mask)
        self._show(look, rows, answers)
        success, over = look.success, ended | cut
        if self._final is not None:
            self._show(self._final, np.flatnonzero(mask & over), answers)
            success = np.where(over, self._final.success, success)
        self._steps[rows] += 1
        self._judge(rows, reward.cpu().numpy(), ended, cut, success, answers)

    def close(self) -> None:
        """End the task and whatever runs it."""
        self._running.close()

    def _judge(self, rows: np.ndarray, reward: np.ndarray, ended: np.ndarray, cut: np.ndarray, success: np.ndarray,
               answers: Answers) -> None:
        """Rewards, flags and times of ``rows`` from Isaac Lab's."""
        sparse = self._config.reward == "sparse"
        self._left[rows] -= self._seen[rows] & sparse
        self._seen[rows] |= success[rows]
        decided = self._seen & sparse
        terminated = ended | (decided & (cut | (self._left <= 0)))
        answers.reward[rows] = success[rows] if sparse else reward[rows]
        answers.terminated[rows], answers.truncated[rows] = terminated[rows], (cut & ~terminated)[rows]
        answers.success[rows], answers.decided[rows] = self._seen[rows], decided[rows]
        answers.time[rows] = self._steps[rows] * self._env.step_dt

    def _before_reset(self, rows: torch.Tensor | slice) -> None:
        """What Isaac Lab calls in a step: keep what is about to be lost, where a row that was asked ends."""
        if self._asked[rows if isinstance(rows, slice) else rows.cpu().numpy()].any():
            extras = self._env.extras
            made = getattr(self._env.cfg, "compute_final_obs", False)
            self._final = self._look(extras["final_obs"] if made else self._observe())
        self._reset_rows(rows)

    def _observe(self) -> Mapping[str, Any]:
        """The observation groups of every row as they are now."""
        manager = getattr(self._env, "observation_manager", None)
        return self._env._get_observations() if manager is None else manager.compute()

    def _look(self, observation: Mapping[str, Any]) -> Look:
        sensors = self._env.scene.sensors
        frames = {name: self._changes.show(_numpy(sensors[name].data.output["rgb"])[..., :3])
                  for name in self._config.cameras}
        proprio = np.concatenate([_numpy(_group(observation, group, term))[:, columns]
                                  for group, term, columns in self._proprio], axis=1).astype(np.float32)
        success = _numpy(self._success(self._env)) if self._success else np.zeros(len(proprio), bool)
        return Look(frames, proprio, success)

    def _show(self, look: Look, rows: np.ndarray, answers: Answers) -> None:
        if not np.isfinite(look.proprio[rows]).all():
            raise FloatingPointError(f"the physics of {self._config.task} diverged: proprio is not finite")
        for name, frames in look.frames.items():
            answers.frames[name][rows] = frames[rows]
        answers.proprio[rows] = look.proprio[rows]

    def _describe(self, names: list[str], simulator: str) -> Description:
        config, env = self._config, self._env
        width = env.single_action_space.shape[0]
        actions = list(config.action_names or (f"action_{i}" for i in range(width)))
        proprio = list(config.proprio_names or names)
        mean, std = config.proprio_mean or [0.0] * len(names), config.proprio_std or [1.0] * len(names)
        for what, given, expected in (("action_names", actions, width), ("proprio_names", proprio, len(names)),
                                      ("proprio_mean", mean, len(names)), ("proprio_std", std, len(names))):
            if len(given) != expected:
                raise BadInputError(f"expected {expected} {what} for {config.task}, got {len(given)}")
        physics = type(getattr(env.sim.cfg, "physics", None)).__name__
        return Description(
            cameras=list(config.cameras), image_size=config.image_size, proprio_names=proprio, action_names=actions,
            control_hz=1 / env.step_dt, max_episode_steps=int(env.max_episode_length),
            row_tasks=[config.task] * env.num_envs, embodiment=config.embodiment,
            statistics={"action_low": [config.action_low] * width, "action_high": [config.action_high] * width,
                        "proprio_mean": list(mean), "proprio_std": list(std)},
            provenance={"simulator": simulator, "physics": physics, "task": config.task,
                        "assets": config.assets, "seeds": config.seeds, "success": config.success,
                        "reward": config.reward, "overrides": list(config.overrides), "clock": "simulated seconds"},
            factors=self._changes.factors)

    def _instruction(self, row: int, seed: int) -> str:
        which = _draw(seed, self._config.task, len(self._config.instructions))
        sentences = self._changes.sentences(row)
        return sentences[which % len(sentences)]


class Demonstrating(IsaacSimulator):
    """A task that has a scripted expert."""

    @torch.no_grad()
    def expert(self, mask: np.ndarray, actions: np.ndarray) -> None:
        """What it would do."""
        assert self._config.expert is not None
        actions[mask] = _function(self._config.expert)(self._env).cpu().numpy()[mask]


def _success(name: str | None, env: Any) -> Callable[[Any], torch.Tensor] | None:
    """From the task to bool ``[n]``."""
    if name is None:
        return None
    kind, _, term = name.partition(":")
    if kind != "term":
        return _function(name)
    manager = getattr(env, "termination_manager", None)
    terms = [] if manager is None else manager.active_terms
    if term not in terms:
        raise BadInputError(f"the task has no termination term {term!r}, it has {list(terms)}; name one, or a "
                            "function: env.config.success=module:function")
    return lambda env: env.termination_manager.get_term(term)


def _function(name: str) -> Callable[..., torch.Tensor]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise BadInputError(f"expected module:function of Isaac Lab's Python, got {name!r} ({error})") from None


def _columns(env: Any, observation: Mapping[str, Any], wanted: Any) -> tuple[list[tuple[str, str, slice]], list[str]]:
    """Where each part of proprio is (group, term of a group that is not concatenated, columns), and names for it."""
    manager = getattr(env, "observation_manager", None)
    found: dict[str, list[tuple[str, str, slice, int, str]]] = {}
    for group, value in observation.items():
        if isinstance(value, Mapping):
            found |= {f"{group}.{term}": [(group, term, slice(None), tensor.shape[1], term)]
                      for term, tensor in value.items()}
            continue
        if value.ndim != 2:  # pictures
            continue
        found[group] = [(group, "", slice(None), value.shape[1], group)]
        if manager is None:
            continue
        ends = np.cumsum([shape[0] for shape in manager.group_obs_term_dim[group]]).tolist()
        parts = [(group, "", slice(start, end), end - start, term)
                 for term, start, end in zip(manager.active_terms[group], [0, *ends], ends, strict=False)]
        found[group] = parts
        found |= {f"{group}.{part[4]}": [part] for part in parts}
    for name in wanted:
        if name not in found:
            raise BadInputError(f"the task has no observation {name!r}, it has {', '.join(found)}")
    parts = [part for name in wanted for part in found[name]]
    return ([(group, term, columns) for group, term, columns, _, _ in parts],
            [f"{name}_{i}" for *_, width, name in parts for i in range(width)])


def _group(observation: Mapping[str, Any], group: str, term: str) -> Any:
    return observation[group][term] if term else observation[group]


def _numpy(values: Any) -> np.ndarray:
    """Isaac Lab 3's arrays have a view for torch, those of 2 are tensors."""
    return getattr(values, "torch", values).cpu().numpy().copy()


def _thirty_two_bits(seeds: np.ndarray) -> int:
    """What NumPy's global generator, which Isaac Lab seeds, can take."""
    return int(np.random.SeedSequence(seeds.tolist()).generate_state(1)[0])


def _draw(seed: int, task: str, count: int) -> int:
    """Which sentence an episode uses."""
    return int(np.random.Generator(np.random.Philox(key=[int(seed), zlib.crc32(task.encode())])).integers(count))
