"""However the work of an update is shared, it is the same update."""

import subprocess
import sys

import pytest
import torch

from data.store import ReplayStore
from data.types import UserError
from tests import examples
from wm_rl.fabric import make_fabric
from wm_rl.policy import TinyVLA


def play(store, out, *settings):
    """What ``tests.wm_rl.ranks`` leaves; gradients are clipped, at a norm that all of them exceed."""
    command = [sys.executable, "-m", "tests.wm_rl.ranks", str(store), str(out), "max_gradient_norm=0.05", *settings]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks") / "replay.zarr"
    examples.store(folder).close()
    return folder


@pytest.fixture(scope="module")
def alone(store):
    """One process, one piece, eager."""
    found = play(store, store.parent / "alone.pt")
    before = examples.policy(0).state_dict()
    assert any(not torch.equal(before[name], value) for name, value in found["parameters"].items())
    assert all(row["gradient_norm"] > 0.1 for row in found["metrics"])
    return found


def check_same(found, expected, tolerance):
    for name, value in expected["parameters"].items():
        torch.testing.assert_close(found["parameters"][name], value, rtol=0, atol=tolerance)
        assert torch.equal(found["state"]["policy"][name], found["parameters"][name])
    for i, moments in expected["state"]["optimizer"]["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(found["state"]["optimizer"]["state"][i][name], value, rtol=0, atol=tolerance)
    for told, known in zip(found["metrics"], expected["metrics"][-len(found["metrics"]):], strict=True):
        assert told == pytest.approx(known, rel=1e-3, abs=1e-6)
    assert found["state"]["version"] == expected["state"]["version"] == 5


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "tolerance"), [
    ("devices=2", 1e-6), ("devices=4", 1e-6), ("devices=2 strategy=fsdp", 1e-5), ("devices=4 strategy=fsdp", 1e-5),
    ("micro_batches=3", 1e-6), ("activation_checkpointing=true", 1e-6), ("compile=true", 1e-6),
    ("devices=2 micro_batches=2 activation_checkpointing=true compile=true", 1e-6),
    ("devices=2 strategy=fsdp micro_batches=2 activation_checkpointing=true compile=true", 1e-5),
])
def test_shared_work_is_the_work_of_one(store, alone, tmp_path, settings, tolerance):
    found = play(store, tmp_path / "shared.pt", *settings.split())
    check_same(found, alone, tolerance)
    ranks = int(settings.split("devices=")[1][0]) if "fsdp" in settings else 1
    assert found["held"] == pytest.approx(1 / ranks, abs=0.05)  # of the weights, by the first rank


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [("devices=2 strategy=fsdp", ""), ("", "devices=2 strategy=fsdp"),
                                             ("devices=2 strategy=fsdp", "devices=3 strategy=fsdp")])
def test_a_checkpoint_does_not_know_how_many_wrote_it(store, alone, tmp_path, first, then):
    play(store, tmp_path / "first.pt", "last=3", *first.split())
    then = play(store, tmp_path / "then.pt", f"resume={tmp_path / 'first.pt'}", *then.split())
    assert len(then["metrics"]) == 2
    check_same(then, alone, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["", "devices=2", "devices=2 strategy=fsdp"])
def test_bfloat16_steps_are_near_those_of_float32(store, alone, tmp_path, strategy):
    """To the 3 digits that bfloat16 has: of the loss, and so of gradients; Adam's step can flip where one is near 0."""
    found = play(store, tmp_path / "half.pt", "precision=bf16-mixed", *strategy.split())
    assert all(value.dtype == torch.float32 for value in found["parameters"].values() if value.is_floating_point())
    moved = stayed = 0.0
    for name, value in alone["parameters"].items():
        moved += float((value - examples.policy(0).state_dict()[name]).square().sum())
        stayed += float((found["parameters"][name] - value).square().sum())
    assert 0 < stayed < 0.05 * moved
    for told, known in zip(found["metrics"], alone["metrics"], strict=True):
        assert told["gradient_norm"] == pytest.approx(known["gradient_norm"], rel=0.05)
        assert told["value_loss"] == pytest.approx(known["value_loss"], rel=0.05)


@pytest.mark.slow
def test_the_loop_acts_with_what_all_ranks_have_learned(tmp_path):
    """Log-probs of what the first rank collects are those of the whole, newest policy."""
    folders = []
    for settings in ([], ["devices=2", "strategy=fsdp"]):
        folders.append(tmp_path / "-".join(settings or ["alone"]))
        command = [sys.executable, "-m", "tests.wm_rl.loops", str(folders[-1]), *settings]
        done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
    policies = [TinyVLA.load(folder / "policy") for folder in folders]
    assert [policy.version for policy in policies] == [8, 8]
    for name, value in policies[0].state_dict().items():
        torch.testing.assert_close(policies[1].state_dict()[name], value, rtol=0, atol=1e-5)
    alone, shared = (ReplayStore.open(folder / "replay.zarr") for folder in folders)
    assert len(alone) == len(shared) == 4 + 2 * 4
    for i in range(4, 12):
        one, two = alone.trajectory(i), shared.trajectory(i)
        assert (one.policy_version == (0 if i < 8 else 4)).all()
        assert (two.policy_version == one.policy_version).all()
        assert (two.action_token == one.action_token).all()
        assert two.log_prob == pytest.approx(one.log_prob, rel=0, abs=1e-5)


@pytest.mark.parametrize(("settings", "message"), [
    ({"strategy": "deepspeed"}, "expected auto, ddp, fsdp, got 'deepspeed'"),
    ({"strategy": "fsdp"}, "type runtime.devices=2"),
    ({"precision": "16-mixed"}, "expected 32-true or bf16-mixed, got '16-mixed'"),
    ({"devices": 0}, "runtime.devices must be at least 1, got 0"),
    ({"accelerator": "cuda", "devices": 64}, r"expected 64 CUDA device\(s\), found \d+"),
])
def test_what_does_not_go_together_is_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        make_fabric(**{"accelerator": "cpu", "precision": "32-true"} | settings)
