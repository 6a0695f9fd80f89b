"""What a device computes fast: bfloat16 where it has instructions for it, float32 elsewhere."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "bf16-mixed", "32-true")


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes ``bf16-mixed`` or ``32-true``; the others stay.

    PyTorch emulates bfloat16 on CPUs without it: a step of the 64-pixel model then takes 2.6 times as long as in
    float32 (docs/world-model.md).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities()
        native = any(can.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
    return "bf16-mixed" if native else "32-true"
