"""A tiny vision-language-action policy with the face of a large one.

Image, instruction and proprio are encoded into one context; a chunk of ``k`` actions of ``a`` dimensions is then
decoded *in parallel*, one discrete token per action dimension, as OpenVLA-OFT does; a value head pools with attention
over the (detached) states of the action tokens, as AcceRL does. Axes: ``n`` observations, ``k`` actions in a chunk,
``a`` action dimensions, ``v`` bins of an action dimension, ``c`` channels.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int, UInt8
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.text import tokenize
from data.types import Action, Observation, Spec, Statistics, UserError


@dataclass(frozen=True, kw_only=True)
class TinyVLAConfig:
    """Size of the policy."""

    chunk: int
    """Actions per decision, ``k``."""
    bins: int
    """Discrete values of each action dimension, evenly spaced over [-1, 1]."""
    width: int
    """Size of a token's state."""
    layers: int
    """Transformer layers that decode the chunk."""
    channels: tuple[int, ...]
    """Channels of the strided convolutions, after the image was halved once; each halves it again."""
    vocabulary: int
    """Buckets that words are hashed into."""
    words: int
    """Longest instruction, in words."""

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built."""
        if self.bins < 2:
            raise UserError(f"policy.bins must be at least 2, got {self.bins}; try policy.bins=11")
        if self.chunk < 1:
            raise UserError(f"policy.chunk must be at least 1, got {self.chunk}; try policy.chunk=2")
        object.__setattr__(self, "channels", tuple(self.channels))  # YAML gives a list


class PolicyOutput(NamedTuple):
    """What one forward pass gives for ``n`` observations. A tuple, which Fabric and DDP know how to walk."""

    logits: Float[Tensor, "n k a v"]
    value: Float[Tensor, " n"]


class TokenPolicy(nn.Module, ABC):
    """A policy of action tokens: ``forward`` is what a learner differentiates, ``act`` drives an environment."""

    proprio_mean: Tensor
    proprio_std: Tensor
    bin_centres: Tensor
    spec: Spec
    statistics: Statistics
    chunk: int
    version: int

    @abstractmethod
    def forward(
        self,
        frames: Mapping[str, UInt8[Tensor, "n h w 3"]],
        proprio: Float[Tensor, "n p"],
        words: Int[Tensor, "n l"],
    ) -> PolicyOutput:
        """Logits of every action token of the chunk, and the value. Differentiable; the value does not reach back."""

    @abstractmethod
    def words(self, instruction: Sequence[str]) -> Int[Tensor, "n l"]:
        """What ``forward`` reads of each instruction."""

    @abstractmethod
    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """What reinforcement learning moves more slowly."""

    @abstractmethod
    def value_parameters(self) -> Iterable[nn.Parameter]:
        """What only the value depends on."""

    @abstractmethod
    def blocks(self) -> Iterable[nn.Module]:
        """Parts that hold most weights or activations, one after the other: what is sharded, or computed twice."""

    def act(self, observation: Observation, seeds: Sequence[int] | None) -> Action:
        """Choose a chunk per row; row ``i`` draws its Gumbel noise from ``seeds[i]`` alone, ``None`` takes the mode."""
        device = self.bin_centres.device
        with torch.inference_mode():
            output = self(
                {camera: torch.from_numpy(frames).to(device) for camera, frames in observation.frames.items()},
                torch.from_numpy(observation.proprio).to(device),
                self.words(observation.instruction))
            log_probs = output.logits.float().log_softmax(dim=-1)
            scores = log_probs
            if seeds is not None:
                scores = log_probs + torch.from_numpy(_gumbel(seeds, log_probs.shape[1:])).to(device)
            token = scores.argmax(dim=-1)
            log_prob = log_probs.gather(-1, token[..., None])[..., 0]
            action = self.bin_centres[token]
        return Action(token=token.cpu().numpy().astype(np.int16), action=action.cpu().numpy(),
                      log_prob=log_prob.cpu().numpy(), value=output.value.float().cpu().numpy())

    def _register(self, bins: int) -> None:
        self.register_buffer("proprio_mean", torch.from_numpy(self.statistics.proprio_mean.copy()))
        self.register_buffer("proprio_std", torch.from_numpy(self.statistics.proprio_std.copy()))
        self.register_buffer("bin_centres", torch.linspace(-1, 1, bins))


class TinyVLA(TokenPolicy):
    """The policy of the demo."""

    def __init__(self, config: TinyVLAConfig, *, spec: Spec, statistics: Statistics, seed: int) -> None:
        """Build with weights drawn from ``seed`` alone."""
        super().__init__()
        if spec.image_size % 2:
            raise UserError(f"the tiny VLA reads images of an even size, got {spec.image_size} px")
        self.config, self.spec, self.statistics = config, spec, statistics
        self.chunk = config.chunk
        self.version = 0
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build()

    def _build(self) -> None:
        config, width = self.config, self.config.width
        layers: list[nn.Module] = []
        size, previous = self.spec.image_size // 2, 12
        for channels in config.channels:
            layers += [nn.Conv2d(previous, channels, 3, stride=2, padding=1), nn.ReLU()]
            size, previous = (size + 1) // 2, channels
        self.image_encoder = nn.Sequential(*layers)
        self.image_encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        features = size * size * previous * len(self.spec.cameras)
        self.image_projection = nn.Sequential(nn.Linear(features, width), nn.LayerNorm(width))
        self.word_embedding = nn.Embedding(config.vocabulary, width, padding_idx=0)
        self.instruction_encoder = nn.Linear(width, width)
        self.proprio_encoder = nn.Sequential(
            nn.Linear(self.spec.proprio_dim, width), nn.ReLU(), nn.Linear(width, width))
        self.fusion = nn.Sequential(nn.Linear(3 * width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        self.action_query = nn.Parameter(torch.randn(config.chunk * self.spec.action_dim, width) * 0.5)
        self.action_decoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, nhead=4, dim_feedforward=2 * width, dropout=0.0, batch_first=True,
                                       norm_first=True),
            num_layers=config.layers, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.action_head = nn.Linear(width, config.bins)
        nn.init.normal_(self.action_head.weight, std=0.01)
        self.value_query = nn.Parameter(torch.zeros(width))
        self.value_head = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))
        self._register(config.bins)

    def forward(
        self,
        frames: Mapping[str, UInt8[Tensor, "n h w 3"]],
        proprio: Float[Tensor, "n p"],
        words: Int[Tensor, "n l"],
    ) -> PolicyOutput:
        """Logits of every action token of the chunk, and the value. Differentiable; the value does not reach back."""
        context = self._encode(frames, proprio, words)
        tokens = self.action_query + context[:, None]
        states = self.action_decoder(tokens)
        logits = rearrange(self.action_head(states), "n (k a) v -> n k a v", k=self.chunk)
        return PolicyOutput(logits=logits, value=self._value(states.detach(), context.detach()))

    def discretise(self, action: Float[Tensor, "*n a"]) -> Int[Tensor, "*n a"]:
        """Token whose bin centre is nearest to a normalised action."""
        return ((action.clamp(-1, 1) + 1) / 2 * (self.config.bins - 1)).round().long()

    def words(self, instruction: Sequence[str]) -> Int[Tensor, "n l"]:
        """Hashed words of each instruction."""
        ids = [tokenize(text, length=self.config.words, vocabulary=self.config.vocabulary) for text in instruction]
        return torch.tensor(ids, device=self.bin_centres.device)

    def encoder_parameters(self) -> Iterable[nn.Parameter]:
        """The image encoder, which reinforcement learning moves more slowly."""
        return self.image_encoder.parameters()

    def value_parameters(self) -> Iterable[nn.Parameter]:
        """What only the value depends on."""
        return [self.value_query, *self.value_head.parameters()]

    def blocks(self) -> Iterable[nn.Module]:
        """The image encoder, and each layer of the decoder."""
        return [self.image_encoder, *self.action_decoder.layers]

    def save(self, folder: Path) -> None:
        """Write ``policy.json`` and ``policy.safetensors``: all that is needed to act, no code, no pickle."""
        folder.mkdir(parents=True, exist_ok=True)
        weights = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(weights, folder / "policy.safetensors")
        description = {"kind": "tiny_vla", "config": asdict(self.config), "spec": self.spec.to_dict(),
                       "statistics": self.statistics.to_dict(), "version": self.version}
        (folder / "policy.json").write_text(json.dumps(description, indent=2))

    @staticmethod
    def load(folder: Path) -> TinyVLA:
        """Read what ``save`` wrote.

        Raises:
            UserError: nothing there, or not a policy of this project.
        """
        description_file = folder / "policy.json"
        if not description_file.is_file():
            raise UserError(f"no policy in {folder}: expected policy.json and policy.safetensors; "
                            "give a folder that `train` or `pretrain` wrote, e.g. runs/<run>/policy")
        try:
            description = json.loads(description_file.read_text())
            policy = TinyVLA(TinyVLAConfig(**description["config"]), spec=Spec.from_dict(description["spec"]),
                             statistics=Statistics.from_dict(description["statistics"]), seed=0)
            policy.load_state_dict(load_file(folder / "policy.safetensors"))
        except (ValueError, KeyError, TypeError, RuntimeError, OSError, SafetensorError) as error:
            raise UserError(f"{folder} holds no readable policy ({error}); save it again with `train` or `pretrain`"
                            ) from error
        policy.version = description["version"]
        return policy

    def _encode(self, frames: Mapping[str, Tensor], proprio: Tensor, words: Tensor) -> Float[Tensor, "n c"]:
        dtype = self.action_query.dtype
        images = torch.stack([frames[camera] for camera in self.spec.cameras], dim=1)
        # The first, largest maps cost the most: 2 x 2 pixels become 12 channels, while they are still bytes.
        blocks = rearrange(images, "n camera (h i) (w j) c -> (n camera) h w (i j c)", i=2, j=2)
        maps = self.image_encoder((blocks.to(dtype) / 127.5 - 1).permute(0, 3, 1, 2))
        image = self.image_projection(rearrange(maps, "(n camera) c h w -> n (camera c h w)", n=len(images)))
        count = (words > 0).sum(dim=1, keepdim=True).clamp(min=1)
        instruction = self.instruction_encoder(self.word_embedding(words).sum(dim=1) / count.sqrt())
        state = self.proprio_encoder((proprio.to(dtype) - self.proprio_mean) / self.proprio_std)
        return self.fusion(torch.cat([image, instruction, state], dim=1))

    def _value(self, states: Float[Tensor, "n l c"], context: Float[Tensor, "n c"]) -> Float[Tensor, " n"]:
        attention = (states @ self.value_query / self.config.width**0.5).softmax(dim=1)
        pooled = (attention[..., None] * states).sum(dim=1)
        return self.value_head(torch.cat([pooled, context], dim=1))[:, 0]


def _gumbel(seeds: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Standard Gumbel noise, each row from its own seed."""
    rows = [np.random.Generator(np.random.Philox(key=seed)).gumbel(size=tuple(shape)) for seed in seeds]
    return np.stack(rows).astype(np.float32)


def check_compatible(policy: TinyVLA, *, spec: Spec, statistics: Statistics, what: str) -> None:
    """Refuse to let a policy act on, or learn from, data that is scaled or shaped otherwise.

    Raises:
        UserError: another camera, image size, dimension, control rate or normalisation than the policy's.
    """
    for name, expected in policy.spec.to_dict().items():
        came = spec.to_dict()[name]
        if came != expected:
            raise UserError(f"policy expects {name} {expected}, {what} has {came}; "
                            f"use the {what} that the policy was trained with, or pretrain a policy for this one")
    policy.statistics.check_same(statistics, mine="the policy", theirs=what)
