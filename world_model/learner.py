"""The world model as a training loop holds it: fit, imagine, evaluate, save and resume."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import difflib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from data.store import ReplayStore
from data.types import Spec, Statistics, UserError
from world_model.audit import audit
from world_model.codec import Latents
from world_model.config import ImaginationConfig, WorldModelConfig
from world_model.evaluation import evaluate_imagined_success, evaluate_success, evaluate_video
from world_model.imagination import ImaginationEnv
from world_model.networks import check_size, new_autoencoder, new_video_model
from world_model.pipeline import WorldModelPipeline
from world_model.precision import resolve_precision
from world_model.quiet import quiet
from world_model.rollout import open_loop, read_context
from world_model.success import SuccessModel
from world_model.success_training import SuccessModule, SuccessSampler, imagine_recorded
from world_model.training import AutoencoderModule, Sampler, StoreDataModule, VideoModule, VideoSampler, fit

Log = Callable[[int, Mapping[str, float]], None]

DIVERGED = 1.5
"""A later fit whose training error exceeds this times the best so far has diverged: it is undone."""


class WorldModelLearner:
    """Video model, success model, their optimisers and counters."""

    def __init__(
        self,
        config: WorldModelConfig,
        *,
        spec: Spec,
        statistics: Statistics,
        seed: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Draw the initial weights from ``seed``. Raises ``UserError`` when frames do not fit the network."""
        check_size(config, spec.image_size)
        self.config, self.spec, self.statistics, self.seed = config, spec, statistics, seed
        self.device = torch.device(device)
        self.precision = resolve_precision(config.precision, self.device)
        self.version = 0
        """Number of fits."""
        self._best_error = float("inf")
        self._cached: WorldModelPipeline | None = None
        with torch.random.fork_rng(devices=[]), quiet():
            torch.manual_seed(seed)
            self._vae = new_autoencoder(config, spec) if config.network == "transformer" else None
            self._autoencoder = AutoencoderModule(config, self._vae, seed) if self._vae is not None else None
            self._video = VideoModule(config, new_video_model(config, spec, statistics), seed, vae=self._vae)
            self._success = SuccessModule(config, SuccessModel(
                cameras=len(spec.cameras), proprio_dim=spec.proprio_dim, proprio_mean=statistics.proprio_mean.tolist(),
                proprio_std=statistics.proprio_std.tolist()), seed)

    def fit(self, store: ReplayStore, steps: int, *, log: Log | None = None) -> dict[str, float]:
        """Train the video model for ``steps`` and the success model for ``success_ratio`` times as many.

        Continues from this learner's own optimisers and counters. ``log(step, metrics)`` is called after every step.
        Returns the means of the metrics over the last quarter of the steps, and how many were made of each kind. The
        success model is left alone while the store has no frame that shows success, or none that does not. A later
        fit that diverged (``DIVERGED``) is undone, all but its ``version``, and says ``world_model/undone`` 1.

        Raises:
            UserError: when a source with a weight has no episodes, or the store has other cameras or dimensions.

        """
        history, before = _History(log), self.state_dict()
        self.fit_video(store, steps, history=history)
        self.fit_success(store, round(steps * self.config.success_ratio), history=history)
        self.version += 1
        metrics = history.means()
        error = metrics.get("world_model/rmse", self._best_error)
        undone = not error <= DIVERGED * self._best_error  # a NaN as well
        if undone:
            self.load_state_dict(before | {"version": self.version})
        self._best_error = min(self._best_error, error)
        return {
            **metrics,
            "world_model/undone": float(undone),
            "world_model/steps": float(self._video.steps),
            "world_model/success_steps": float(self._success.steps),
            "world_model/version": float(self.version),
        }

    def check_fits(self, store: ReplayStore) -> None:
        """Raise ``UserError`` when the store has other cameras, dimensions or statistics than the model's."""
        if store.spec.to_dict() != self.spec.to_dict():
            raise UserError(f"the world model was made for {self.spec}, the replay store {store.path} has {store.spec}")
        self.statistics.check_same(store.statistics, mine="the world model", theirs=f"the replay store {store.path}")

    def fit_video(self, store: ReplayStore, steps: int, *, history: History | None = None) -> None:
        """Train the video model (and before its first step the autoencoder); cut in two, it ends where one fit would.

        Raises ``UserError`` as ``fit`` does.
        """
        self.check_fits(store)
        video, history = VideoSampler(store, self.config, self.seed), history or _History(None)
        self._cached = None
        self._fit_autoencoder(video, history)
        self._run(self._video, video, steps, self.config.batch, history)

    def fit_success(self, store: ReplayStore, steps: int, *, history: History | None = None) -> None:
        """Train the success model on recorded frames and on what the video model, as it is now, makes of them."""
        self.check_fits(store)
        if steps < 1:
            return
        config = self.config
        imagined = imagine_recorded(store, self.pipeline(), config, seed=self.seed, fit=self.version)
        success = SuccessSampler(store, sources=config.sources, seed=self.seed, imagined=imagined)
        if success.usable:
            self._success.model.prior.fill_(success.prior)
            self._run(self._success, success, steps, config.success_batch, history or _History(None))

    @property
    def video_steps(self) -> int:
        """Gradient steps that the video model has taken."""
        return self._video.steps

    def distil(
        self, teacher: WorldModelLearner, store: ReplayStore, steps: int, *, log: Log | None = None
    ) -> dict[str, float]:
        """Begin at ``teacher``'s weights and learn to answer in one step what it answers in ``teacher_steps``.

        From the same noise, on the same contexts (the deterministic sampler's end point as target, after Luhman and
        Luhman 2021, arXiv 2101.02388). The success model is taken over as it is. Raises ``UserError`` for a teacher of
        another shape, or without a noise process.
        """
        if teacher.config.objective == "regression":
            raise UserError("a regression answers in one step already; distil a model of objective edm or flow")
        teacher.check_fits(store)
        state = teacher.state_dict()
        kept = ("video", "average", "success", "vae", "vae_scale", "vae_steps")
        self.load_state_dict(self.state_dict() | {name: state[name] for name in kept if name in state})
        self._video.teacher = teacher.pipeline()
        history = _History(log)
        try:
            self._run(self._video, VideoSampler(store, self.config, self.seed), steps, self.config.batch, history)
        finally:
            self._video.teacher = None
        self._cached = None
        self.version += 1
        return history.means()

    def _fit_autoencoder(self, video: VideoSampler, history: History) -> None:
        """Once in a learner's life: latents that moved would make all that was learned of them wrong."""
        module, vae = self._autoencoder, self._vae
        if module is None or vae is None or module.steps:
            return
        vae.requires_grad_(True)
        self._run(module, video, self.config.vae_steps, self.config.batch, history)
        vae.requires_grad_(False)
        vae.register_to_config(scaling_factor=1.0)
        latents = Latents(vae).encode(video.sample(0, self.config.batch)["frames"].to(vae.device))
        vae.register_to_config(scaling_factor=1 / latents.std().item())

    def state_dict(self) -> dict[str, Any]:
        """Weights, averaged weights, optimisers and counters: tensors and plain values only, copied to the CPU."""
        state = {
            "version": self.version,
            "seed": self.seed,
            "statistics": self.statistics.to_dict(),
            "steps": self._video.steps,
            "success_steps": self._success.steps,
            "best_error": self._best_error,
            "video": self._video.denoiser.state_dict(),
            "average": self._video.average.state_dict(),
            "success": self._success.model.state_dict(),
            "rollout": self._video.rollout.state_dict(),
            "video_optimizer": self._video.optimizer.state_dict(),
            "success_optimizer": self._success.optimizer.state_dict(),
        }
        if self._vae is not None and self._autoencoder is not None:
            state |= {"vae": self._vae.state_dict(), "vae_steps": self._autoencoder.steps,
                      "vae_scale": self._vae.config["scaling_factor"]}
        return _to_cpu(state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the writer of ``state`` stood. Raises ``UserError`` for another architecture or statistics."""
        if "statistics" in state:  # checkpoints of before have none
            Statistics.from_dict(state["statistics"]).check_same(
                self.statistics, mine="the checkpoint's world model", theirs="the replay store")
        try:
            self._video.denoiser.load_state_dict(state["video"])
            self._video.average.load_state_dict(state["average"])
            self._success.model.load_state_dict(state["success"])
            if self._vae is not None and self._autoencoder is not None and "vae" in state:
                self._vae.load_state_dict(state["vae"])
                self._vae.register_to_config(scaling_factor=state.get("vae_scale", 1.0))
                self._autoencoder.steps = state.get("vae_steps", self._autoencoder.steps)
        except RuntimeError as error:
            raise UserError(
                "the checkpoint's world model has other shapes than world_model.* and the store ask for; "
                "use the configuration and the store that it was trained with"
            ) from error
        self._video.rollout.load_state_dict(state["rollout"])
        self._video.optimizer.load_state_dict(copy.deepcopy(state["video_optimizer"]))
        self._success.optimizer.load_state_dict(copy.deepcopy(state["success_optimizer"]))
        self._video.steps, self._success.steps = state["steps"], state["success_steps"]
        self.version, self.seed, self._best_error = state["version"], state["seed"], state["best_error"]
        self._video.seed = self._success.seed = self.seed
        self._cached = None

    def save_pretrained(self, folder: str | Path) -> None:
        """Write what predicts (averaged weights) as diffusers folders ``video/`` and ``success/``, and a JSON."""
        folder = Path(folder)
        with quiet():
            pipeline = self._new_pipeline(torch.float32)
            pipeline.save_pretrained(folder / "video")
            self._success.model.save_pretrained(folder / "success")
        facts = {
            "version": self.version,
            "seed": self.seed,
            "config": dataclasses.asdict(self.config),
            "spec": self.spec.to_dict(),
            "statistics": self.statistics.to_dict(),
        }
        (folder / "world_model.json").write_text(json.dumps(facts, indent=1))

    @staticmethod
    def from_pretrained(
        folder: str | Path, *, device: torch.device | str = "cpu", changes: Mapping[str, Any] | None = None
    ) -> WorldModelLearner:
        """Load what ``save_pretrained`` wrote, with fresh optimisers.

        ``changes`` replaces values of its configuration that do not change its shape; with ``steps`` 0 fits go on at
        the rates of later ones. Raises ``UserError`` when there is nothing, or no such value.
        """
        folder, changes = Path(folder), changes or {}
        known = [field.name for field in dataclasses.fields(WorldModelConfig)]
        for name in changes:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1, cutoff=0)[0]
                raise UserError(f"a world model's configuration has no {name!r}; did you mean {close}?")
        try:
            facts = json.loads((folder / "world_model.json").read_text())
        except (OSError, ValueError):
            raise UserError(f"no world model at {folder}: expected a folder with world_model.json") from None
        values = facts["config"]
        widths = {name: tuple(values[name]) for name in ("widths", "vae_widths")}
        config = WorldModelConfig(**{**values, **widths, **changes})
        spec, statistics = Spec.from_dict(facts["spec"]), Statistics.from_dict(facts["statistics"])
        learner = WorldModelLearner(config, spec=spec, statistics=statistics, seed=facts["seed"], device=device)
        with quiet():
            pipeline = WorldModelPipeline.from_pretrained(folder / "video")
            success = SuccessModel.from_pretrained(folder / "success")
        learner._video.denoiser.load_state_dict(pipeline.denoiser.state_dict())
        learner._video.average.load_state_dict(pipeline.denoiser.state_dict())
        if learner._vae is not None and learner._autoencoder is not None and pipeline.vae is not None:
            learner._vae.load_state_dict(pipeline.vae.state_dict())
            learner._vae.register_to_config(scaling_factor=pipeline.vae.config["scaling_factor"])
            learner._vae.requires_grad_(False)
            learner._autoencoder.steps = config.vae_steps
        learner._success.model.load_state_dict(success.state_dict())
        learner.version = facts["version"]
        return learner

    def pipeline(self) -> WorldModelPipeline:
        """Give the model that predicts, in ``precision``: a copy that later fits leave alone."""
        if self._cached is None:
            with quiet():
                self._cached = self._new_pipeline(torch.bfloat16 if self.precision == "bf16-mixed" else torch.float32)
            if self.config.compile:
                self._cached.denoiser.compile_forward()
        return self._cached

    def success_model(self) -> SuccessModel:
        """Copy the success model to this learner's device."""
        with quiet():
            model = copy.deepcopy(self._success.model).eval().requires_grad_(False)
            return model.to(self.device, memory_format=torch.channels_last)

    def imagination(self, store: ReplayStore, config: ImaginationConfig, *, num_envs: int) -> ImaginationEnv:
        """Environments in this model as it is now, branching from what ``store`` shows now."""
        self.check_fits(store)
        return ImaginationEnv(
            store,
            self.pipeline(),
            self.success_model(),
            config,
            num_envs=num_envs,
            version=self.version,
        )

    def audit(self, store: ReplayStore, config: ImaginationConfig, *, episodes: Sequence[int]) -> dict[str, float]:
        """Hold imagination against recorded ``episodes``: see ``audit``."""
        self.check_fits(store)
        return audit(store, self.pipeline(), self.success_model(), episodes=episodes, horizon=config.horizon,
                     threshold=config.success_threshold, success_frames=config.success_frames, seed=self.seed,
                     inference_steps=config.inference_steps)

    def film_strip(
        self, store: ReplayStore, episode_index: int, start: int, steps: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Record and imagination side by side: ``uint8 [t, h, w, 3]`` each of the first camera, from the same frame on.

        Open loop with the recorded actions; ``t`` is ``steps`` + 1, fewer where the episode ends earlier.
        """
        self.check_fits(store)
        camera = self.spec.cameras[0]
        steps = min(steps, int(store.episodes.length[episode_index]) - start)
        if start < 0 or steps < 1:
            raise UserError(f"episode {episode_index} has no step after {start}; choose an earlier start")
        real = store.column(episode_index, f"rgb_{camera}")[start : start + steps + 1].copy()
        actions = torch.from_numpy(store.column(episode_index, "action")[start : start + steps].copy())
        imagined = open_loop(
            self.pipeline(),
            [read_context(store, episode_index, start, self.config.context)],
            actions[None],
            [str(store.episodes.instruction[episode_index])],
            generator=torch.Generator().manual_seed(self.seed),
            inference_steps=self.config.inference_steps,
        )
        frames = imagined.frames[0, :, :3].movedim(1, -1).numpy()
        return real, np.concatenate([real[:1], frames])

    def evaluate(
        self, store: ReplayStore, *, imagination: ImaginationConfig, episodes: Sequence[int], starts: int = 64,
        seed: int = 0,
    ) -> dict[str, float]:
        """Quality on episodes that were not fitted on, success claimed as ``imagination`` claims it: ``evaluation``."""
        self.check_fits(store)
        shared: dict[str, Any] = {"episodes": episodes, "seed": seed, "context": self.config.context,
                  "inference_steps": self.config.inference_steps}
        with quiet():
            pipeline, success = self.pipeline(), self.success_model()
            return {
                **evaluate_video(store, pipeline, starts=starts, **shared),
                **evaluate_success(store, success, episodes=episodes, device=self.device),
                **evaluate_imagined_success(
                    store, pipeline, success, windows=starts, horizon=self.config.success_horizon,
                    threshold=imagination.success_threshold, success_frames=imagination.success_frames, **shared),
            }

    def _run(
        self,
        module: VideoModule | SuccessModule | AutoencoderModule,
        sampler: Sampler,
        steps: int,
        batch: int,
        history: History,
    ) -> None:
        if steps < 1:
            return
        history.begin(steps)
        module.log_to = history
        data = StoreDataModule(sampler, first=module.steps, steps=steps, batch=batch)
        try:
            with quiet(), _interruptible():
                fit(module, data, precision=self.precision, device=self.device)
        finally:
            module.log_to = None

    def _new_pipeline(self, dtype: torch.dtype) -> WorldModelPipeline:
        config = self.config
        source = self._video.average if config.ema > 0 else self._video.denoiser
        denoiser = copy.deepcopy(source).cast(dtype)
        denoiser.eval().requires_grad_(False)
        nn.Module.to(denoiser, self.device)  # diffusers' own ``to`` warns about mixed precision
        if config.network == "unet":
            denoiser.to(memory_format=torch.channels_last)  # type: ignore[call-arg] # diffusers wraps ``to``
        vae = copy.deepcopy(self._vae)
        if vae is not None:
            vae.eval().requires_grad_(False)
            nn.Module.to(vae, self.device, dtype)
        return WorldModelPipeline(denoiser=denoiser, scheduler=config.process().scheduler(), vae=vae,
                                  objective=config.objective, offset_noise=config.offset_noise)


class History(Protocol):
    """Hears of a fit's steps."""

    def begin(self, steps: int) -> None:
        """A fit of so many steps follows."""
        ...

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step was taken."""
        ...


class _History:
    """Forwards metrics and keeps the last quarter of each kind of fit."""

    def __init__(self, log: Log | None) -> None:
        self._log, self._steps, self._seen = log, 0, 0
        self._rows: list[Mapping[str, float]] = []

    def begin(self, steps: int) -> None:
        self._steps, self._seen = steps, 0

    def __call__(self, step: int, metrics: Mapping[str, float]) -> None:
        self._seen += 1
        if self._seen > self._steps * 3 // 4:
            self._rows.append(metrics)
        if self._log is not None:
            self._log(step, metrics)

    def means(self) -> dict[str, float]:
        names = sorted({name for row in self._rows for name in row})
        return {name: float(np.mean([row[name] for row in self._rows if name in row])) for name in names}


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C reaches the caller: Lightning would swallow it, ignore the next one, and exit."""
    main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGINT) if main else None
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
    finally:
        if main:
            signal.signal(signal.SIGINT, handler)


def _to_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _to_cpu(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_to_cpu(item) for item in value]
    return value
