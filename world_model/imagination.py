"""Imagination as an ``Env``: a policy acts inside the world model, from real states that the store holds.

Row ``i``'s seed alone decides the branch point (a step of a recorded episode) and the noise.
Errors of the model grow with every step, so episodes are short and the uncertainty accumulates.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.store import ReplayStore
from data.text import tokenize
from data.types import Source, Success, UserError
from world_model.config import STARTS, ImaginationConfig
from world_model.frames import split_cameras
from world_model.pipeline import WorldModelPipeline
from world_model.rollout import CARRIED, decided_at, read_context
from world_model.success import SuccessModel
from world_model.training import keyed_generator

BRANCH_STREAM, NOISE_STREAM = 21, 22


@dataclass(frozen=True, kw_only=True)
class Branch:
    """Where an imagined episode leaves the recorded one."""

    episode: int
    step: int
    provenance: Mapping[str, Any]
    """Segment, row in the segment and step: what finds it again after the store has grown."""


class ImaginationEnv:
    """Satisfies ``data.types.Env``; all rows that are not parked share forward passes on the model's device.

    Reward is the change of the probability of success from one frame to the next. An episode terminates, with
    success, once ``success_frames`` consecutive imagined frames reach ``success_threshold``; the probability is
    then 1, so that an imagined success is worth what a simulated one is. After ``horizon`` steps, or once its
    uncertainty passes ``max_uncertainty``, it is truncated.
    ``info["uncertainty"]`` is the error that the model expects of the frame, in units of its typical one-step
    error: about 1 after one step, and growing with the steps that led to it (``rollout.CARRIED``).
    ``info["branch"]`` says where each row branched. Actions are clipped to [-1, 1].
    """

    source = Source.IMAGINED

    def __init__(
        self,
        store: ReplayStore,
        pipeline: WorldModelPipeline,
        success: SuccessModel,
        config: ImaginationConfig,
        *,
        num_envs: int,
        version: int,
    ) -> None:
        """Branch points are taken from what ``store`` shows now. Raises ``UserError`` when it has none."""
        self.store, self.pipeline, self.success, self.config = store, pipeline, success, config
        self.num_envs, self.spec, self.statistics = num_envs, store.spec, store.statistics
        self.embodiment, self.max_episode_steps = store.embodiment, config.horizon
        self.metadata: dict[str, Any] = {"autoreset_mode": "disabled", "render_fps": store.spec.control_hz}
        self.world_model_version = version
        self.provenance: Mapping[str, Any] = {
            "simulator": "world model",
            "clock": "control steps",
            "world_model_version": version,
            "store_episodes": len(store),
            "imagination": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config).items()},
        }
        self._pools = self._eligible()
        context, size = pipeline.denoiser.config["context"], store.spec.image_size
        channels = 3 * len(store.spec.cameras)
        n = num_envs
        self._frames = torch.zeros(n, context, channels, size, size, dtype=torch.uint8)
        self._proprio = torch.zeros(n, context, store.spec.proprio_dim)
        self._actions = torch.zeros(n, context - 1, store.spec.action_dim)
        self._probability, self._carried, self._uncertainty = np.zeros((3, n))
        self._age, self._streak = np.zeros(n, np.int64), np.zeros(n, np.int64)
        self._terminated, self._truncated = np.zeros(n, bool), np.zeros(n, bool)
        self._running = np.zeros(n, bool)
        self._generators = [torch.Generator() for _ in range(n)]
        self._branches: list[Branch | None] = [None] * n
        self._announced: list[np.ndarray] = [np.zeros((0, store.spec.action_dim), np.float32)] * n
        self._ahead: list[deque[_Ahead]] = [deque() for _ in range(n)]
        self._instruction, self._task = [""] * n, [""] * n

    def branch(self, seed: int) -> Branch:
        """Where the episode of this seed branches. Seeds that follow each other begin every episode in turn."""
        rng = np.random.Generator(np.random.Philox(key=[seed % 2**64, BRANCH_STREAM]))
        kinds = list(self._pools)
        kind = kinds[0]
        if len(kinds) > 1:
            weights = np.array([self.config.starts[name] for name in kinds])
            kind = kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]
        episodes, ends = self._pools[kind]
        table = self.store.episodes
        if kind == "beginning":
            episode, step = int(episodes[seed % len(episodes)]), 0
        else:
            place = int(rng.integers(ends[-1]))
            which = int(np.searchsorted(ends, place, side="right"))
            episode, step = int(episodes[which]), place - (int(ends[which - 1]) if which else 0)
        decided = decided_at(self.store, episode)  # nothing is left to do afterwards
        if kind == "near_success":
            step = max(0, decided - self.config.horizon) + step % min(decided, self.config.horizon)
        else:
            step %= decided
        where = {"segment": str(table.segment[episode]), "row": int(table.row[episode]), "step": step, "start": kind}
        return Branch(episode=episode, step=step, provenance=where)

    def reset(self, *, seed: Sequence[int | None], options: Mapping[str, Any]) -> tuple[dict, dict]:
        """Branch the masked rows anew. Raises ``ValueError`` for a masked row without a seed."""
        rows = np.flatnonzero(np.asarray(options["reset_mask"], bool))
        for row in rows.tolist():
            given = seed[row]
            if given is None:
                raise ValueError(f"expected a seed for row {row}, which is to be reset, got None")
            branch = self.branch(given)
            context = read_context(self.store, branch.episode, branch.step, self._frames.shape[1])
            self._frames[row], self._proprio[row] = context.frames, context.proprio
            self._actions[row] = context.actions
            self._generators[row] = keyed_generator(given, NOISE_STREAM)
            self._branches[row] = branch
            self._announced[row] = self._announced[row][:0]
            self._ahead[row].clear()
            self._instruction[row] = str(self.store.episodes.instruction[branch.episode])
            self._task[row] = str(self.store.episodes.task[branch.episode])
        self._carried[rows], self._uncertainty[rows], self._age[rows], self._streak[rows] = 0, 0, 0, 0
        self._terminated[rows], self._truncated[rows], self._running[rows] = False, False, True
        for part in self._parts(rows):
            self._probability[part.rows] = self._judge(part)
        return self._observation(), self._info()

    def foresee(self, row: int, actions: np.ndarray) -> None:
        """Hear the actions ``[n, a]`` that ``row`` is about to take: a model of chunks imagines them in one call.

        Without this, or when other actions follow, it imagines one step per call.
        """
        self._announced[row] = np.clip(np.asarray(actions, np.float32), -1, 1)

    def step(self, actions: np.ndarray) -> tuple[dict, np.ndarray, np.ndarray, np.ndarray, dict]:
        """Imagine one control step of every row that is not parked."""
        reward = np.zeros(self.num_envs, np.float32)
        rows = np.flatnonzero(self._running)
        self._age[rows] += 1
        taken = np.clip(np.asarray(actions, np.float32), -1, 1)
        for row in rows.tolist():
            if self._ahead[row] and not np.array_equal(self._ahead[row][0].action, taken[row]):
                self._ahead[row].clear()
        for part in self._parts(np.array([row for row in rows.tolist() if not self._ahead[row]], np.int64)):
            self._imagine(part, taken)
        self._advance(rows)
        for part in self._parts(rows):
            probability = self._judge(part)
            counts = probability >= self.config.success_threshold
            self._streak[part.rows] = np.where(counts, self._streak[part.rows] + 1, 0)
            self._terminated[part.rows] = self._streak[part.rows] >= self.config.success_frames
            probability = np.where(self._terminated[part.rows], 1.0, probability)
            reward[part.rows] = probability - self._probability[part.rows]
            self._probability[part.rows] = probability
        over = self._age[rows] >= self.config.horizon
        if self.config.max_uncertainty is not None:
            over |= self._uncertainty[rows] > self.config.max_uncertainty
        self._truncated[rows] = over & ~self._terminated[rows]
        self._running = self._running & ~self._terminated & ~self._truncated
        return self._observation(), reward, self._terminated.copy(), self._truncated.copy(), self._info()

    def close(self) -> None:
        """Nothing to release."""

    def _eligible(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Episodes of each kind of start, recorded and among the newest of their source, and where their places end.

        A kind without any (no failures yet) is left out; when none is left, all recorded steps are drawn alike.
        """
        table, newest, config = self.store.episodes, self.config.newest, self.config
        wanted = np.ones(len(table), bool) if config.tasks is None else np.isin(table.task, config.tasks)
        chosen = [np.flatnonzero(wanted & (table.source == source)) for source in config.sources]
        recorded = np.concatenate([indices if newest is None else indices[-newest:] for indices in chosen])
        if len(recorded) == 0:
            raise UserError(
                f"imagination branches from recorded episodes of {' or '.join(config.sources)}"
                + (f" and of {', '.join(config.tasks)}" if config.tasks else "")
                + f", but the replay store {self.store.path} has none; collect or ingest some first"
            )
        outcome, length = table.success[recorded], table.length[recorded]
        places = {"uniform": length, "beginning": np.ones_like(length),
                  "near_success": np.where(outcome == Success.YES.value, np.minimum(length, config.horizon), 0),
                  "failure": np.where(outcome == Success.NO.value, length, 0)}
        kinds = [kind for kind in STARTS if config.starts.get(kind, 0) > 0 and places[kind].any()] or ["uniform"]
        return {kind: (recorded[places[kind] > 0], np.cumsum(places[kind][places[kind] > 0])) for kind in kinds}

    def _parts(self, rows: np.ndarray) -> list[_Part]:
        """Rows in groups of ``micro_batch``, the last one padded by repeating its first row."""
        size = self.config.micro_batch
        groups = [rows[i : i + size] for i in range(0, len(rows), size)]
        return [_Part(rows=g, padded=np.concatenate([g, np.full(size - len(g), g[0], g.dtype)])) for g in groups]

    def _imagine(self, part: _Part, taken: np.ndarray) -> None:
        """One call for rows that have nothing imagined ahead; what comes out waits in ``_ahead``."""
        rows, count, chunk = part.padded, len(part.rows), self.pipeline.denoiser.chunk
        coming = [self._coming(row, taken[row], chunk) for row in part.rows.tolist()]
        last = np.stack([np.concatenate([each, each[-1:].repeat(chunk - len(each), axis=0)]) for each in coming])
        last = np.concatenate([last, last[:1].repeat(len(rows) - count, axis=0)])
        spare = [torch.Generator().manual_seed(0) for _ in rows[count:]]
        output = self.pipeline(
            self._frames[rows],
            torch.cat([self._actions[rows], torch.from_numpy(last)], dim=1),
            self._proprio[rows],
            [self._instruction[row] for row in rows],
            [self._generators[row] for row in part.rows] + spare,
            num_inference_steps=self.config.inference_steps,
        )
        frames, proprio, error = output.frames.cpu(), output.proprio.cpu(), output.error.double().cpu().numpy()
        for i, row in enumerate(part.rows.tolist()):
            self._ahead[row].extend(_Ahead(coming[i][j], frames[i, j], proprio[i, j], float(error[i, j]))
                                    for j in range(len(coming[i])))

    def _coming(self, row: int, taken: np.ndarray, chunk: int) -> np.ndarray:
        """Up to ``chunk`` actions from the one taken now, as far as they were announced."""
        known = self._announced[row]
        if not len(known) or not np.array_equal(known[0], taken):
            self._announced[row] = known[:0]
            return taken[None]
        self._announced[row] = known[chunk:]
        return known[:chunk]

    def _advance(self, rows: np.ndarray) -> None:
        """Move the next imagined step of each row into its history."""
        steps = [self._ahead[row].popleft() for row in rows.tolist()]
        if not steps:
            return
        frames, proprio = torch.stack([each.frame for each in steps]), torch.stack([each.proprio for each in steps])
        actions = torch.from_numpy(np.stack([each.action for each in steps]))
        self._frames[rows] = torch.cat([self._frames[rows][:, 1:], frames[:, None]], dim=1)
        self._proprio[rows] = torch.cat([self._proprio[rows][:, 1:], proprio[:, None]], dim=1)
        self._actions[rows] = torch.cat([self._actions[rows], actions[:, None]], dim=1)[:, 1:]
        square = np.array([each.error for each in steps]) ** 2
        self._uncertainty[rows] = np.sqrt(square + self._carried[rows])
        self._carried[rows] += CARRIED * square

    @torch.inference_mode()
    def _judge(self, part: _Part) -> np.ndarray:
        """Probability of success in the newest frames ``[rows]``."""
        device = self.pipeline.device
        tokens = torch.tensor([tokenize(self._instruction[row]) for row in part.padded], device=device)
        rows = part.padded
        probability = self.success(self._frames[rows, -2:].to(device), self._proprio[rows, -2:].to(device), tokens)
        return probability[: len(part.rows)].double().cpu().numpy()

    def _observation(self) -> dict[str, Any]:
        frames = split_cameras(self._frames[:, -1], self.spec.cameras)
        return {"frames": frames, "proprio": self._proprio[:, -1].numpy().copy()}

    def _info(self) -> dict[str, Any]:
        return {
            "instruction": list(self._instruction),
            "task": list(self._task),
            "success": self._terminated.copy(),
            "uncertainty": self._uncertainty.astype(np.float32),
            "time": self._age / self.spec.control_hz,
            "probability": self._probability.astype(np.float32),
            "branch": [dict(branch.provenance) if branch else {} for branch in self._branches],
        }


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Rows that share a forward pass, and the same padded to its size."""

    rows: np.ndarray
    padded: np.ndarray


class _Ahead(NamedTuple):
    """A step that was imagined together with those before it."""

    action: np.ndarray
    frame: Tensor
    proprio: Tensor
    error: float
