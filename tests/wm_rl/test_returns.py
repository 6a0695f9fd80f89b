"""GAE against numbers worked by hand and against the slow sum in its definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wm_rl.returns import gae


def run(reward, value, final_value, discount, mask, terminated, trace):
    advantage, target = gae(
        reward=torch.tensor([reward]), value=torch.tensor([value]), final_value=torch.tensor([final_value]),
        discount=torch.tensor([discount]), mask=torch.tensor([mask]), terminated=torch.tensor([terminated]),
        trace=trace)
    return advantage[0].tolist(), target[0].tolist()


def test_by_hand():
    # gamma .9 per decision, lambda .5, values 1, 2, rewards 0, 1, truncated with V = 3 after
    # delta_1 = 1 + .9 * 3 - 2 = 1.7;  A_1 = 1.7
    # delta_0 = 0 + .9 * 2 - 1 = .8;   A_0 = .8 + .9 * .5 * 1.7 = 1.565;  targets: 2.565, 3.7
    advantage, target = run([0.0, 1.0], [1.0, 2.0], 3.0, [0.9, 0.9], [True, True], False, 0.5)
    assert advantage == pytest.approx([1.565, 1.7])
    assert target == pytest.approx([2.565, 3.7])
    # terminated: delta_1 = 1 - 2 = -1;  A_0 = .8 - .45 = .35
    assert run([0.0, 1.0], [1.0, 2.0], 3.0, [0.9, 0.9], [True, True], True, 0.5)[0] == pytest.approx([0.35, -1.0])


def test_discount_follows_the_length_of_each_chunk():
    # a chunk of 2 steps, then one cut after 1: discounts .81 and .9, lambda 1, terminated
    # delta_1 = 1 - .5 = .5;  delta_0 = .81 * .5 - .2 = .205;  A_0 = .205 + .81 * .5 = .61
    advantage, _ = run([0.0, 1.0], [0.2, 0.5], 9.0, [0.81, 0.9], [True, True], True, 1.0)
    assert advantage == pytest.approx([0.61, 0.5])


def test_padding_changes_nothing():
    short = run([0.0, 1.0], [1.0, 2.0], 3.0, [0.9, 0.9], [True, True], False, 0.5)
    padded = run([0.0, 1.0, 7.0], [1.0, 2.0, 8.0], 3.0, [0.9, 0.9, 0.9], [True, True, False], False, 0.5)
    assert padded[0] == pytest.approx([*short[0], 0.0])
    assert padded[1] == pytest.approx([*short[1], 0.0])


@given(st.integers(1, 8), st.floats(0, 1), st.booleans(), st.integers(0, 2**31))
def test_is_the_definition(length, trace, terminated, seed):
    draw = torch.Generator().manual_seed(seed)
    reward, value, discount = (torch.rand(length, generator=draw, dtype=torch.float64) for _ in range(3))
    final = 0.0 if terminated else 1.3
    following = torch.cat([value[1:], torch.tensor([final], dtype=torch.float64)])
    delta = reward + discount * following - value
    expected = []
    for i in range(length):  # A_i = sum_j (prod_{i <= m < j} gamma_m lambda) delta_j
        expected.append(sum(torch.prod(discount[i:j] * trace) * delta[j] for j in range(i, length)))
    advantage, _ = gae(
        reward=reward[None], value=value[None], final_value=torch.tensor([1.3], dtype=torch.float64),
        discount=discount[None], mask=torch.ones(1, length, dtype=torch.bool), terminated=torch.tensor([terminated]),
        trace=trace)
    torch.testing.assert_close(advantage[0], torch.stack([torch.as_tensor(e) for e in expected]))
