import asyncio
import math
import selectors
import time
from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.types import Action, Observation
from tests import examples
from wm_rl.cluster import inference
from wm_rl.cluster.inference import InferenceServer


def observation(rows, seed):
    draw = np.random.default_rng(seed)
    return Observation(frames={"front": draw.integers(0, 255, (rows, 16, 16, 3), dtype=np.uint8)},
                       proprio=draw.normal(size=(rows, 2)).astype(np.float32),
                       instruction=[f"reach goal {seed + i}" for i in range(rows)], slot=list(range(rows)))


def serve(asks, *, batch_size, max_age, policy=examples.policy, version=7):
    """Answers to requests that are made at the same time, and the server's report."""

    async def main():
        server = InferenceServer(policy, batch_size=batch_size, max_age=max_age)
        await server.load(policy().state_dict(), version)
        answers = await asyncio.gather(*(server.act(*ask) for ask in asks), return_exceptions=True)
        return answers, await server.report()

    return asyncio.run(main())


@given(rows=st.lists(st.integers(1, 5), min_size=1, max_size=6), batch_size=st.integers(1, 12),
       sampled=st.lists(st.booleans(), min_size=6, max_size=6))
def test_every_row_gets_what_the_policy_alone_would_choose(rows, batch_size, sampled):
    asks = [(observation(n, 10 * i), [100 * i + j for j in range(n)] if sampled[i] else None)
            for i, n in enumerate(rows)]
    answers, report = serve(asks, batch_size=batch_size, max_age=0.0)
    for (looked, seeds), (action, version) in zip(asks, answers, strict=True):
        alone = examples.policy().act(looked, seeds)
        assert version == 7
        assert np.array_equal(action.token, alone.token)
        assert np.array_equal(action.action, alone.action)
        assert np.allclose(action.log_prob, alone.log_prob, rtol=0, atol=1e-5)
        assert np.allclose(action.value, alone.value, rtol=0, atol=1e-5)
    assert report["requests"] == len(rows)
    assert report["queue"] == 0


def test_a_full_batch_is_flushed_at_once_and_a_small_one_by_age():
    begun = time.monotonic()
    _, report = serve([(observation(2, i), [1, 2]) for i in range(4)], batch_size=8, max_age=60.0)
    assert time.monotonic() - begun < 30
    assert report["batch_rows"] == 8
    _, report = serve([(observation(2, 0), [1, 2])], batch_size=8, max_age=0.2)
    assert report["batch_rows"] == 2
    assert report["wait_p50_ms"] >= 200


def test_a_batch_is_never_cut_inside_a_request_nor_larger_than_asked_for():
    _, report = serve([(observation(3, i), [1, 2, 3]) for i in range(4)], batch_size=8, max_age=0.0)
    assert report["batch_rows"] == 6
    _, report = serve([(observation(5, 0), [1, 2, 3, 4, 5])], batch_size=2, max_age=60.0)
    assert report["batch_rows"] == 5  # a request that is larger than a batch goes alone


def test_weights_change_between_batches_and_the_version_with_them():
    async def main():
        server = InferenceServer(examples.policy, batch_size=1, max_age=0.0)
        early = asyncio.create_task(server.act(observation(1, 0), None))
        await asyncio.sleep(0.05)
        assert not early.done()  # nobody acts with weights that were never given
        for seed in (3, 4):
            await server.load(examples.policy(seed).state_dict(), seed)
            action, version = await (early if seed == 3 else server.act(observation(1, 0), None))
            assert version == seed
            alone = examples.policy(seed).act(observation(1, 0), None)
            assert np.allclose(action.log_prob, alone.log_prob, rtol=0, atol=1e-5)

    asyncio.run(main())


def test_a_request_that_cannot_be_answered_says_why_and_the_next_is_answered():
    wrong = Observation(frames={"front": np.zeros((1, 32, 32, 3), np.uint8)}, proprio=np.zeros((1, 2), np.float32),
                        instruction=["reach"], slot=[0])
    (failed, (action, _)), _ = serve([(wrong, [1]), (observation(1, 0), [1])], batch_size=1, max_age=0.0)
    assert isinstance(failed, RuntimeError)
    assert action.token.shape == (1, 2, 3)


TURNS = 1e-5


class Clock(selectors.DefaultSelector):
    """Time that passes while everybody waits, and a nanosecond for each turn of the loop."""

    now = 0.0

    def select(self, timeout=None):
        self.now += max(timeout or 0.0, 1e-9)
        return super().select(0)


class ClockLoop(asyncio.SelectorEventLoop):
    """A forward pass takes ``seconds`` on this clock."""

    def __init__(self, clock, seconds):
        self.clock, self.seconds = clock, seconds
        super().__init__(clock)

    def time(self):
        return self.clock.now

    def run_in_executor(self, executor, function, *arguments):
        async def later():
            await asyncio.sleep(self.seconds)
            return function(*arguments)

        return self.create_task(later())


class Anyone:
    """A policy without a network."""

    version = 0

    def load_state_dict(self, weights):
        pass

    def act(self, looked, seeds):
        n = len(looked.slot)
        return Action(token=np.zeros((n, 1, 1), np.int16), action=np.zeros((n, 1, 1), np.float32),
                      log_prob=np.zeros((n, 1, 1), np.float32), value=np.zeros(n, np.float32))


def waits(thinking, *, rows, batch_size, max_age, seconds):
    """What every request waited until its forward pass began. Who asks has ``rows`` rows, thinks, and asks again."""
    clock = Clock()
    loop = ClockLoop(clock, seconds)
    with mock.patch.object(inference.time, "monotonic", loop.time):
        async def client(pauses):
            looked = Observation(frames={"front": np.zeros((rows, 2, 2, 3), np.uint8)}, slot=list(range(rows)),
                                 proprio=np.zeros((rows, 2), np.float32), instruction=["reach"] * rows)
            for pause in pauses:
                await asyncio.sleep(pause)
                await server.act(looked, None)

        async def main():
            await server.load({}, 1)
            await asyncio.gather(*map(client, thinking))

        server = InferenceServer(Anyone, batch_size=batch_size, max_age=max_age)
        try:
            loop.run_until_complete(main())
            server._serving.cancel()
            loop.run_until_complete(asyncio.gather(server._serving, return_exceptions=True))
        finally:
            loop.close()
    return list(server._waits)


@given(thinking=st.lists(st.lists(st.floats(0, 0.2), min_size=1, max_size=6), min_size=1, max_size=8),
       rows=st.integers(1, 4), max_age=st.floats(0, 0.1), seconds=st.floats(1e-3, 0.2), more=st.integers(0, 8))
def test_nobody_waits_longer_than_the_age_and_one_forward_pass(thinking, rows, max_age, seconds, more):
    waited = waits(thinking, rows=rows, batch_size=rows * len(thinking) + more, max_age=max_age, seconds=seconds)
    assert len(waited) == sum(map(len, thinking))
    assert max(waited) <= max_age + seconds + TURNS


@given(clients=st.integers(1, 12), batch_size=st.integers(1, 4), seconds=st.floats(1e-3, 0.1))
def test_where_more_ask_than_a_batch_holds_each_full_batch_ahead_costs_one_forward_pass_more(
        clients, batch_size, seconds):
    waited = waits([[0.0] * 3] * clients, rows=1, batch_size=batch_size, max_age=0.05, seconds=seconds)
    ahead = math.ceil(clients / batch_size)
    assert max(waited) <= 0.05 + ahead * seconds + TURNS
    assert clients <= batch_size or max(waited) >= (ahead - 1) * seconds - TURNS
