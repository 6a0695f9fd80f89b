"""A simulator in a process of its own: the contract, and every way in which such a process can be lost."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from data.rollout import rollout
from data.types import Success, UserError
from sim.expert import ExpertConfig, ScriptedExpert
from sim.perturbation import Perturbation, draw
from sim.remote import protocol
from sim.remote.client import RemoteEnv
from sim.remote.environments import find_python
from tests.contract import check_env, play
from tests.sim.ball import STEPS

ROOT = Path(__file__).parents[2]
CHANNEL = st.sampled_from([0.25, 0.5, 1.0])


def balls(*configs, factory="tests.sim.ball:make", **settings):
    return RemoteEnv(name="ball", python=Path(sys.executable), factory=factory,
                     configs=configs or [{"rows": 3}], **settings)


@pytest.fixture
def env():
    made = balls({"rows": 2}, {"rows": 1})
    yield made
    made.close()


@pytest.mark.parametrize("configs", [[{"rows": 3}], [{"rows": 2}, {"rows": 1}]])
def test_it_keeps_the_contract(configs):
    check_env(lambda: balls(*configs))


def test_rows_play_the_same_in_one_process_and_in_several(env):
    one = balls({"rows": 3})
    for alone, shared in zip(play(one, [1, 2, 3]), play(env, [1, 2, 3]), strict=True):
        for camera in ("above", "side"):
            np.testing.assert_array_equal(alone[0]["frames"][camera], shared[0]["frames"][camera])
        assert alone[4]["instruction"] == shared[4]["instruction"]
    one.close()


def test_a_scripted_expert_behind_a_process(env):
    episodes = list(rollout(env, ScriptedExpert(env, ExpertConfig(burst_probability=0)), [[1], [2], [3]], sample=True))
    assert [episode.success for episode in episodes] == [Success.YES] * 3
    assert {episode.instruction.split(" to ")[0] for episode in episodes} == {"push the ball"}
    assert all(episode.provenance["simulator"] == "ball" for episode in episodes)


def run(env, seeds):
    episodes = list(rollout(env, ScriptedExpert(env, ExpertConfig(burst_probability=1, burst_steps=(50, 50))), seeds,
                            sample=True))
    return {episode.provenance["seed"]: episode for episode in episodes}


@pytest.mark.parametrize("failure", ["exit", "kill", "raise", "system_exit"])
def test_a_process_lost_in_an_episode_is_replaced_and_training_goes_on(failure, env, caplog):
    lossy = {"fail_seed": 2, "failure": failure}
    broken = balls({"rows": 2, **lossy}, {"rows": 1, **lossy})
    seeds = [[1, 4], [2, 5], [3, 6]]
    whole, cut = run(env, seeds), run(broken, seeds)
    assert sorted(cut) == sorted(whole) == [1, 2, 3, 4, 5, 6]
    for seed in (3, 4, 5, 6):  # of another process, or begun after the loss
        np.testing.assert_array_equal(cut[seed].frames["above"], whole[seed].frames["above"])
    for seed in (1, 2):
        assert len(cut[seed]) == 4
        assert cut[seed].truncated.tolist() == [False, False, False, True]
        assert cut[seed].success is Success.NO
        for camera in ("above", "side"):
            np.testing.assert_array_equal(cut[seed].frames[camera][:4], whole[seed].frames[camera][:4])
            np.testing.assert_array_equal(cut[seed].frames[camera][4], cut[seed].frames[camera][3])
        assert (np.diff(cut[seed].timestamp) > 0).all()
        assert cut[seed].reward[-1] == 0
    assert "another process takes its place" in caplog.text
    broken.close()


def test_a_process_that_hangs_is_replaced_and_says_where_it_hung(caplog):
    env = balls({"rows": 2, "fail_seed": 2, "failure": "sleep"}, call_seconds=1.0)
    episodes = run(env, [[1, 3], [2]])
    assert len(episodes[2]) == 4
    assert episodes[2].truncated[-1]
    assert len(episodes[3]) > 0
    assert "gave no answer within 1 s" in caplog.text
    assert "ball.py" in caplog.text, "the trace of where it hung"
    env.close()


def test_a_process_lost_in_a_reset_starts_the_episode_again_elsewhere():
    env = balls({"rows": 2, "fail_seed": 2, "fail_in": "expert"})
    env.reset(seed=[1, 3], options={"reset_mask": np.ones(2, bool)})
    os.kill(env.provenance["pid"], signal.SIGKILL)
    _, info = env.reset(seed=[None, 4], options={"reset_mask": np.array([False, True])})
    observation, _, _, truncated, _ = env.step(np.zeros((2, 2), np.float32))
    assert truncated.tolist() == [True, False]  # the neighbour's episode went with the process
    assert observation["frames"]["above"].max() > 0
    assert info["time"][1] == 0
    env.close()


def test_a_process_lost_while_the_expert_thinks_ends_its_episodes():
    env = balls({"rows": 2, "fail_seed": 2, "fail_in": "expert"})
    env.reset(seed=[1, 2], options={"reset_mask": np.ones(2, bool)})
    assert (env.expert_action() == 0).all()
    assert env.step(np.ones((2, 2), np.float32))[3].all()
    env.close()


def test_processes_lost_again_and_again_are_an_error():
    env = balls({"rows": 1, "fail_seed": 2, "fail_at": 1}, restarts=2)
    with pytest.raises(RuntimeError, match="3 processes of ball were lost without one whole episode"):
        run(env, [[2] * 5])
    env.close()
    env = balls({"rows": 1, "fail_seed": 2, "fail_at": 1}, restarts=1)
    assert len(run(env, [[2, 1, 2, 3]])) == 3  # whole episodes between them
    env.close()


def test_what_does_not_start_says_why_in_one_line(monkeypatch):
    with pytest.raises(UserError, match="expected at least one row, got 0"):
        balls({"rows": 0})
    with pytest.raises(UserError, match=r"ball did not start .*ZeroDivisionError.*; mend.*make ball"):
        balls({"rows": 1, "fail_in": "make", "failure": "raise"})
    with pytest.raises(UserError, match="No module named 'nowhere'"):
        balls({}, factory="nowhere:make")
    with pytest.raises(UserError, match="exit code 7"):
        balls({"rows": 1, "fail_in": "make", "failure": "exit"})
    with pytest.raises(UserError, match="gave no answer within 1 s"):
        balls({"rows": 1, "fail_in": "make", "failure": "sleep"}, start_seconds=1.0)
    monkeypatch.setattr(protocol, "VERSION", -1)
    with pytest.raises(UserError, match="speak version -1 of the simulator protocol"):
        balls({"rows": 1})


def test_no_process_is_left_however_the_caller_ends(tmp_path):
    env = balls({"rows": 1, "marker": str(tmp_path / "closed")})
    pid = env.provenance["pid"]
    env.close()
    assert (tmp_path / "closed").read_text() == "closed"
    assert not Path(f"/proc/{pid}").exists()


@pytest.mark.parametrize("busy", [False, True])
def test_a_process_leaves_when_its_caller_is_killed(busy, tmp_path):
    code = f"""
import sys, numpy as np
from pathlib import Path
from sim.remote.client import RemoteEnv
env = RemoteEnv(name="ball", python=Path(sys.executable), factory="tests.sim.ball:make",
                configs=[{{"rows": 1, "fail_seed": 2, "failure": "sleep"}}])
Path("pid").write_text(str(env.provenance["pid"]))
env.reset(seed=[2], options={{"reset_mask": np.ones(1, bool)}})
while {busy}:
    env.step(np.zeros((1, 2), np.float32))
sys.stdin.read()
"""
    caller = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdin=subprocess.PIPE,
                              env={**os.environ, "PYTHONPATH": str(ROOT)})
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert caller.poll() is None
        time.sleep(0.05)
    time.sleep(1.0)
    pid = int((tmp_path / "pid").read_text())
    assert Path(f"/proc/{pid}").exists()
    caller.kill()
    caller.wait()
    give_up = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists() and time.monotonic() < give_up:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()


@given(st.data())
@settings(max_examples=15)
def test_a_restored_row_goes_on_as_it_did(data):
    env = _shared()
    n = env.num_envs
    env.perturb(Perturbation(gain=data.draw(st.sampled_from([0.5, 1.0])), light=data.draw(st.tuples(*[CHANNEL] * 3))))
    env.reset(seed=[data.draw(st.integers(0, 2**62)) for _ in range(n)], options={"reset_mask": np.ones(n, bool)})
    actions = data.draw(arrays.arrays(np.float32, (STEPS, n, 2), elements=st.floats(-1, 1, width=32)))
    split, row = data.draw(st.integers(0, STEPS - 1)), data.draw(st.integers(0, n - 1))
    for action in actions[:split]:
        env.step(action)
    snapshot = env.snapshot(row)
    first = [env.step(action) for action in actions[split:]]
    env.perturb(Perturbation())
    env.reset(seed=[1] * n, options={"reset_mask": np.ones(n, bool)})
    env.restore(row, snapshot)
    for one, two in zip(first, (env.step(action) for action in actions[split:]), strict=True):
        for camera in env.spec.cameras:
            np.testing.assert_array_equal(one[0]["frames"][camera][row], two[0]["frames"][camera][row])
        assert [each[row] for each in one[1:4]] == [each[row] for each in two[1:4]]


def test_bytes_that_are_no_snapshot_are_refused(env):
    with pytest.raises(UserError, match="expected the bytes of a snapshot"):
        env.restore(0, b"none")


def test_a_randomised_episode_is_its_seed_s_in_any_row_process_and_order():
    check_env(lambda: balls({"rows": 2}, {"rows": 1}, randomise={"gain": [0.5, 1.5], "light": [0.5, 1.0]}))
    env = balls({"rows": 2}, {"rows": 1}, randomise={"light": [0.5, 1.0]})
    observation, _ = env.reset(seed=[4, 5, 4], options={"reset_mask": np.ones(3, bool)})
    side = observation["frames"]["side"].astype(float)
    assert (side[0] == side[2]).all()
    assert abs(side[0] - side[1]).max() > 0
    drawn = [draw(Perturbation(), {"light": (0.5, 1.0)}, seed).light for seed in (4, 5)]
    for row in (0, 1):
        np.testing.assert_allclose(side[row].max(axis=(0, 1)) / drawn[row], side[row].max() / max(drawn[row]), atol=4)
    assert env.provenance["randomise"] == {"light": (0.5, 1.0)}
    env.close()


@given(st.data())
@settings(max_examples=10)
def test_what_differs_is_only_what_was_changed_and_nominal_comes_back(data):
    env = _shared()
    n = env.num_envs
    seeds = [data.draw(st.integers(0, 2**62)) for _ in range(n)]
    light = data.draw(st.tuples(*[CHANNEL] * 3))
    env.perturb(Perturbation())
    usual = play(env, seeds)
    env.perturb(Perturbation(light=light))
    assert env.perturbation.light == light
    assert env.provenance["perturbation"] == Perturbation(light=light).changes
    for nominal, changed in zip(usual, play(env, seeds), strict=True):
        np.testing.assert_array_equal(nominal[0]["frames"]["above"], changed[0]["frames"]["above"])
        np.testing.assert_array_equal((nominal[0]["frames"]["side"] * np.array(light)).astype(np.uint8),
                                      changed[0]["frames"]["side"])
        np.testing.assert_array_equal(nominal[0]["proprio"], changed[0]["proprio"])
    env.perturb(Perturbation())
    for nominal, again in zip(usual, play(env, seeds), strict=True):
        np.testing.assert_array_equal(nominal[0]["frames"]["side"], again[0]["frames"]["side"])


@pytest.mark.parametrize("failure", ["kill", "sleep"])
def test_what_takes_the_place_of_a_lost_process_is_perturbed_alike(failure):
    env = balls({"rows": 2, "fail_seed": 2, "failure": failure}, call_seconds=1.0)
    env.perturb(Perturbation(light=(0.5, 0.5, 0.5)))
    before, _ = env.reset(seed=[2, 3], options={"reset_mask": np.ones(2, bool)})
    for _ in range(4):
        *_, truncated, _ = env.step(np.zeros((2, 2), np.float32))
    assert truncated.all()
    after, _ = env.reset(seed=[2, 3], options={"reset_mask": np.ones(2, bool)})
    np.testing.assert_array_equal(before["frames"]["side"], after["frames"]["side"])
    assert env.perturbation == Perturbation(light=(0.5, 0.5, 0.5))
    env.close()


@pytest.mark.parametrize(("settings", "message"), [
    ({"perturbation": {"zoom": 2.0}}, "zoom does not exist in env=ball; it has gain, light"),
    ({"perturbation": {"fog": 2.0}}, "fog is not known; it has gain, light"),
    ({"randomise": {"gain": [2, 1]}}, "randomise gain: expected"),
    ({"randomise": "wild"}, "randomise must be one of mild"),
])
def test_a_wrong_perturbation_is_one_line_and_leaves_no_process(settings, message):
    with pytest.raises(UserError, match=message) as error:
        balls(**settings)
    assert "\n" not in str(error.value)


def _shared(made=[]):  # noqa: B006
    if not made:
        made.append(balls({"rows": 2}, {"rows": 1}))
    return made[0]


def test_what_a_simulator_lacks_is_said():
    env = balls(factory="tests.sim.ball:make_silent")
    with pytest.raises(UserError, match="no scripted expert"):
        env.expert_action()
    with pytest.raises(UserError, match="cannot be put back"):
        env.snapshot(0)
    with pytest.raises(UserError, match="perturbation light does not exist in env=ball"):
        env.perturb(Perturbation(light=(0.5, 0.5, 0.5)))
    env.close()


@given(st.dictionaries(st.text(min_size=1), arrays.arrays(
    st.sampled_from([np.uint8, np.bool_, np.int64, np.float32, np.float64]), arrays.array_shapes(min_side=0)),
    max_size=4), st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text()))
def test_messages_arrive_as_they_were_sent(named, message):
    message.pop("arrays", None)
    ours, theirs = protocol.socket.socketpair()
    with ours, theirs:
        protocol.send(ours, message, named)
        received, got = protocol.receive(theirs, 1.0)
    assert received == message
    assert list(got) == list(named)
    for name, array in named.items():
        assert got[name].dtype == array.dtype
        np.testing.assert_array_equal(got[name], array)


def test_an_environment_is_named_found_or_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LIBERO_PYTHON", raising=False)
    with pytest.raises(UserError, match="type: make libero"):
        find_python("libero", "LIBERO_PYTHON")
    made = tmp_path / "wm-rl/libero"
    (made / "bin").mkdir(parents=True)
    (made / "ready").touch()
    assert find_python("libero", "LIBERO_PYTHON") == made / "bin/python"
    monkeypatch.setenv("LIBERO_PYTHON", sys.executable)
    assert find_python("libero", "LIBERO_PYTHON") == Path(sys.executable)
    monkeypatch.setenv("LIBERO_PYTHON", str(tmp_path / "none"))
    with pytest.raises(UserError, match="expected LIBERO_PYTHON to name a Python interpreter"):
        find_python("libero", "LIBERO_PYTHON")


def test_the_simulator_s_side_needs_numpy_alone():
    code = "import sys, sim.remote.serve; print(sorted(set(m.split('.')[0] for m in sys.modules) & {'data', 'torch', " \
           "'jaxtyping', 'gymnasium', 'zarr'}))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, text=True, capture_output=True)
    assert result.stdout.strip() == "[]"
