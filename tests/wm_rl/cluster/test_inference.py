import asyncio
import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.types import Observation
from tests import examples
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
