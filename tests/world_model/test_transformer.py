import copy
import dataclasses
import io

import numpy as np
import pytest
import torch

from data.rollout import rollout
from data.types import Action, UserError
from world_model.codec import Latents, Pixels
from world_model.config import ImaginationConfig, WorldModelConfig
from world_model.learner import WorldModelLearner
from world_model.process import Flow
from world_model.transformer import ActionTransformer

TINY = WorldModelConfig(
    network="transformer", objective="flow", chunk=4, layers=1, heads=2, head_dim=12, vae_widths=(8, 16), vae_steps=3,
    sigma_data=1.0, start_share=0.5, inference_steps=2, batch=4, success_batch=8, success_windows=4, warmup=2,
    rollout_steps=4)


@pytest.fixture(scope="module")
def fitted(store):
    made = WorldModelLearner(TINY, spec=store.spec, statistics=store.statistics, seed=0)
    made.fit(store, 3)
    return made


def small(cameras=1):
    torch.manual_seed(0)
    return ActionTransformer(cameras=cameras, action_dim=2, proprio_dim=2, proprio_mean=[0, 0], proprio_std=[1, 1],
                             chunk=3, layers=1, heads=2, head_dim=12)


def given(model, rows=2, size=8):
    g = torch.Generator().manual_seed(1)
    channels = 4 * model.config["cameras"]
    return (torch.randn(rows, 4, channels, size, size, generator=g), torch.rand(rows, 6, 2, generator=g),
            torch.rand(rows, 4, 2, generator=g), torch.tensor([[3, 5] + [0] * 22] * rows), torch.zeros(rows))


@pytest.mark.parametrize("cameras", [1, 2])
def test_gradients_reach_every_parameter(cameras):
    model = small(cameras)
    torch.nn.init.normal_(model.proprio_head.weight)
    noisy = torch.randn(2, 3, 4 * cameras, 8, 8)
    prediction = model(noisy, Flow().scales(torch.full((2,), 0.7)), *given(model))
    assert prediction.frames.shape == (2, 3, 4 * cameras, 8, 8)
    assert prediction.proprio.shape == (2, 3, 2)
    assert prediction.error.shape == (2, 3)
    (prediction.frames.square().mean() + prediction.proprio.square().mean() + prediction.error.mean()).backward()
    assert [name for name, value in model.named_parameters() if value.grad is None] == []


def test_the_error_head_sends_no_gradient_to_the_rest():
    model = small()
    model(torch.randn(2, 3, 4, 8, 8), Flow().scales(torch.ones(2)), *given(model)).error.sum().backward()
    touched = {name.split(".")[0] for name, value in model.named_parameters() if value.grad is not None}
    assert touched == {"error_head"}


def test_every_condition_is_seen():
    model = small().eval()
    torch.nn.init.normal_(model.proprio_head.weight)
    noisy, scales, inputs = torch.randn(2, 3, 4, 8, 8), Flow().scales(torch.full((2,), 0.7)), given(model)
    with torch.no_grad():
        before = model(noisy, scales, *inputs).frames
        for i, other in enumerate((inputs[0] + 1, inputs[1] + 1, inputs[2] + 1, inputs[3] * 2, inputs[4] + 0.3)):
            changed = [*inputs[:i], other, *inputs[i + 1 :]]
            assert not torch.allclose(model(noisy, scales, *changed).frames, before)


def test_cameras_are_coded_one_by_one(fitted):
    codec = Latents(copy.deepcopy(fitted.pipeline().vae).float())
    frames = torch.randint(0, 256, (2, 3, 6, 32, 32), dtype=torch.uint8)
    seen = codec.encode(frames)
    assert seen.shape == (2, 3, 8, 16, 16)
    assert torch.allclose(seen[:, :, :4], codec.encode(frames[:, :, :3]), atol=1e-5)
    assert codec.decode(seen).shape == frames.shape
    assert torch.equal(Pixels().decode(Pixels().encode(frames)), frames)


def test_the_autoencoder_is_fitted_once_and_its_latents_have_unit_deviation(fitted, store):
    vae = fitted.state_dict()["vae"]
    frames = store.column(0, "rgb_front")[:8].copy()
    latents = Latents(copy.deepcopy(fitted.pipeline().vae).float()).encode(torch.from_numpy(frames).movedim(-1, -3))
    assert 0.5 < latents.std() < 2
    again = WorldModelLearner(TINY, spec=store.spec, statistics=store.statistics, seed=5)
    again.load_state_dict(fitted.state_dict())
    again.fit(store, 1)
    assert all(torch.equal(vae[name], value) for name, value in again.state_dict()["vae"].items())


def test_resumed_equals_uninterrupted(fitted, store):
    buffer = io.BytesIO()
    torch.save(fitted.state_dict(), buffer)
    buffer.seek(0)
    resumed = WorldModelLearner(TINY, spec=store.spec, statistics=store.statistics, seed=9)
    resumed.load_state_dict(torch.load(buffer, weights_only=True))
    whole = WorldModelLearner(TINY, spec=store.spec, statistics=store.statistics, seed=0)
    whole.fit(store, 3)
    resumed.fit(store, 2)
    whole.fit(store, 2)
    a, b = whole.state_dict()["video"], resumed.state_dict()["video"]
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_saved_it_imagines_the_same(fitted, store, tmp_path):
    fitted.save_pretrained(tmp_path)
    loaded = WorldModelLearner.from_pretrained(tmp_path)
    for a, b in zip(fitted.film_strip(store, 0, 1, 6), loaded.film_strip(store, 0, 1, 6), strict=True):
        assert a.shape[1:] == (32, 32, 3)
        assert np.array_equal(a, b)


class Walk:
    """Chunks of four actions that depend on the seed."""

    chunk, version = 4, 0

    def act(self, observation, seeds):
        n = len(observation.slot)
        action = np.stack([np.random.default_rng(seed).uniform(-1, 1, (4, 2)) for seed in seeds]).astype(np.float32)
        return Action(token=np.zeros((n, 4, 2), np.int16), action=action, log_prob=np.full((n, 4, 2), -1, np.float32),
                      value=np.zeros(n, np.float32))


def test_a_chunk_of_actions_is_imagined_in_one_call(fitted, store):
    env = fitted.imagination(store, ImaginationConfig(horizon=8, micro_batch=2, inference_steps=2), num_envs=2)
    env._judge = lambda part: np.zeros(len(part.rows))
    calls = []
    original = env.pipeline
    env.pipeline = type("Counted", (), {
        "denoiser": original.denoiser, "device": original.device,
        "__call__": lambda self, *a, **k: calls.append(1) or original(*a, **k)})()
    played = list(rollout(env, Walk(), [[1], [2]], sample=True))
    assert [len(each) for each in played] == [8, 8]
    assert len(calls) == 2  # 8 steps of both rows
    assert all(np.isfinite(each.uncertainty).all() and (each.uncertainty > 0).all() for each in played)


def test_unannounced_actions_are_imagined_one_by_one(fitted, store):
    config = ImaginationConfig(horizon=8, micro_batch=1, inference_steps=2)
    told, untold, lied = (fitted.imagination(store, config, num_envs=1) for _ in range(3))
    plan = np.random.default_rng(0).uniform(-1, 1, (4, 2)).astype(np.float32)
    frames = []
    for env, announced in ((told, plan), (untold, None), (lied, plan[::-1])):
        env.reset(seed=[3], options={"reset_mask": np.ones(1, bool)})
        if announced is not None:
            env.foresee(0, announced)
        frames.append([env.step(plan[i : i + 1])[0]["frames"]["front"] for i in range(4)])
    assert all(np.array_equal(a, b) for a, b in zip(frames[1], frames[2], strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(frames[0], frames[1], strict=True))


def test_a_student_learns_its_teachers_samples(fitted, store):
    quick = dataclasses.replace(TINY, inference_steps=1, learning_rate=2e-3, round_learning_rate=2e-3, teacher_steps=4)
    student = WorldModelLearner(quick, spec=store.spec, statistics=store.statistics, seed=1)
    metrics = student.distil(fitted, store, 4)
    assert np.isfinite(list(metrics.values())).all()
    first, second = fitted.state_dict(), student.state_dict()
    assert all(torch.equal(value, second["vae"][name]) for name, value in first["vae"].items())
    assert any(not torch.equal(value, second["video"][name]) for name, value in first["video"].items())
    regression = WorldModelLearner(dataclasses.replace(TINY, objective="regression"), spec=store.spec,
                                   statistics=store.statistics, seed=1)
    with pytest.raises(UserError, match="a regression answers in one step already"):
        student.distil(regression, store, 1)


def test_what_does_not_fit_is_said(store):
    with pytest.raises(UserError, match=r"chunk=4 needs world_model.network=transformer"):
        WorldModelConfig(chunk=4)
    with pytest.raises(UserError, match=r"multiple of 64 .*fewer world_model.vae_widths"):
        WorldModelLearner(dataclasses.replace(TINY, vae_widths=(8,) * 6), spec=store.spec,
                          statistics=store.statistics, seed=0)


@pytest.mark.slow
def test_actions_matter_after_a_small_fit(store):
    config = dataclasses.replace(
        TINY, objective="regression", inference_steps=1, layers=2, heads=4, head_dim=24, vae_widths=(16, 32),
        vae_steps=150, batch=16, warmup=20, learning_rate=2e-3, round_learning_rate=2e-4, steps=250, success_ratio=0.0)
    made = WorldModelLearner(config, spec=store.spec, statistics=store.statistics, seed=0)
    made.fit(store, 250)
    result = made.evaluate(store, imagination=ImaginationConfig(), episodes=range(60))
    assert result["psnr_model_4"] > result["psnr_shuffled_4"] + 1
    assert result["proprio_model_4"] < 0.5 * result["proprio_copy_4"]
