"""Whatever was normalised otherwise is refused with one line that names both fingerprints, wherever two things meet."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data.rollout import rollout
from data.types import Source, UserError
from tests import examples
from wm_rl.behaviour import label_unknown_behaviour
from wm_rl.cloning import CloningConfig, clone
from wm_rl.commands.collect import _open_or_create, collect
from wm_rl.commands.evaluate import evaluate
from wm_rl.commands.evaluate_world_model import _act, _load
from wm_rl.improve import improve
from wm_rl.loop import Loop
from wm_rl.policy import TinyVLA, check_compatible
from world_model.config import ImaginationConfig, WorldModelConfig
from world_model.learner import WorldModelLearner

OTHER = dataclasses.replace(examples.STATISTICS, action_high=np.full(3, 2, np.float32))
HERE, THERE = OTHER.fingerprint, examples.STATISTICS.fingerprint
ONE_LINE = rf"{HERE}.*{THERE}|{THERE}.*{HERE}"
TINY = WorldModelConfig(widths=(8, 16), batch=2)


@pytest.fixture(scope="module")
def policy():
    """Made with other statistics than everything else here."""
    return TinyVLA(examples.POLICY, spec=examples.SPEC, statistics=OTHER, seed=0)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return examples.store(tmp_path_factory.mktemp("statistics") / "store")


@pytest.fixture(scope="module")
def env():
    """As far as anything looks at it before it refuses."""
    return SimpleNamespace(spec=examples.SPEC, statistics=examples.STATISTICS, num_envs=1, tasks=["reach"],
                           embodiment="toy", source=Source.SIM, close=lambda: None)


@pytest.fixture(scope="module")
def world_model():
    return WorldModelLearner(TINY, spec=examples.SPEC, statistics=OTHER, seed=0)


def refused(call, *arguments, **named):
    with pytest.raises(UserError, match=ONE_LINE) as error:
        call(*arguments, **named)
    assert "\n" not in str(error.value)


def test_a_policy_and_a_store(policy, store):
    config = CloningConfig(steps=1, batch=2, learning_rate=1e-3, sources={"real": 1.0})
    refused(check_compatible, policy, spec=store.spec, statistics=store.statistics, what="replay store")
    refused(clone, policy, store, config, seed=0, device=torch.device("cpu"), log=lambda step, metrics: None)
    refused(label_unknown_behaviour, policy, store, np.array([], int))


def test_a_policy_and_the_store_of_a_run(policy, store, tmp_path):
    """A warm start that is brought along, and a policy that a resumed run brings back."""
    policy.save(tmp_path / "warm")
    loop = object.__new__(Loop)
    loop.config = SimpleNamespace(warm_start=str(tmp_path / "warm"))
    refused(loop._warm_policy, store)
    loop.policy, loop._opened = policy, store
    refused(improve, loop)


def test_a_policy_and_an_environment(policy, env, tmp_path):
    policy.save(tmp_path / "policy")
    refused(lambda: next(rollout(env, policy, [[0]], sample=True)))
    refused(evaluate, folder=str(tmp_path), candidate=str(tmp_path / "policy"), baseline=None, gate=False,
            perturbations={}, env=lambda: env, evaluation=None)
    refused(collect, seed=0, env=lambda: env, expert=None, actor=str(tmp_path / "policy"), episodes=1, sample=True,
            storage=None, store=str(tmp_path / "made"), lerobot=None, rosbag=None, format="v2.1")
    assert not (tmp_path / "made").exists()


def test_a_store_and_an_environment(store, env, tmp_path):
    other = SimpleNamespace(**{**vars(env), "statistics": OTHER})
    refused(_open_or_create, store.path, other, None)
    refused(_act, {}, [], store, [], lambda: other, tmp_path, None, trials_per_task=1, first_seed=0,
            imagination=ImaginationConfig(), speed=False, compiled=False)


def test_a_world_model_and_a_store(world_model, store, tmp_path):
    config = ImaginationConfig()
    refused(world_model.fit_video, store, 1)
    refused(world_model.fit_success, store, 1)
    refused(world_model.imagination, store, config, num_envs=1)
    refused(world_model.audit, store, config, episodes=range(1))
    refused(world_model.evaluate, store, imagination=config, episodes=range(1))
    refused(world_model.film_strip, store, 0, 0, 1)
    mine = WorldModelLearner(TINY, spec=examples.SPEC, statistics=examples.STATISTICS, seed=0)
    refused(mine.load_state_dict, world_model.state_dict())
    refused(mine.distil, world_model, store, 1)
    world_model.save_pretrained(tmp_path / "world_model")
    refused(_load, str(tmp_path / "world_model"), store)
    mine.load_state_dict(mine.state_dict())
