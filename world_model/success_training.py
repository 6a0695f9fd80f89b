"""What fits the success model: recorded and imagined frames whose outcome is known, half of them showing success."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import UInt8
from torch import Tensor

from data.store import ReplayStore
from data.text import tokenize
from data.types import Success
from world_model.config import WorldModelConfig
from world_model.frames import stack_cameras
from world_model.pipeline import WorldModelPipeline
from world_model.rollout import ImaginedFrames, decided_at, imagine_windows, outcome, read_windows
from world_model.success import SuccessModel, balanced_loss
from world_model.training import SUCCESS_STREAM, Batch, Log, keyed_generator


class SuccessModule(lightning.LightningModule):
    """Fits ``SuccessModel`` on frames of episodes whose outcome is known, half of them showing success."""

    def __init__(self, config: WorldModelConfig, model: SuccessModel, seed: int) -> None:
        super().__init__()
        self.config, self.seed, self.first_steps = config, seed, round(config.steps * config.success_ratio)
        self.model = model.to(memory_format=torch.channels_last)  # type: ignore[call-arg] # diffusers wraps ``to``
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.success_learning_rate, weight_decay=config.success_weight_decay,
            fused=True)
        self.steps = 0
        self.log_to: Log | None = None

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Hand over the same optimiser in every fit, so its moments live on."""
        return self.optimizer

    def training_step(self, batch: Batch, batch_index: int) -> Tensor:
        """Class-balanced cross entropy."""
        generator = keyed_generator(self.seed, self.steps, SUCCESS_STREAM)
        config = self.config
        frames = shift_frames(batch["frames"], config.success_shift, generator)
        left = min(1.0, 2 - 2 * (self.steps + 1) / max(1, self.first_steps))  # falls over the first fit's second half
        for group in self.optimizer.param_groups:
            group["lr"] = max(config.success_learning_rate * left, config.success_round_learning_rate)
        logit = self.model.balanced_logit(frames, batch["proprio"], batch["tokens"])
        loss = balanced_loss(logit, batch["label"])
        if self.log_to is not None:
            self.log_to(self.steps, {"world_model/success_loss": float(loss.detach())})
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient; the Trainer's own clipping refuses fused optimisers."""
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_index: int) -> None:
        """Count the step."""
        self.steps += 1


class SuccessSampler:
    """Pairs of consecutive frames of episodes with known success; every other pair's newest frame shows success.

    ``imagined`` takes ``imagined_share`` of either half.
    """

    def __init__(
        self, store: ReplayStore, *, sources: Mapping[str, float], seed: int, imagined: ImaginedFrames | None = None,
        imagined_share: float = 0.5,
    ) -> None:
        self.store, self.seed, self.imagined, self.share = store, seed, imagined, imagined_share
        episodes = store.episodes
        drawn = [name for name, weight in sources.items() if weight > 0]
        known = np.isin(episodes.source, drawn) & (episodes.success != Success.UNKNOWN.value)
        self.done: list[tuple[int, int]] = []
        self.not_done: list[tuple[int, int]] = []
        for index in np.flatnonzero(known).tolist():
            shown, before = outcome(store, index)
            self.done += [(index, step) for step in np.flatnonzero(shown).tolist()]
            self.not_done += [(index, step) for step in np.flatnonzero(before).tolist()]
        self.pools = (torch.empty(0, 2), torch.empty(0, 2)) if imagined is None else imagined.pools()

    @property
    def usable(self) -> bool:
        """Both classes are present."""
        return bool(self.done and self.not_done)

    @property
    def prior(self) -> float:
        """Share of frames that show success."""
        return len(self.done) / (len(self.done) + len(self.not_done))

    def sample(self, step: int, batch: int) -> Batch:
        """``frames uint8 [b, 2, c, h, w]``, ``proprio [b, 2, p]``, ``tokens [b, l]``, ``label [b]``."""
        rng = np.random.Generator(np.random.Philox(key=[self.seed, step], counter=[0, 0, 0, SUCCESS_STREAM]))
        rows = [self._draw(rng, shows_success=i % 2 == 0) for i in range(batch)]
        frames, proprio, tokens = zip(*rows, strict=True)
        return {"frames": torch.stack(frames), "proprio": torch.stack(proprio), "tokens": torch.stack(tokens),
                "label": torch.arange(batch) % 2 == 0}

    def _draw(self, rng: np.random.Generator, *, shows_success: bool) -> tuple[Tensor, Tensor, Tensor]:
        pool = self.pools[0 if shows_success else 1]
        if self.imagined is not None and len(pool) and rng.random() < self.share:
            window, at = pool[int(rng.integers(len(pool)))].tolist()
            pair = slice(at, at + 2)
            return self.imagined.frames[window, pair], self.imagined.proprio[window, pair], self.imagined.tokens[window]
        recorded = self.done if shows_success else self.not_done
        episode, step = recorded[int(rng.integers(len(recorded)))]
        frames, proprio, tokens = recorded_pairs(self.store, episode, [step])
        return frames[0], proprio[0], tokens[0]


def imagine_recorded(
    store: ReplayStore, pipeline: WorldModelPipeline, config: WorldModelConfig, *, seed: int, fit: int
) -> ImaginedFrames | None:
    """Roll recorded actions out in the model: half from any step on, half from a few steps before a success.

    None when ``success_windows`` is 0 or nothing has a known outcome. ``fit`` counts the fits that came before.
    """
    table = store.episodes
    rng = np.random.Generator(np.random.Philox(key=[seed, fit], counter=[0, 0, 0, SUCCESS_STREAM]))
    drawn = np.isin(table.source, [name for name, weight in config.sources.items() if weight > 0])
    known = np.flatnonzero(drawn & (table.success != Success.UNKNOWN.value))
    won = np.flatnonzero(drawn & (table.success == Success.YES.value))
    if not config.success_windows or not len(known):
        return None
    ends = np.cumsum(table.length[known])
    places = []
    for i in range(config.success_windows):
        if i % 2 and len(won):
            episode = int(rng.choice(won))
            start = max(0, decided_at(store, episode) - int(rng.integers(1, config.success_horizon + 1)))
        else:
            at = int(rng.integers(ends[-1]))
            which = int(np.searchsorted(ends, at, side="right"))
            episode, start = int(known[which]), at - (int(ends[which - 1]) if which else 0)
        places.append((episode, start))
    return imagine_windows(
        pipeline, read_windows(store, places, context=config.context, horizon=config.success_horizon), seed=seed,
        inference_steps=config.inference_steps)


def recorded_pairs(store: ReplayStore, episode: int, steps: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Frames ``[n, 2, c, h, w]`` and proprio ``[n, 2, p]`` of ``steps`` and of those before them, words ``[n, l]``."""
    now = np.asarray(steps)
    rows = np.stack([np.maximum(now - 1, 0), now], axis=1)
    frames = {c: torch.from_numpy(store.column(episode, f"rgb_{c}")[rows].copy()) for c in store.spec.cameras}
    proprio = torch.from_numpy(store.column(episode, "proprio")[rows].copy())
    tokens = torch.tensor(tokenize(str(store.episodes.instruction[episode])))
    return stack_cameras(frames, store.spec.cameras), proprio, tokens.expand(len(now), -1)


def shift_frames(
    frames: UInt8[Tensor, "b n c h w"], most: int, generator: torch.Generator
) -> UInt8[Tensor, "b n c h w"]:
    """Move the pictures of each row together by up to ``most`` pixels each way, repeating the border.

    The few hundred successes of a store are learned by heart otherwise.
    """
    if not most:
        return frames
    size = frames.shape[-1]
    padded = F.pad(frames.flatten(1, 2).float(), (most,) * 4, mode="replicate").to(torch.uint8)
    places = torch.randint(0, 2 * most + 1, (len(frames), 2), generator=generator).tolist()
    moved = [padded[i, :, y : y + size, x : x + size] for i, (x, y) in enumerate(places)]
    return torch.stack(moved).unflatten(1, frames.shape[1:3])
