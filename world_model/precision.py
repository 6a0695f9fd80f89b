"""What a device computes fast: bfloat16 where it is faster at it, float32 elsewhere."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "bf16-mixed", "32-true")


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes ``bf16-mixed`` or ``32-true``; the others stay.

    Of x86 only AMX is faster at it than at float32: AVX512's own instructions are slower, and where there are none at
    all PyTorch emulates it (docs/world-model.md).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities()
        native = any(can.get(name, False) for name in ("amx_bf16", "bf16"))
    return "bf16-mixed" if native else "32-true"
