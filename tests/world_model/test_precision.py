import pytest
import torch

from data.types import UserError
from world_model.config import WorldModelConfig
from world_model.precision import resolve_precision


@pytest.mark.parametrize(("can", "expected"), [
    ({"amx_bf16": True}, "bf16-mixed"),
    ({"avx512_bf16": True}, "32-true"),
    ({"avx512_bf16": True, "cpu_name": "Intel(R) Xeon(R)"}, "32-true"),
    ({"avx512_bf16": True, "cpu_name": "AMD EPYC"}, "bf16-mixed"),
    ({"avx512_bf16": False, "cpu_name": "AMD EPYC"}, "32-true"),
    ({"architecture": "arm64", "bf16": True}, "bf16-mixed"),
    ({"avx512_f": True, "amx_bf16": False, "avx512_bf16": False}, "32-true"),
    ({}, "32-true"),
])
def test_auto_takes_bfloat16_only_where_the_cpu_is_faster_at_it(can, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: can)
    assert resolve_precision("auto", torch.device("cpu")) == expected


def test_a_named_precision_stays():
    assert resolve_precision("bf16-mixed", torch.device("cpu")) == "bf16-mixed"
    assert resolve_precision("32-true", torch.device("cpu")) == "32-true"


def test_an_unknown_precision_is_refused():
    with pytest.raises(UserError, match="expected one of auto, bf16-mixed, 32-true, got '16'"):
        WorldModelConfig(precision="16")
