"""What a device computes fast: bfloat16 where it is faster at it, float32 elsewhere."""

from __future__ import annotations

import torch

PRECISIONS = ("auto", "bf16-mixed", "32-true")


def resolve_precision(precision: str, device: torch.device) -> str:
    """``auto`` becomes ``bf16-mixed`` or ``32-true``; the others stay.

    Of Intel's instructions only AMX's are faster at it than at float32, AVX512's are slower; AMD's AVX512 (Zen 4 and
    later) is faster. Where there are none at all PyTorch emulates it (docs/world-model.md).
    """
    if precision != "auto":
        return precision
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        can = torch.cpu.get_capabilities()
        amd = can.get("avx512_bf16", False) and str(can.get("cpu_name", "")).startswith("AMD")
        native = amd or any(can.get(name, False) for name in ("amx_bf16", "bf16"))
    return "bf16-mixed" if native else "32-true"
