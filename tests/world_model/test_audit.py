import pytest
import torch

from world_model.audit import Drift, audit
from world_model.pipeline import WorldModelOutput
from world_model.rollout import read_windows


class Replay:
    """A fake model that knows what was recorded: it answers the recorded frames in turn."""

    def __init__(self, windows):
        self.windows, self.step = windows, 0
        self.denoiser = type("Model", (), {"config": {"context": 4}, "chunk": 1})

    def __call__(self, *given, num_inference_steps):
        frames, proprio = (each[:, self.step : self.step + 1]
                           for each in (self.windows.frames, self.windows.proprio))
        self.step += 1
        return WorldModelOutput(frames=frames, proprio=proprio, error=torch.ones(len(frames), 1))


class TouchesTheEdge(torch.nn.Module):
    """A fake success model that knows the rule of the toy world: the square is at the right edge."""

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, frames, proprio, tokens):
        return (frames[:, 1, 0, :, -1].amax(1) > 200).float()


def test_a_perfect_model_does_not_drift(store):
    episodes, horizon = list(range(20)), 8
    places = [(e, max(0, int(store.episodes.length[e]) - horizon)) for e in episodes]
    perfect = Replay(read_windows(store, places, context=4, horizon=horizon))
    result = audit(store, perfect, TouchesTheEdge(), episodes=episodes, horizon=horizon, threshold=0.5,
                   success_frames=1, seed=0, inference_steps=1)
    won = sum(store.episodes.success[e] == "yes" for e in episodes)
    assert result["audit/imagined_successes"] == result["audit/recorded_successes"] == won > 0
    assert result["audit/psnr"] == 60
    assert result["audit/psnr_copy"] < 30
    assert result["audit/windows"] == 20
    assert Drift().update(result).ratio == 1


def test_drift_by_hand():
    claims = {"audit/imagined_successes": 9.0, "audit/recorded_successes": 3.0}
    first = Drift().update(claims)
    assert first.ratio == pytest.approx(10 / 4)
    assert not first.within(2.0)
    assert first.within(2.6)
    second = first.update({"audit/imagined_successes": 1.0, "audit/recorded_successes": 5.0})
    assert (second.imagined, second.recorded) == (pytest.approx(7.3), pytest.approx(7.1))
    assert second.within(2.0)
    assert Drift().within(1.01)
    assert not Drift(imagined=0.0, recorded=2.0).within(2.0)
