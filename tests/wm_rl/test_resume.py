"""Stopped by a signal, or with a damaged newest checkpoint, a run ends where one that was left alone ends.

The simulator is a toy; ``tests/integration/test_train.py`` kills real runs.
"""

import json
import signal
import threading

import pytest
import torch

from data.store import ReplayStore
from data.types import Source, UserError
from tests import examples
from tests.wm_rl.cluster import toy
from wm_rl import interrupts
from wm_rl import loop as loop_module
from wm_rl.checkpoint import load_checkpoint
from wm_rl.improve import improve
from wm_rl.learner import Learner

pytestmark = pytest.mark.usefixtures("signals")


def run(folder):
    interrupts.remember()
    torch.manual_seed(0)  # as a new process begins
    loop = toy.loop(folder, iterations=2, imagined=0.5)
    try:
        loop.run(improve)
    finally:
        loop.store().close()  # as the end of its process does


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone") / "run"
    run(folder)
    return folder


def check_same(folder, alone):
    first, second = (load_checkpoint(each / "checkpoints") for each in (alone, folder))
    for name in ("learner", "world_model", "policy", "rng"):
        assert equal(first[name], second[name]), name
    assert first["progress"]["drift"] == second["progress"]["drift"]
    assert "cut" not in second["progress"]
    rows = [[json.loads(line) for line in (each / "metrics.jsonl").read_text().splitlines()]
            for each in (alone, folder)]
    assert rows[0] == rows[1]
    first, second = (ReplayStore.open(each / "replay.zarr") for each in (alone, folder))
    assert first.summary() == second.summary()
    assert [first.provenance(i)["seed"] for i in range(len(first))] == [
        second.provenance(i)["seed"] for i in range(len(second))]


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("number", interrupts.SIGNALS)
@pytest.mark.parametrize("after", [1, 3, 4, 6])  # updates; an iteration has four
def test_stopped_between_two_updates_it_ends_the_same(number, after, alone, tmp_path, monkeypatch):
    folder, update = tmp_path / "run", Learner.update

    def then_signal(self, batch):
        metrics = update(self, batch)
        if self.policy.version == after:
            signal.raise_signal(number)
        return metrics

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "update", then_signal)
        with pytest.raises(KeyboardInterrupt):
            run(folder)
    assert interrupts.exit_status() == 128 + number
    assert load_checkpoint(folder / "checkpoints")["learner"]["version"] == after, "nothing that was learned is lost"
    run(folder)
    check_same(folder, alone)


def test_stopped_in_every_iteration_and_while_collecting_it_ends_the_same(alone, tmp_path, monkeypatch):
    folder, step, stops = tmp_path / "run", toy.ToyEnv.step, []

    def then_signal(self, actions):
        result = step(self, actions)
        if self.steps == 3 and len(stops) < 2:
            stops.append(self.steps)
            signal.raise_signal(signal.SIGTERM)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(toy.ToyEnv, "step", then_signal)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                run(folder)
    run(folder)
    check_same(folder, alone)


def test_a_damaged_checkpoint_stops_the_run_and_the_one_before_it_ends_the_same(alone, tmp_path):
    folder = tmp_path / "run"
    run(folder)
    newest = folder / "checkpoints" / "6000002.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    with pytest.raises(UserError, match=r"6000002\.pt is damaged"):
        run(folder)
    newest.rename(newest.with_suffix(".pt.damaged"))
    run(folder)
    check_same(folder, alone)


def test_it_waits_for_what_a_killed_run_left_to_end(alone, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(folder)
    left = ReplayStore.open(folder / "replay.zarr")
    left.append([examples.trajectory(99, 6, Source.SIM)])
    monkeypatch.setattr(loop_module, "_ENDING", 0.5)
    with pytest.raises(UserError, match="another process is writing"):
        run(folder)
    monkeypatch.setattr(loop_module, "_ENDING", 30.0)
    ending = threading.Timer(1.0, left.close)
    ending.start()
    run(folder)
    ending.join()
    check_same(folder, alone)


def test_a_damaged_warm_start_is_noticed(tmp_path):
    folder = tmp_path / "run"
    toy.loop(folder)
    path = folder / "warm_start" / "policy.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"policy\.safetensors is not what this run wrote; restore it"):
        run(folder)
