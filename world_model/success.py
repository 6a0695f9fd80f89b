"""The success model: one frame and the instruction in, the probability that the task is done out.

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


class SuccessModel(ModelMixin, ConfigMixin):  # type: ignore[misc] # diffusers' idiom
    """A small CNN (about 100 k parameters besides the words), modulated by the mean of the words' embeddings."""

    @register_to_config
    def __init__(
        self,
        *,
        cameras: int = 1,
        widths: Sequence[int] = (24, 48, 64, 64),
        word_width: int = 32,
        vocabulary: int = 2048,
    ) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, word_width, padding_idx=0)
        channels = [3 * cameras * 4, *widths]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(before, after, 3, stride=1 if i == 0 else 2, padding=1), nn.GroupNorm(8, after), nn.SiLU()
            )
            for i, (before, after) in enumerate(itertools.pairwise(channels))
        )
        self.modulate = nn.Linear(word_width, 2 * sum(widths))
        self.head = nn.Sequential(nn.Linear(widths[-1] * 17, 32), nn.SiLU(), nn.Linear(32, 1))
        self.register_buffer("prior", torch.tensor(0.5))

    def balanced_logit(self, frames: UInt8[Tensor, "b c h w"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, " b"]:
        """Log odds of success where half of all frames show it."""
        embedded = self.words(tokens)
        mean = embedded.sum(1) / (tokens > 0).sum(1, keepdim=True).clamp(min=1)
        modulation = self.modulate(mean)
        features = F.pixel_unshuffle(frames.float() / 127.5 - 1, 2).contiguous(memory_format=torch.channels_last)
        widths = list(self.config["widths"])
        for stage, scale_shift in zip(self.stages, modulation.split([2 * width for width in widths], 1), strict=True):
            scale, shift = scale_shift[:, :, None, None].chunk(2, dim=1)
            features = stage(features) * (1 + scale) + shift
        places = F.adaptive_avg_pool2d(features, 4).flatten(1)  # where things are matters
        strongest = F.adaptive_max_pool2d(features, 1).flatten(1)
        return self.head(torch.cat([places, strongest], 1)).squeeze(1).float()

    def forward(self, frames: UInt8[Tensor, "b c h w"], tokens: Int[Tensor, "b l"]) -> Float[Tensor, " b"]:
        """Probability that each frame shows the task done."""
        return torch.sigmoid(self.balanced_logit(frames, tokens) + torch.logit(self.prior, eps=1e-6))


def balanced_loss(logit: Float[Tensor, " b"], label: Bool[Tensor, " b"]) -> Float[Tensor, ""]:
    """Binary cross entropy in which both classes weigh the same, whatever their numbers in the batch."""
    target = label.to(logit.dtype)
    each = F.binary_cross_entropy_with_logits(logit, target, reduction="none")
    share = target.mean().clamp(1 / (2 * len(target)), 1 - 1 / (2 * len(target)))
    return (each * torch.where(label, 0.5 / share, 0.5 / (1 - share))).mean()
