"""What a worker costs, measured on the toy simulator."""

import json
import sys
from functools import partial
from pathlib import Path

import pytest

from data.types import UserError
from sim.remote.client import RemoteEnv
from wm_rl.commands.benchmark_simulators import benchmark_simulators


def test_both_rates_are_measured(tmp_path):
    ball = partial(RemoteEnv, name="ball", python=Path(sys.executable), factory="tests.sim.ball:make",
                   configs=[{"rows": 2}])
    assert benchmark_simulators(folder=str(tmp_path), simulators={"ball": ball}, rounds=2, steps=5) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert (row["rows"], row["pixels"], row["cameras"]) == (2, 16, 2)
    assert 0 < row["through"] < row["alone"]
    assert row["share_min"] <= row["share"] <= row["share_max"]
    with pytest.raises(UserError, match="steps from 1 to 11"):
        benchmark_simulators(folder=str(tmp_path), simulators={"ball": ball}, rounds=2, steps=12)
