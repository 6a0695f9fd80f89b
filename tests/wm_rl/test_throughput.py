import json
from functools import partial

import pytest

from data.types import UserError
from tests.wm_rl.cluster import toy
from wm_rl.commands.benchmark_throughput import _cells, _compare, benchmark_throughput
from wm_rl.throughput import Arm, Measurement, _figures, measure, prepare


def row(at, *, steps=100.0, update_s=0.0, utilisation=0.0, ticks=0, busy=0):
    return {"at": at, "control_steps": steps, "update_s": update_s, "trainer_utilisation": utilisation,
            "ticks": ticks, "busy": busy, "lag": at}


def test_rates_are_of_the_time_after_the_first_row():
    rows = [row(10.0, steps=1e9, update_s=7.0, ticks=1000, busy=900), row(14.0, update_s=9.0, utilisation=0.25),
            row(20.0, steps=300.0, update_s=12.0, utilisation=0.75, ticks=3000, busy=1900)]
    local, spread = _figures(rows, 10, asynchronous=False), _figures(rows, 10, asynchronous=True)
    for figures in (local, spread):
        assert figures["seconds"] == 10
        assert figures["iterations"] == 2
        assert figures["updates_per_s"] == 2
        assert figures["control_steps_per_s"] == 40
        assert figures["machine_busy"] == 0.5
        assert figures["lag"] == 17
    assert local["trainer_utilisation"] == pytest.approx(0.5)  # 5 s of 10
    assert local["update_s"] == pytest.approx(0.25)
    assert spread["trainer_utilisation"] == pytest.approx((0.25 * 4 + 0.75 * 6) / 10)


def make_loop(folder, env, fabric, journal):
    loop = toy.loop(folder, iterations=1000)
    loop.make_env, loop.fabric, loop.journal = env, fabric, journal
    return loop


def slow(**changes):
    return partial(toy.ToyEnv, num_envs=2, **changes)


def test_the_synchronous_loop_is_as_slow_as_its_simulator(tmp_path):
    """An iteration of the toy is 4 episodes of at least 4 steps on 2 rows: 8 steps of 20 ms, and 4 updates."""
    prepared = prepare(make_loop, slow(), toy.runtime(), tmp_path)
    assert prepare(None, None, None, tmp_path) == prepared, "once"
    what = Measurement(loop=make_loop, env=slow(latency=0.02), runtime=None, local=toy.runtime(), seconds=0.5)
    figures = measure(what, prepared, tmp_path / "running")
    assert figures["seconds"] >= 0.5
    assert figures["updates_per_s"] < 4 / (8 * 0.02)
    assert figures["control_steps_per_s"] < 2 / 0.02
    assert figures["trainer_utilisation"] == pytest.approx(figures["update_s"] * figures["updates_per_s"])
    assert 0 < figures["machine_busy"] <= 1
    assert not (tmp_path / "running").exists()


def test_every_arm_is_beside_a_synchronous_loop_of_the_same_variation():
    cells = _cells([5, 50], 2, {"plain": Arm(), "varies": Arm(variation=0.5), "more": Arm(rows=3)})
    assert len(cells) == len(set(cells)) == 2 * 2 * (2 + 3)
    for cell in cells:
        if cell.arm is not None:
            assert cell._replace(name="synchronous", arm=None) in cells


def test_what_gained_less_counts():
    def one(arm, repeat, steps, updates):
        return {"arm": arm, "variation": 0.0, "latency_ms": 5, "repeat": repeat, "control_steps_per_s": steps,
                "updates_per_s": updates, "trainer_utilisation": 0.4, "lag": 3.0, "machine_busy": 0.5, "update_s": 0.1,
                "start_up_s": 2.0}

    rows = [one("synchronous", 0, 10, 1), one("a", 0, 30, 2), one("synchronous", 1, 10, 1), one("a", 1, 30, 6)]
    compared = _compare(rows, "a", Arm(), 5)
    assert (compared["speed_up"], compared["lowest"], compared["highest"]) == (2.5, 2, 3)
    assert compared["simulation_share"] == pytest.approx(0.6)
    assert compared["synchronous_control_steps_per_s"] == 10


def test_nothing_to_measure_is_said(tmp_path):
    with pytest.raises(UserError, match="at least one latency"):
        benchmark_throughput(folder=str(tmp_path), loop=None, env=None, runtime=None, latencies_ms=[], repeats=1,
                             seconds=1.0, arms={"a": Arm()})
    with pytest.raises(UserError, match="rows of an arm"):
        Arm(rows=0)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.xdist_group("ray")
def test_both_are_measured_and_what_was_measured_is_not_measured_again(tmp_path):
    def run():
        return benchmark_throughput(
            folder=str(tmp_path), loop=make_loop, env=partial(toy.LatentToy, num_envs=2), runtime=toy.runtime(),
            latencies_ms=[20], repeats=1, seconds=1.0, arms={"asynchronous": Arm()})

    assert run() == 0
    results = json.loads((tmp_path / "results.json").read_text())
    [compared] = results["compared"]
    assert compared["speed_up"] > 0
    assert {row["arm"] for row in results["rows"]} == {"synchronous", "asynchronous"}
    assert (tmp_path / "throughput.png").stat().st_size > 1000
    assert run() == 0
    assert json.loads((tmp_path / "results.json").read_text()) == results
