"""Knobs of the world model and of imagination."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from data.types import Source, UserError
from world_model.precision import PRECISIONS
from world_model.process import OBJECTIVES, Edm, Flow, Process

STARTS = ("uniform", "beginning", "near_success", "failure")
NETWORKS = ("unet", "transformer")


@dataclass(frozen=True, kw_only=True)
class WorldModelConfig:
    """The video model, the success model, and how both are fitted."""

    network: str = "unet"
    """``unet``: ``ActionUNet`` on pixels, for a CPU. ``transformer``: ``ActionTransformer`` on the latents of a KL
    autoencoder that the first fit trains, for GPUs."""
    chunk: int = 1
    """Frames per call; more than one needs the transformer."""
    layers: int = 12
    """Of the transformer, as the next two."""
    heads: int = 12
    head_dim: int = 64
    vae_widths: tuple[int, ...] = (64, 128, 256, 256)
    """Channels of the autoencoder's levels; each but the first halves the picture."""
    latent_channels: int = 4
    vae_steps: int = 2000
    """Gradient steps of the autoencoder, once in a learner's life."""
    vae_learning_rate: float = 1e-3
    teacher_steps: int = 8
    """Distilling: denoising steps of the teacher's samples."""
    context: int = 4
    """Past frames, actions and proprio that the model sees."""
    widths: tuple[int, ...] = (96, 128, 160)
    """Channels of the U-Net's levels; multiples of 8."""
    layers_per_block: int = 1
    pixel_unshuffle: int = 4
    objective: str = "edm"
    """``edm``: diffusion; ``flow``: rectified flow; ``regression``: the same network without noise, asked once."""
    inference_steps: int = 1
    sigma_data: float = 0.5
    sigma_max: float = 20.0
    """Noise that sampling starts from, in units of [-1, 1] pixels."""
    sigma_log_mean: float = -0.4
    sigma_log_std: float = 1.2
    start_share: float = 0.9
    """Share of training rows at ``sigma_max``, where one-step sampling lives; the rest is EDM's log-normal."""
    context_noise: float = 0.1
    """Largest noise level on context frames in training; each row draws its own, and the model is told."""
    offset_noise: float = 0.0
    """Deviation of noise that all pixels of a channel share, beside the usual one: moves the mean brightness too."""
    rollout_steps: int = 2
    """Some training rows follow a recording for so many steps over the model's own predictions; 0: none."""
    rollout_share: float = 0.25
    """Share of a batch's rows that do (``SelfRollout``)."""
    batch: int = 16
    learning_rate: float = 2e-3
    round_learning_rate: float = 5e-4
    """What the rate falls to by the end of the first fit, and stays at in later ones."""
    weight_decay: float = 0.01
    warmup: int = 50
    """Steps over which the learning rate rises from 0, once in a learner's life."""
    clip: float = 1.0
    """Largest gradient norm."""
    ema: float = 0.99
    """Decay of the averaged weights that predict, reached gradually; 0 uses the latest weights."""
    precision: str = "auto"
    """``bf16-mixed``, ``32-true``, or ``auto``: the first where the device has instructions for it."""
    compile: bool = False
    """Imagine with ``torch.compile``: faster, after a minute or two of compiling; needs a C++ compiler on a CPU."""
    sources: Mapping[str, float] = field(default_factory=lambda: {"sim": 1.0, "real": 1.0})
    """Weight of each source in a batch."""
    steps: int = 400
    """Gradient steps of the first fit."""
    round_steps: int = 100
    """Gradient steps of each later fit."""
    success_ratio: float = 1.0
    """Gradient steps of the success model per step of the video model."""
    success_windows: int = 192
    """Open-loop rollouts of recorded actions whose frames the success model also learns from; 0: recorded ones only."""
    success_horizon: int = 16
    """Steps of these."""
    success_batch: int = 32
    success_learning_rate: float = 1e-3
    success_round_learning_rate: float = 3e-4
    """What the rate falls to by the end of the first fit, and stays at in later ones."""
    success_weight_decay: float = 0.1
    success_shift: int = 4
    """Pixels by which its training frames are moved at random."""

    def __post_init__(self) -> None:
        _choice("network", self.network, NETWORKS)
        if self.chunk > 1 and self.network != "transformer":
            raise UserError(f"world_model.chunk={self.chunk} needs world_model.network=transformer")
        _choice("objective", self.objective, OBJECTIVES)
        _choice("precision", self.precision, PRECISIONS)
        for name in ("chunk", "layers", "heads", "head_dim", "latent_channels", "teacher_steps", "context",
                     "layers_per_block", "pixel_unshuffle", "inference_steps", "batch", "success_batch",
                     "success_horizon"):
            if getattr(self, name) < 1:
                raise UserError(f"world_model.{name}: expected at least 1, got {getattr(self, name)}")
        if self.context < 2:
            raise UserError(f"world_model.context: success is judged by two frames, so at least 2, got {self.context}")
        for name in ("warmup", "round_learning_rate", "success_round_learning_rate",
                     "steps", "round_steps", "success_ratio", "context_noise",
                     "offset_noise", "rollout_steps", "success_windows", "success_shift"):
            if getattr(self, name) < 0:
                raise UserError(f"world_model.{name}: expected at least 0, got {getattr(self, name)}")
        if not self.widths or any(width % 8 or width < 8 for width in self.widths):
            raise UserError(f"world_model.widths: expected multiples of 8, got {list(self.widths)}")
        for name in ("start_share", "rollout_share", "ema"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"world_model.{name}: expected a number in [0, 1], got {getattr(self, name)}")

    @property
    def imagined_steps(self) -> int:
        """``rollout_steps`` as whole calls."""
        return self.rollout_steps // self.chunk * self.chunk

    def process(self) -> Process:
        """The noise process of the objective; a regression uses EDM's scales at ``sigma_max`` and no noise."""
        if self.objective == "flow":
            return Flow(sigma_data=self.sigma_data)
        return Edm(sigma_data=self.sigma_data, sigma_max=self.sigma_max, log_mean=self.sigma_log_mean,
                   log_std=self.sigma_log_std)


@dataclass(frozen=True, kw_only=True)
class ImaginationConfig:
    """How a policy is let loose in the model."""

    horizon: int = 8
    """Control steps until truncation."""
    success_threshold: float = 0.5
    """Probability of success from which a frame counts. The probability is calibrated and the frame before a success
    looks much like it, so it seldom comes near 1."""
    success_frames: int = 2
    """Consecutive imagined frames that must count before the episode terminates."""
    starts: Mapping[str, float] = field(default_factory=lambda: {"uniform": 1.0})
    """Weight of each kind of branch point: ``uniform`` over recorded steps, ``beginning`` of an episode,
    ``near_success`` (at most ``horizon`` steps before one), ``failure`` (a step of a failed episode)."""
    max_uncertainty: float | None = None
    """An imagined episode is truncated once its uncertainty passes this; None: only after ``horizon`` steps."""
    max_ratio: float = 4.0
    """Imagination pauses while imagined successes are more than so many times the recorded ones, or fewer than that
    part of them, where both followed the same actions (``audit``)."""
    audit_every: int = 4
    """Training iterations from one audit to the next."""
    sources: tuple[str, ...] = ("sim", "real")
    """Where branch points come from. Never ``imagined``: errors would feed on themselves."""
    tasks: tuple[str, ...] | None = None
    """Branch from episodes of these tasks; None: of all."""
    newest: int | None = None
    """Branch from the newest so many episodes of each source; None: from all."""
    inference_steps: int = 1
    micro_batch: int = 16
    """Rows per forward pass, padded: what a row imagines then never depends on its neighbours."""

    def __post_init__(self) -> None:
        for name in ("horizon", "success_frames", "inference_steps", "micro_batch", "audit_every"):
            if getattr(self, name) < 1:
                raise UserError(f"imagination.{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.success_threshold < 1:
            raise UserError(f"imagination.success_threshold: expected a number in (0, 1), got {self.success_threshold}")
        if self.newest is not None and self.newest < 1:
            raise UserError(f"imagination.newest: expected at least 1 or null, got {self.newest}")
        if self.max_ratio <= 1:
            raise UserError(f"imagination.max_ratio: expected more than 1, got {self.max_ratio}")
        if self.max_uncertainty is not None and self.max_uncertainty <= 0:
            raise UserError(f"imagination.max_uncertainty: expected more than 0 or null, got {self.max_uncertainty}")
        unknown = sorted(set(self.starts) - set(STARTS))
        if unknown or min(self.starts.values(), default=0) < 0 or sum(self.starts.values()) <= 0:
            raise UserError(f"imagination.starts: expected weights of {', '.join(STARTS)}, got {dict(self.starts)}")
        allowed = (Source.SIM.value, Source.REAL.value)
        if not self.sources or any(source not in allowed for source in self.sources):
            raise UserError(f"imagination.sources: expected some of sim and real, got {list(self.sources)}")


def _choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"world_model.{name}: expected one of {', '.join(choices)}, got {value!r}")
