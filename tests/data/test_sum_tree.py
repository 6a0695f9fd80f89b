import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.sum_tree import SumTree

weights = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=200)


@settings(max_examples=60, deadline=None)
@given(parts=st.lists(weights, min_size=1, max_size=4), changes=st.lists(st.tuples(st.integers(0, 1000),
       st.floats(0, 1e3)), max_size=20), seed=st.integers(0, 2**32))
def test_draws_are_those_of_a_plain_cumulative_sum(parts, changes, seed):
    tree, plain = SumTree(), []
    for part in parts:
        tree.append(np.array(part))
        plain += part
    for item, weight in changes:
        tree.set(np.array([item % len(plain)]), weight)
        plain[item % len(plain)] = weight
    plain = np.array(plain)
    assert len(tree) == len(plain)
    np.testing.assert_array_equal(tree.weights, plain)
    assert tree.total == pytest.approx(plain.sum())
    if tree.total == 0:
        return
    rebuilt = SumTree()
    rebuilt.append(plain)
    places = np.random.default_rng(seed).random(50) * tree.total
    found = tree.find(places)
    np.testing.assert_array_equal(found, rebuilt.find(places))
    assert (plain[found] > 0).all()
    ends = plain.cumsum()
    slack = 1e-9 * ends[-1]
    assert (places <= ends[found] + slack).all()
    assert (places >= ends[found] - plain[found] - slack).all()


def test_a_large_tree_draws_by_weight():
    tree = SumTree()
    tree.append(np.ones(300_000))
    tree.set(np.arange(1000), 0.0)
    tree.set(np.array([250_000]), 299_000.0)
    found = tree.find(np.random.default_rng(0).random(4000) * tree.total)
    assert found.min() >= 1000
    assert (found == 250_000).mean() == pytest.approx(0.5, abs=0.03)


def test_a_tree_that_grew_draws_as_one_that_was_built_at_once():
    rng = np.random.default_rng(0)
    weights = rng.random(20_000) ** 8
    grown, built = SumTree(), SumTree()
    for part in np.array_split(weights, 37):
        grown.append(part)
    built.append(weights)
    places = rng.random(5000) * built.total
    assert grown.total == built.total
    np.testing.assert_array_equal(grown.find(places), built.find(places))
    ends = weights.cumsum()
    assert (np.searchsorted(ends, places, side="right") == built.find(places)).mean() > 0.999  # but for rounding


def test_the_very_first_place_passes_over_nodes_without_weight():
    tree = SumTree()
    tree.append(np.concatenate([np.zeros(10_000), np.ones(10_000)]))
    assert tree.find(np.array([0.0, 1.0, tree.total])).tolist() == [10_000, 10_001, 19_999]
