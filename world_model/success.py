"""The success model: the two newest frames, proprio and the instruction in, the probability that the task is done out.

It is trained on frames half of which show success, so that it learns the rare class; ``prior``, the share of such
frames among all, then shifts the logit back (King and Zeng 2001, prior correction), which keeps it calibrated.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

CHANGE = 4.0
"""Stretches changes between neighbouring frames to the size of the frames."""


class SuccessModel(ModelMixin, ConfigMixin):  # type: ignore[misc] # diffusers' idiom
    """A small CNN (about 170 k parameters besides the words), modulated by the mean of the words' embeddings.

    One frame seldom tells a drawer that is closed from one that is closing; its change and the hand's place do.
    """

    @register_to_config
    def __init__(
        self,
        *,
        cameras: int = 1,
        proprio_dim: int = 4,
        proprio_mean: Sequence[float] = (0.0, 0.0, 0.0, 0.0),
        proprio_std: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
        widths: Sequence[int] = (24, 48, 64, 64),
        word_width: int = 32,
        vocabulary: int = 2048,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, word_width, padding_idx=0)
        channels = [2 * 3 * cameras * 4, *widths]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=1 if i == 0 else 2, padding=1), nn.GroupNorm(8, after), nn.SiLU()
            )
            for i, (before, after) in enumerate(itertools.pairwise(channels))
        )
        self.modulate = nn.Linear(word_width, 2 * sum(widths))
        facts = widths[-1] * 17 + 2 * proprio_dim + word_width
        self.head = nn.Sequential(nn.Linear(facts, 64), nn.SiLU(), nn.Linear(64, 1))
        self.register_buffer("prior", torch.tensor(0.5))
        self.register_buffer("shift", torch.tensor(list(proprio_mean), dtype=torch.float32))
        std = torch.tensor(list(proprio_std), dtype=torch.float32)
        self.register_buffer("scale", torch.where(std > 1e-6, std, torch.ones_like(std)))

    def balanced_logit(
        self, frames: UInt8[Tensor, "b 2 c h w"], proprio: Float[Tensor, "b 2 p"], tokens: Int[Tensor, "b l"]
    ) -> Float[Tensor, " b"]:
        """Log odds of success in the newest of two consecutive frames, where half of all frames show it."""
        embedded = self.words(tokens)
        mean = embedded.sum(1) / (tokens > 0).sum(1, keepdim=True).clamp(min=1)
        modulation = self.modulate(mean)
        before, now = (frames.float() / 127.5 - 1).unbind(1)
        features = F.pixel_unshuffle(torch.cat([now, CHANGE * (now - before)], 1), 2)
        features = features.contiguous(memory_format=torch.channels_last)
        widths = list(self.config["widths"])
        for stage, scale_shift in zip(self.stages, modulation.split([2 * width for width in widths], 1), strict=True):
            scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
            features = stage(features) * (1 + scale) + shift
        places = F.adaptive_avg_pool2d(features, 4).flatten(1)  # where things are matters
        strongest = F.adaptive_max_pool2d(features, 1).flatten(1)
        standard = ((proprio - self.shift) / self.scale).clamp(-10, 10)
        moved = CHANGE * (standard[:, 1] - standard[:, 0])
        return self.head(torch.cat([places, strongest, standard[:, 1], moved, mean], 1)).squeeze(1).float()

    def forward(
        self, frames: UInt8[Tensor, "b 2 c h w"], proprio: Float[Tensor, "b 2 p"], tokens: Int[Tensor, "b l"]
    ) -> Float[Tensor, " b"]:
        """Probability that the newest frame shows the task done."""
        return torch.sigmoid(self.balanced_logit(frames, proprio, tokens) + torch.logit(self.prior, eps=1e-6))


def balanced_loss(logit: Float[Tensor, " b"], label: Bool[Tensor, " b"]) -> Float[Tensor, ""]:
    """Binary cross entropy in which both classes weigh the same, whatever their numbers in the batch."""
    target = label.to(logit.dtype)
    each = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
    share = target.mean().clamp(1 / (2 * len(target)), 1 - 1 / (2 * len(target)))
    return (each * torch.where(label, 0.5 / share, 0.5 / (1 - share))).mean()
