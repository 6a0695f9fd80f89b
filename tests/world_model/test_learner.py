import dataclasses
import io
import shutil

import numpy as np
import pytest
import torch

from data.types import UserError
from world_model.config import ImaginationConfig, WorldModelConfig
from world_model.learner import WorldModelLearner
from world_model.training import learning_rate

TINY = WorldModelConfig(widths=(16, 24), batch=4, success_batch=8, warmup=2, success_windows=4)


def learner(store, config=TINY, seed=0):
    return WorldModelLearner(config, spec=store.spec, statistics=store.statistics, seed=seed)


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


@pytest.mark.parametrize("objective", ["edm", "flow", "regression"])
def test_resume_equals_uninterrupted(store, objective):
    config = dataclasses.replace(TINY, objective=objective)
    whole, once = learner(store, config), learner(store, config)
    whole.fit(store, 2)
    whole.fit(store, 2)
    once.fit(store, 4)
    first = learner(store, config)
    first.fit(store, 2)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    second = learner(store, config, seed=9)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    second.fit(store, 2)
    a, b = whole.state_dict(), second.state_dict()
    assert same(a, b)
    # the video model does not even notice where one fit ended; the success model sees what each fit imagines
    assert same(once.state_dict()["video"], b["video"])


def test_fit_reports_quietly_and_reproducibly(store, capfd, recwarn):
    seen = []
    metrics = learner(store).fit(store, 4, log=lambda step, values: seen.append((step, dict(values))))
    assert metrics["world_model/version"] == 1
    assert np.isfinite(list(metrics.values())).all()
    assert [step for step, values in seen if "world_model/loss" in values] == [0, 1, 2, 3]
    again = learner(store)
    again.fit(store, 4)
    assert learner(store).fit(store, 4) == metrics
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""
    assert [str(w.message) for w in recwarn] == []


def test_saved_weights_imagine_the_same(store, tmp_path):
    fitted = learner(store)
    fitted.fit(store, 2)
    fitted.save_pretrained(tmp_path)
    loaded = WorldModelLearner.from_pretrained(tmp_path)
    assert loaded.version == 1
    for index in range(2):
        for a, b in zip(fitted.film_strip(store, index, 1, 4), loaded.film_strip(store, index, 1, 4), strict=True):
            assert a.shape == (5, 32, 32, 3)
            assert np.array_equal(a, b)
    env, other = (each.imagination(store, ImaginationConfig(), num_envs=2) for each in (fitted, loaded))
    for each in (env, other):
        each.reset(seed=[1, 2], options={"reset_mask": np.ones(2, bool)})
    actions = np.full((2, 2), 0.5, np.float32)
    for a, b in zip(env.step(actions)[1:4], other.step(actions)[1:4], strict=True):
        assert np.array_equal(a, b)


def test_a_loaded_model_is_refitted_at_the_rates_of_later_fits(store, tmp_path):
    learner(store).save_pretrained(tmp_path)
    loaded = WorldModelLearner.from_pretrained(tmp_path, changes={"steps": 0, "success_round_learning_rate": 0.25})
    before = loaded.success_model().state_dict()
    loaded.fit_success(store, 1)
    assert loaded.state_dict()["success_optimizer"]["param_groups"][0]["lr"] == 0.25
    assert any(not torch.equal(value, before[name]) for name, value in loaded.success_model().state_dict().items())
    with pytest.raises(UserError, match=r"no 'step'; did you mean steps\?"):
        WorldModelLearner.from_pretrained(tmp_path, changes={"step": 0})


def test_film_strip_starts_with_the_recorded_frame(store):
    real, imagined = learner(store).film_strip(store, 0, 2, 100)
    assert len(real) == len(imagined) == store.episodes.length[0] - 2 + 1
    assert np.array_equal(real, store.column(0, "rgb_front")[2:])
    assert np.array_equal(real[0], imagined[0])


def test_bad_input_is_one_line(store, tmp_path):
    with pytest.raises(UserError, match=r"objective: expected one of edm, flow, regression, got 'gan'"):
        WorldModelConfig(objective="gan")
    with pytest.raises(UserError, match="no world model at"):
        WorldModelLearner.from_pretrained(tmp_path)
    spec = dataclasses.replace(store.spec, image_size=40)
    with pytest.raises(UserError, match="multiple of 32"):
        WorldModelLearner(WorldModelConfig(widths=(8,) * 4), spec=spec, statistics=store.statistics, seed=0)
    with pytest.raises(UserError, match="other shapes"):
        learner(store).load_state_dict(learner(store, WorldModelConfig(widths=(8, 16))).state_dict())


def test_a_later_fit_that_diverges_is_undone(store):
    first = learner(store)
    assert first.fit(store, 4)["world_model/undone"] == 0
    before = first.state_dict()
    wild = learner(store, dataclasses.replace(TINY, learning_rate=30.0, round_learning_rate=30.0, warmup=1))
    wild.load_state_dict(before)
    metrics = wild.fit(store, 6)
    after = wild.state_dict()
    assert metrics["world_model/undone"] == 1
    assert (before.pop("version"), after.pop("version")) == (1, 2)
    assert same(before, after)
    sane = learner(store)
    sane.load_state_dict(wild.state_dict())
    assert sane.fit(store, 4)["world_model/undone"] == 0


@pytest.mark.slow
def test_actions_matter_and_success_is_seen_after_a_small_fit(store):
    config = WorldModelConfig(widths=(16, 24), batch=16, warmup=20, learning_rate=4e-3, ema=0.98)
    fitted = learner(store, config)
    fitted.fit(store, 200)
    result = fitted.evaluate(store, imagination=ImaginationConfig(), episodes=range(60))
    assert result["psnr_model_4"] > result["psnr_shuffled_4"] + 1
    assert result["psnr_model_8"] > result["psnr_copy_8"]
    assert result["proprio_model_4"] < 0.5 * result["proprio_copy_4"]
    assert result["success_auroc_real"] > 0.95
    assert result["success_ece_real"] < 0.1


def test_the_learning_rate_falls_before_later_fits():
    config = WorldModelConfig(learning_rate=1e-3, round_learning_rate=1e-4, warmup=10, steps=100)
    rates = [learning_rate(config, step) for step in (0, 9, 50, 75, 100, 500)]
    assert rates == pytest.approx([1e-4, 1e-3, 1e-3, 5.5e-4, 1e-4, 1e-4])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_it_imagines_nearly_the_same(store):
    fitted = learner(store, dataclasses.replace(TINY, precision="32-true"))
    fitted.fit(store, 2)
    compiled = learner(store, dataclasses.replace(TINY, precision="32-true", compile=True))
    compiled.load_state_dict(fitted.state_dict())
    one, other = (each.film_strip(store, 1, 1, 4)[1].astype(int) for each in (fitted, compiled))
    assert np.abs(one - other).max() <= 1  # rounding
