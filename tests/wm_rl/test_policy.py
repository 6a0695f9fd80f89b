"""The policy as an actor, as a network, and on disk."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.types import Observation, UserError
from tests import examples
from wm_rl.policy import TinyVLA, check_compatible


def observation(rows, seed=0):
    draw = np.random.default_rng(seed)
    return Observation(
        frames={"front": draw.integers(0, 255, (rows, 16, 16, 3), dtype=np.uint8)},
        proprio=draw.normal(size=(rows, 2)).astype(np.float32),
        instruction=["open the door", "close it", "push"][:rows], slot=list(range(rows)))


def test_log_prob_of_what_was_chosen_is_what_training_computes():
    policy = examples.policy()
    seen = observation(3)
    action = policy.act(seen, [1, 2, 3])
    output = policy({"front": torch.from_numpy(seen.frames["front"])}, torch.from_numpy(seen.proprio),
                    policy.words(seen.instruction))
    log_probs = output.logits.log_softmax(-1)
    chosen = log_probs.gather(-1, torch.from_numpy(action.token).long()[..., None])[..., 0]
    np.testing.assert_allclose(action.log_prob, chosen.detach().numpy(), atol=1e-5)
    np.testing.assert_allclose(action.value, output.value.detach().numpy(), atol=1e-5)
    assert action.token.shape == (3, 2, 3)


def test_each_row_draws_from_its_own_seed():
    policy, seen = examples.policy(), observation(3)
    together = policy.act(seen, [7, 8, 9])
    alone = policy.act(Observation(frames={"front": seen.frames["front"][1:2]}, proprio=seen.proprio[1:2],
                                   instruction=seen.instruction[1:2], slot=[1]), [8])
    assert (together.token[1] == alone.token[0]).all()
    assert (policy.act(seen, [7, 8, 9]).token == together.token).all()


def test_sampling_follows_the_distribution():
    policy, seen = examples.policy(), observation(1)
    policy.action_head.weight.data *= 100  # away from uniform
    output = policy({"front": torch.from_numpy(seen.frames["front"])}, torch.from_numpy(seen.proprio),
                    policy.words(seen.instruction))
    expected = output.logits.softmax(-1)[0].detach().numpy()
    draws = np.stack([policy.act(seen, [seed]).token[0] for seed in range(2000)])
    seen_share = (draws[..., None] == np.arange(5)).mean(axis=0)
    assert np.abs(seen_share - expected).max() < 0.05
    assert (policy.act(seen, None).token[0] == expected.argmax(-1)).all()


@given(st.lists(st.floats(-1.5, 1.5), min_size=1, max_size=6))
def test_discretising_picks_the_nearest_bin(values):
    policy = examples.policy()
    token = policy.discretise(torch.tensor(values))
    nearest = (policy.bin_centres[None] - torch.tensor(values).clamp(-1, 1)[:, None]).abs().min(dim=1).values
    chosen = (policy.bin_centres[token] - torch.tensor(values).clamp(-1, 1)).abs()
    torch.testing.assert_close(chosen, nearest)


def test_the_value_does_not_reach_the_rest():
    policy, seen = examples.policy(), observation(2)
    output = policy({"front": torch.from_numpy(seen.frames["front"])}, torch.from_numpy(seen.proprio),
                    policy.words(seen.instruction))
    output.value.sum().backward()
    moved = {name for name, p in policy.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert moved
    assert all(name.startswith("value_") for name in moved)


def test_saved_and_loaded_is_the_same(tmp_path):
    policy = examples.policy()
    policy.version = 12
    policy.save(tmp_path / "policy")
    loaded = TinyVLA.load(tmp_path / "policy")
    assert loaded.version == 12
    assert loaded.spec == policy.spec
    assert loaded.statistics.same_as(policy.statistics)
    seen = observation(3)
    assert (loaded.act(seen, [1, 2, 3]).log_prob == policy.act(seen, [1, 2, 3]).log_prob).all()


def test_a_missing_or_broken_checkpoint_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r"no policy in .*: expected policy\.json"):
        TinyVLA.load(tmp_path)
    examples.policy().save(tmp_path)
    (tmp_path / "policy.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="holds no readable policy"):
        TinyVLA.load(tmp_path)


def test_other_statistics_or_cameras_are_refused():
    policy = examples.policy()
    check_compatible(policy, spec=examples.SPEC, statistics=examples.STATISTICS, what="replay store")
    shifted = dataclasses.replace(examples.STATISTICS, proprio_mean=np.ones(2, np.float32))
    with pytest.raises(UserError, match=r"of replay store \(\w{12}\) do not match those of the policy \(\w{12}\)"):
        check_compatible(policy, spec=examples.SPEC, statistics=shifted, what="replay store")
    other = dataclasses.replace(examples.SPEC, cameras=("wrist",))
    with pytest.raises(UserError, match="policy expects cameras"):
        check_compatible(policy, spec=other, statistics=examples.STATISTICS, what="replay store")
