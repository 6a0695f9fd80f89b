"""``python main.py collect``: a policy or the scripted expert acts; a store or robot logs receive it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from data.budget import StoreConfig
from data.lerobot_writer import write_lerobot
from data.rollout import rollout
from data.store import ReplayStore
from data.types import Policy, Success, Trajectory, UserError
from sim.expert import ExpertConfig, ScriptedExpert
from sim.vector import VectorEnv
from wm_rl.journal import Journal
from wm_rl.policy import TinyVLA, check_compatible
from wm_rl.seeding import training_episode


def collect(
    *,
    seed: int,
    env: Callable[[], VectorEnv],
    expert: ExpertConfig,
    actor: str,
    episodes: int,
    sample: bool,
    storage: StoreConfig,
    store: str | None,
    lerobot: str | None,
    rosbag: str | None,
    format: str,
) -> int:
    """Record ``episodes``, dealt over the tasks. Collecting again with another ``seed`` adds other episodes.

    Raises:
        UserError: not exactly one destination, a policy that is not there, or one that does not fit the environment.
    """
    if sum(each is not None for each in (store, lerobot, rosbag)) != 1:
        raise UserError("collect needs one destination: type store=<folder>, lerobot=<folder> or rosbag=<folder>")
    if episodes < 1:
        raise UserError(f"episodes must be at least 1, got {episodes}")
    learned = None if actor == "expert" else TinyVLA.load(Path(actor))
    journal = Journal(Path.cwd(), [], enabled=True)
    world = env()
    try:
        policy: Policy
        if learned is None:
            policy = ScriptedExpert(world, expert)
        else:
            check_compatible(learned, spec=world.spec, statistics=world.statistics, what="environment")
            policy = learned
        seeds: list[list[int]] = [[] for _ in range(world.num_envs)]
        for i in range(episodes):
            seeds[i % world.num_envs].append(training_episode(seed, "collect", actor, i))
        replay = None if store is None else _open_or_create(Path(store), world, storage)
        recorded: list[Trajectory] = []
        with journal.progress("collect", episodes) as bar:
            for trajectory in rollout(world, policy, seeds, sample=sample):
                recorded.append(trajectory)
                if replay is not None and (len(recorded) % world.num_envs == 0 or len(recorded) == episodes):
                    replay.append(recorded[-((len(recorded) - 1) % world.num_envs + 1):])  # so a crash loses few
                bar.advance()
        if replay is not None:
            replay.close()
        if lerobot is not None:
            write_lerobot(Path(lerobot), recorded, spec=world.spec, statistics=world.statistics,
                          fps=world.spec.control_hz, version=format)
        if rosbag is not None:
            from data.logs.rosbag_writer import write_rosbags  # late: the ROS message types take a second to load

            write_rosbags(Path(rosbag), recorded, spec=world.spec, statistics=world.statistics)
    finally:
        world.close()
    solved = sum(t.success is Success.YES for t in recorded)
    journal.say(f"{len(recorded)} episodes, {sum(map(len, recorded))} control steps, {solved} successful "
                f"→ {store or lerobot or rosbag}")
    return 0


def _open_or_create(path: Path, env: VectorEnv, storage: StoreConfig) -> ReplayStore:
    if not path.exists():
        return ReplayStore.create(path, spec=env.spec, statistics=env.statistics, embodiment=env.embodiment,
                                  config=storage)
    store = ReplayStore.open(path, storage)
    if store.spec != env.spec:
        raise UserError(f"{path} holds episodes of another robot or camera than this environment; "
                        "give another folder: store=<folder>")
    store.statistics.check_same(env.statistics, mine=f"the replay store {path}", theirs="the environment")
    return store
