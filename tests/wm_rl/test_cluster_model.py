"""The model of a cluster against queueing theory, closed forms, and laws that hold on every sample path."""

import math
from dataclasses import replace

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from data.types import UserError
from wm_rl import cluster_model
from wm_rl.cluster import collecting, driver
from wm_rl.cluster_model import ClusterModel, predict
from wm_rl.cluster_stations import Processor, Server

ALONE = ClusterModel(
    learners=1, servers=1, collectors=1, rows=1, cores=None, step_latency=0.1, step_compute=0.0, chunk=2,
    episode_steps=20, episode_spread=0.0, call=0.0, forward_fixed=0.01, forward_per_row=0.002, batch_size=1,
    max_age=0.0, append=0.0, update=0.05, update_sharded=0.0, samples_per_update=100, publish_every=1,
    updates_per_episode=math.inf, episodes_ahead=4, max_lag=math.inf, report_every=0.5, driver_call=0.0,
    observation_bytes=0.0, episode_bytes=0.0, weights_bytes=0.0, bandwidth=math.inf, reduce_bandwidth=math.inf,
    latency=0.0)


UNPACED = {"updates_per_episode": 1e-9, "episodes_ahead": 10**9}
"""The learner does nothing, and collectors do not wait for it."""


def served(*, rate, batch_size=1, max_age=0.0, seconds=2_000.0, fixed=0.008, per_row=0.002, seed=0):
    """A server whose requests come as a Poisson process."""
    env, draw = simpy.Environment(), np.random.default_rng(seed)
    server = Server(env, Processor(env), batch_size=batch_size, max_age=max_age, fixed=fixed,
                    per_row=per_row)

    def arrive():
        while True:
            yield env.timeout(draw.exponential(1 / rate))
            server.ask()

    env.process(arrive())
    env.run(until=seconds)
    return server


# -- closed forms -----------------------------------------------------------------------------------------------------


def test_one_row_and_one_server_take_turns():
    """A decision takes two steps and one forward pass of one row: 0.2 + 0.012 s."""
    found = predict(ALONE, seconds=500.0, warm_up=50.0)
    assert found.control_steps_per_s == pytest.approx(2 / 0.212, rel=1e-2)
    assert found.utilisation["simulators"] == pytest.approx(0.2 / 0.212, rel=1e-2)
    assert found.utilisation["inference"] == pytest.approx(0.012 / 0.212, rel=1e-2)
    assert found.episodes_per_s == pytest.approx(2 / 0.212 / 20, rel=2e-2)
    assert found.updates_per_s == pytest.approx(1 / 0.05, rel=1e-3)
    assert found.samples_per_s == pytest.approx(100 * found.updates_per_s)


def test_a_lonely_request_waits_for_the_age_and_links_and_calls_take_their_time():
    """0.2 s of steps, 0.012 s of forward pass, 0.03 s of age, 0.004 s of call, 1 kB at 100 kB/s, twice 5 ms there and
    back."""
    slow = replace(ALONE, batch_size=4, max_age=0.03, call=0.004, observation_bytes=1e3, bandwidth=1e5, latency=0.005)
    found = predict(slow, seconds=500.0, warm_up=50.0)
    assert found.control_steps_per_s == pytest.approx(2 / (0.212 + 0.03 + 0.004 + 0.01 + 0.01), rel=1e-2)
    assert found.wait_p99 == pytest.approx(0.03)
    assert found.batch_rows == 1


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_saturated_server_gives_full_batches_back_to_back(batch_size):
    found = predict(replace(ALONE, step_latency=0.0, step_compute=1e-6, collectors=64, batch_size=batch_size,
                            max_age=10.0, **UNPACED), seconds=40.0, warm_up=10.0)
    assert found.control_steps_per_s / 2 == pytest.approx(batch_size / (0.01 + 0.002 * batch_size), rel=1e-2)
    assert found.utilisation["inference"] == pytest.approx(1, abs=1e-3)
    assert found.bottleneck == "inference"


@pytest.mark.parametrize("load", [0.3, 0.6, 0.9])
def test_waits_at_a_server_of_single_rows_are_those_of_an_m_d_1_queue(load):
    """Pollaczek and Khinchine: service D, load ρ, mean wait ρ D / (2 (1 − ρ))."""
    server = served(rate=load / 0.01)
    assert np.mean(server.waits) == pytest.approx(load * 0.01 / (2 * (1 - load)), rel=0.05)


def test_a_request_waits_at_most_its_age_and_one_forward_pass():
    """Where batches have room for all who ask: here 0.05 s and a pass over at most 64 rows."""
    server = served(rate=100.0, batch_size=64, max_age=0.05, seconds=500.0)
    assert max(server.batches) < 64
    assert max(server.waits) <= 0.05 + server.forward(64) + 1e-9
    assert max(server.waits) > 0.0499


def test_ranks_reduce_over_a_ring():
    """Four ranks: 1.5 times the gradients over each link, six messages; the sharded part of an update is a quarter."""
    model = replace(ALONE, learners=4, weights_bytes=1e6, reduce_bandwidth=1e8, latency=0.001, update_sharded=0.04)
    assert model.reduce() == pytest.approx(1.5 * 0.01 + 6 * 0.001)
    found = predict(model, seconds=200.0, warm_up=10.0)
    assert found.updates_per_s == pytest.approx(1 / (0.05 + 0.01 + model.reduce()), rel=1e-2)
    assert found.samples_per_s == pytest.approx(400 * found.updates_per_s)
    assert found.utilisation["all-reduce"] == pytest.approx(model.reduce() * found.updates_per_s, rel=1e-2)


def test_the_lag_of_an_episode_is_the_updates_taken_since_it_was_half_played():
    """20 steps in 10 decisions of 0.212 s, acted on with weights at most one update old, and reported within 0.5 s: on
    average (4.5 + 1) decisions after its mean decision it ends, and 0.25 s later it is told; 20 updates a second."""
    found = predict(ALONE, seconds=2000.0, warm_up=50.0)
    assert found.lag == pytest.approx(20 * (5.5 * 0.212 + 0.25), rel=0.1)


def test_two_who_share_a_core_take_twice_as_long():
    """Four rows that only compute, two cores: two rows' worth; and nobody starves."""
    busy = replace(ALONE, cores=2, collectors=4, step_latency=0.0, step_compute=0.1, forward_fixed=1e-6,
                   forward_per_row=0.0, **UNPACED)
    found = predict(busy, seconds=200.0, warm_up=20.0)
    assert found.control_steps_per_s == pytest.approx(2 / 0.1, rel=2e-2)
    assert found.bottleneck == "cores"
    assert found.utilisation["cores"] == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(("changes", "name"), [
    ({}, "updates"), ({"updates_per_episode": 1.0}, "simulators"), ({"forward_fixed": 1.0}, "inference"),
    ({"collectors": 8, "append": 0.5}, "writer"), ({"driver_call": 0.3}, "driver"),
    ({"collectors": 8, "episode_bytes": 1e6, "bandwidth": 3e6}, "link to the writer"),
    ({"learners": 8, "weights_bytes": 1e9, "reduce_bandwidth": 2e9}, "all-reduce")])
def test_the_bottleneck_is_what_was_made_slow(changes, name):
    paced = {"updates_per_episode": 1.0} if changes and "learners" not in changes else {}
    found = predict(replace(ALONE, **(paced | changes)), seconds=200.0, warm_up=20.0)
    assert found.bottleneck == name
    assert found.next_bottleneck != name


# -- laws -------------------------------------------------------------------------------------------------------------

MODELS = st.builds(
    lambda **changes: replace(ALONE, **changes),
    learners=st.integers(1, 3), servers=st.integers(1, 3), collectors=st.integers(1, 3), rows=st.integers(1, 3),
    cores=st.sampled_from([None, 1, 2]), step_latency=st.floats(0, 0.2), step_compute=st.floats(0.01, 0.05),
    chunk=st.integers(1, 4), episode_steps=st.floats(1, 30), episode_spread=st.floats(0, 0.9),
    call=st.floats(0, 0.01), forward_fixed=st.floats(1e-3, 0.05), forward_per_row=st.floats(0, 0.01),
    batch_size=st.integers(1, 8), max_age=st.floats(0, 0.05), append=st.floats(0, 0.05), update=st.floats(0.01, 0.2),
    update_sharded=st.floats(0, 0.1), publish_every=st.integers(1, 4),
    updates_per_episode=st.sampled_from([0.5, 2.0, math.inf]), max_lag=st.sampled_from([2.0, 20.0, math.inf]),
    report_every=st.floats(0.1, 1.0), driver_call=st.floats(0, 0.01), observation_bytes=st.floats(0, 1e4),
    episode_bytes=st.floats(0, 1e5), weights_bytes=st.floats(0, 1e5), bandwidth=st.sampled_from([1e6, 1e8, math.inf]),
    reduce_bandwidth=st.sampled_from([1e7, math.inf]), latency=st.sampled_from([0.0, 0.002]))


@settings(max_examples=30, deadline=None)
@given(model=MODELS, seed=st.integers(0, 100))
def test_laws_that_hold_for_every_cluster(model, seed):
    seconds = 3.0
    found = predict(model, seconds=seconds, warm_up=1.0, seed=seed)
    for name, station in found.stations.items():
        # Little's law on a finite window: the mean number inside is the time spent inside per second.
        assert station.number() * seconds == pytest.approx(station.time(), rel=1e-9, abs=1e-9), name
    assert {name: share for name, share in found.utilisation.items() if not -1e-9 <= share <= 1 + 1e-9} == {}
    # The utilisation law, to within the request that is underway at either end.
    writer = found.stations["writer"]
    assert writer.busy() == pytest.approx(writer.left * model.append, abs=2 * model.append + 1e-9)
    # No more than there is room for.
    decision = model.chunk * (model.step_latency + model.step_compute)
    slack = (model.chunk + 1) * model.collectors * model.rows / seconds
    assert found.control_steps_per_s <= model.chunk * model.collectors * model.rows / decision + slack
    update = model.update + model.update_sharded / model.learners + model.reduce()
    assert found.updates_per_s * update <= 1 + update / seconds + 1e-9
    assert found.batch_rows <= model.batch_size
    full = model.batch_size / (model.forward_fixed + model.forward_per_row * model.batch_size)
    requests = sum(station.left for name, station in found.stations.items() if name.startswith("server "))
    if model.batch_size & (model.batch_size - 1) == 0:
        assert requests / seconds <= model.servers * (full + 2 * model.batch_size / seconds)
    assert math.isnan(found.lag) or found.lag >= 0


@settings(max_examples=10, deadline=None)
@given(model=MODELS)
def test_a_seed_alone_decides(model):
    first, second = (predict(model, seconds=4.0, warm_up=1.0, seed=3) for _ in range(2))
    assert first.utilisation == second.utilisation
    assert first.control_steps_per_s == second.control_steps_per_s


def test_the_model_keeps_the_rules_of_the_runtime():
    assert cluster_model.UNDERWAY == collecting._UNDERWAY
    assert cluster_model.REPORT_EVERY == driver._REPORT_EVERY


def test_a_machine_that_others_use_is_slower_in_what_it_computes_only():
    slow = replace(ALONE, step_compute=0.01).slowed(2.0)
    found = predict(slow, seconds=500.0, warm_up=50.0)
    assert found.control_steps_per_s == pytest.approx(2 / (0.2 + 0.04 + 0.024), rel=1e-2)
    assert found.updates_per_s == pytest.approx(1 / 0.1, rel=1e-3)


def test_data_pays_for_updates():
    """Half an update an episode: what is trained follows what is collected, whatever else is fast."""
    found = predict(replace(ALONE, collectors=8, updates_per_episode=0.5), seconds=500.0, warm_up=100.0)
    assert found.updates_per_s == pytest.approx(0.5 * found.episodes_per_s, rel=0.05)


def test_a_slow_learner_holds_collectors_back():
    found = predict(replace(ALONE, collectors=8, updates_per_episode=1.0, update=2.0), seconds=500.0, warm_up=100.0)
    assert found.episodes_per_s == pytest.approx(0.5, rel=0.05)
    assert found.bottleneck == "updates"
    assert found.trainer_utilisation > 0.99


def test_twice_the_devices_are_twice_the_samples_until_something_is_shared():
    one = replace(ALONE, collectors=8, updates_per_episode=1.0, append=0.05)
    few, many = (predict(one.scaled(n), seconds=200.0, warm_up=50.0) for n in (1, 2))
    assert few.bottleneck == many.bottleneck == "simulators"
    assert many.samples_per_s == pytest.approx(2 * few.samples_per_s, rel=0.03)
    crowded = predict(one.scaled(16), seconds=200.0, warm_up=50.0)
    assert crowded.bottleneck == "writer"
    assert crowded.episodes_per_s == pytest.approx(1 / 0.05, rel=0.02)


@pytest.mark.parametrize("changes", [{"learners": 0}, {"update": 0.0}, {"bandwidth": -1.0}, {"episode_spread": 1.0}])
def test_what_cannot_run_is_refused(changes):
    with pytest.raises(UserError):
        replace(ALONE, **changes)
