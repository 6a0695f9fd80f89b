import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from world_model.codec import Pixels
from world_model.config import WorldModelConfig
from world_model.learner import WorldModelLearner
from world_model.self_rollout import SelfRollout
from world_model.training import VideoSampler

ROWS, SIZE = 5, 2


def windows(length, number):
    """Frame ``i`` of window ``n`` is grey level ``10 n + i``; so are its proprio and its action."""
    level = 10.0 * number + torch.arange(length)
    level = level.expand(ROWS, length) + 1000 * torch.arange(ROWS)[:, None]
    return {"frames": level[:, :, None, None, None].expand(ROWS, length, 3, SIZE, SIZE).clone(),
            "proprio": level[:, :, None].clone(), "action": level[:, :-1, None].clone(),
            "tokens": torch.full((ROWS, 3), number)}


class Exactly(Pixels):
    def settle(self, seen):
        return seen


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.integers(1, 5), st.integers(0, 99))
def test_a_row_reads_what_was_painted_and_aims_at_what_was_recorded(context, chunk, calls, seed):
    """Against a slow reference that keeps, row by row, a list of frames."""
    random = torch.Generator().manual_seed(seed)
    rollout = SelfRollout(context=context, chunk=chunk, calls=calls)
    length = context + calls * chunk
    rows = [None] * ROWS
    for step in range(12):
        fresh = windows(length, step)
        first = torch.randint(0, (calls - 1) * chunk + 1, (ROWS,), generator=random)
        rollout.renew(fresh, first)
        for i, row in enumerate(rows):
            if row is None or row["at"] > (calls - 1) * chunk:
                at = max(int(first[i]), i * calls // ROWS * chunk) if step == 0 else int(first[i])
                rows[i] = {"at": at, "seen": fresh["proprio"][i, :, 0].tolist(), "number": step,
                           "recorded": fresh["proprio"][i, :, 0].tolist()}
        frames, proprio, action = rollout.given()
        painted = torch.rand(ROWS, chunk, generator=random) - 5
        for i, row in enumerate(rows):
            at, end = row["at"], row["at"] + context
            expected = row["seen"][at:end] + row["recorded"][end : end + chunk]
            assert frames[i, :, 0, 0, 0].tolist() == expected == proprio[i, :, 0].tolist()
            assert action[i, :, 0].tolist() == row["recorded"][at : end + chunk - 1]
            assert rollout.window["tokens"][i, 0] == row["number"]
            row["seen"][end : end + chunk] = painted[i].tolist()
            row["at"] += chunk
        shape = (ROWS, chunk, 3, SIZE, SIZE)
        rollout.paint(painted[:, :, None, None, None].expand(shape), painted[:, :, None], Exactly())


def test_the_rows_do_not_end_all_at_once():
    rollout = SelfRollout(context=4, chunk=1, calls=ROWS)
    rollout.renew(windows(4 + ROWS, 0), torch.zeros(ROWS, dtype=torch.long))
    assert rollout.at.tolist() == list(range(ROWS))


def test_a_window_begins_where_the_recording_does(store):
    """The toy's episodes are shorter than a window: what lies before them is padding."""
    sampler = VideoSampler(store, WorldModelConfig(rollout_steps=8), 0)
    batch = sampler.sample(0, 64)
    frames, first = batch["frames"], batch["first"]
    assert 0 < (first > 0).sum() < 64
    assert first.max() <= 8
    for row in torch.nonzero(first > 0)[:, 0]:
        at = int(first[row])
        assert (frames[row, : at + 4] == frames[row, 0]).all()  # its context is all the episode's first frame
        assert not batch["action"][row, : at + 3].any()
        assert batch["action"][row, at + 3].any()


def test_rows_go_on_over_the_models_own_frames(store):
    config = WorldModelConfig(widths=(16, 24), batch=4, rollout_steps=3, rollout_share=0.5)
    fitted = WorldModelLearner(config, spec=store.spec, statistics=store.statistics, seed=0)
    fitted.fit_video(store, 3)
    rollout = fitted._video.rollout
    assert len(rollout.at) == config.batch // 2
    painted = rollout.window["frames"].flatten(2) * 127.5 + 127.5
    assert torch.allclose(painted, painted.round(), atol=1e-3)  # as bytes, like recordings
    recorded = VideoSampler(store, config, fitted.seed)
    batches = [recorded.sample(step, config.batch)["frames"] for step in range(3)]
    known = {frame.numpy().tobytes() for batch in batches for frame in batch.flatten(0, 1)}
    own = [frame.round().to(torch.uint8).numpy().tobytes() not in known
           for frame in painted.unflatten(2, batches[0].shape[2:]).flatten(0, 1)]
    assert any(own)
    assert not all(own)
