"""Every command in the README and docs runs, with less of everything, in the order in which a reader meets them."""

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from data.types import UserError
from sim.remote.environments import find_python

ROOT = Path(__file__).parents[2]
PAGES = ["collect.md", "ingest.md", "pretrain.md", "world-model.md", "train.md", "evaluate.md",
         "metaworld.md", "objective.md", "replay-store.md", "scaling.md", "benchmarks.md", "isaac.md",
         "simulators.md"]
ENV = ["env.tasks=[drawer-close-v3,door-close-v3]", "env.num_envs=4", "env.workers=1",
       "env.config.max_episode_steps=14"]
LOOP = ["loop.iterations=1", "loop.updates_per_iteration=1", "cloning.steps=3", "world_model.steps=2",
        "evaluation.trials_per_task=1", "env.config.max_episode_steps=14", "stand_in.config.max_episode_steps=14",
        "env.workers=1", "stand_in.workers=1"]
SMALL = {
    "collect": [*ENV, "episodes=4"], "ingest": [], "pretrain": ["cloning.steps=3"],
    "train_world_model": ["world_model.steps=3", "held_out=0.3", "world_model.success_windows=4"], "train": LOOP,
    "evaluate_world_model": ["held_out=0.3", "starts=4", "trials_per_task=1", "speed=false",
                             "env.tasks=[drawer-close-v3,door-close-v3]", "env.config.max_episode_steps=14"],
    "evaluate": [*ENV, "evaluation.trials_per_task=1"], "store": [], "status": [],
    "benchmark": ["train_experiment=smoke", "seeds=[3]",
                  f"controls=[{{_target_: wm_rl.commands.benchmark.Control, name: tiny, overrides: {LOOP}}}]"],
}
STALE = ["tasks=[reach-v3]", "seeds=[0]", "experiment.max_episode_steps=12", "experiment.last=1"]
ELSEWHERE = {"env=isaac": ("isaac", "ISAACLAB_PYTHON"), "experiment=isaac_push": ("isaac", "ISAACLAB_PYTHON"),
             "suite=simulators_isaac": ("isaac", "ISAACLAB_PYTHON"), "env=libero": ("libero", "LIBERO_PYTHON"),
             "suite=simulators": ("libero", "LIBERO_PYTHON")}
"""Words of commands that need an environment of their own, which may not be there."""
WORLD_MODELS = [
    "seeds=[0]", "env.tasks=[drawer-close-v3]", "unseen_env.tasks=[reach-v3]", "policies=[2]", "cloning.steps=2",
    "env.config.max_episode_steps=14", "unseen_env.config.max_episode_steps=14", "starts=4", "trials_per_task=1",
    "compiled=false",
    *(f"variants.{name}.{what}" for name in ("self_rollout", "plain_regressor")
      for what in ("steps=2", "success_windows=4"))]
SUITES = {  # the first that a command has
    "experiment=isaac_push": ["loop.iterations=1", "loop.updates_per_iteration=1", "loop.episodes_per_iteration=2",
                              "loop.prefill_episodes=2", "loop.demonstrations_per_task=2", "cloning.steps=3",
                              "env.config.max_episode_steps=8", "env.num_envs=2", "evaluation.trials_per_task=1"],
    "store=runs/libero.zarr": ["env.config.max_episode_steps=8", "env.num_envs=1", "episodes=1"],
    "env=libero": [*LOOP[:5], "env.config.max_episode_steps=8", "env.num_envs=1"],
    "suite=simulators": ["rounds=1", "steps=2", "simulators.libero.num_envs=1"],
    "suite=simulators_isaac": ["rounds=1", "steps=2", "simulators.isaac.num_envs=1"],
    "env=isaac": ["env.config.max_episode_steps=8", "env.num_envs=2"],
    **{f"regime={regime}": [*STALE, *(f"rounds.{name}.regime.{what}=2" for name in rounds
                                      for what in ("iterations", "updates_per_iteration"))]
       for regime, rounds in {"quick": ["stale", "fresh"], "very_stale": ["very_stale"], "paper": ["paper"]}.items()},
    "suite=gridworld": ["random_pairs=2"],
    "suite=world_model": [*WORLD_MODELS, *(f"recordings.{i}.episodes=8" for i in range(4))],
    "suite=world_model_with_policies": [*WORLD_MODELS, *(f"recordings.{i}.episodes=4" for i in range(10)),
                                        *(f"recordings.{i}.policy=2" for i in (2, 3, 4, 6, 7, 8))],
    "suite=imagination": [
        "seeds=[0]", "tasks=[drawer-close-v3]", "warm_start=2", "experiment.trials=1",
        "experiment.updates_per_iteration=1", "env.config.max_episode_steps=14",
        *(f"arms.{name}.{what}" for name in ("with_imagination", "same_data", "without")
          for what in ("iterations=1", "episodes=2")),
        "arms.with_imagination.branches=2", "arms.with_imagination.refit_steps=2",
        "experiment.refit.success_windows=4"],
    "suite=logs": [
        "seeds=[0]", "log_episodes=4", "cloning.steps=2", "experiment.iterations=1", "experiment.episodes=2",
        "experiment.updates=1", "experiment.trials_per_task=1", "env.tasks=[drawer-close-v3,coffee-button-v3]",
        "env.config.max_episode_steps=30", "stand_in.config.max_episode_steps=50"],
    "suite=replay": ["rounds=3", "megabytes=4", "seconds_per_round=0.01", "index_episodes=4000"],
    "suite=experts": ["env.tasks=[reach-v3]", "env.num_envs=1", "trials_per_task=2"],
    "suite=ingest": ["episodes=2", "seconds=1", "rounds=1", "longer=2"],
    "suite=crash": ["trials=2", "faults=false"], "suite=endurance": ["hours=0.05"],
}

pytestmark = [pytest.mark.sim, pytest.mark.slow, pytest.mark.xdist_group("docs")]


def commands(page):
    """Lines of its bash blocks."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    return [line for block in blocks for line in block.splitlines() if line]


def _missing(name, variable):
    try:
        find_python(name, variable)
    except UserError as error:
        print(f"not run: {error}")
        return True
    return False


def test_no_page_is_forgotten():
    with_commands = {path.name for path in (ROOT / "docs").glob("*.md") if commands(path)}
    assert with_commands == set(PAGES)


def test_the_commands_of_the_docs_run(tmp_path):
    lines = [line for page in PAGES for line in commands(ROOT / "docs" / page)]
    lines += [line for line in commands(ROOT / "README.md") if line.startswith("python ")]
    ran = set()
    for line in lines:
        program, script, command, *words = shlex.split(line)
        if "env=pusht" in words and importlib.util.find_spec("gym_pusht") is None:
            continue
        assert (program, script) == ("python", "main.py"), line
        if any(_missing(*ELSEWHERE[word]) for word in words if word in ELSEWHERE):
            continue
        small = [] if "--help" in words or any(word.startswith("resume=") for word in words) else next(
            (smaller for word, smaller in SUITES.items() if word in words), SMALL[command])
        kept = [word for word in words if word.split("=")[0] not in {s.split("=")[0] for s in small} - {"experiment"}]
        arguments = (command, *kept, *small)
        if arguments in ran:
            continue
        ran.add(arguments)
        result = subprocess.run([sys.executable, str(ROOT / "main.py"), *arguments], cwd=tmp_path, check=False,
                                text=True, capture_output=True, timeout=400,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    assert {command for command, *_ in ran} == set(SMALL)


def test_make_targets_of_the_readme_exist():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {word for line in commands(ROOT / "README.md") for word in re.findall(r"make (\w+)", line)}
    assert named == {"demo", "setup", "test", "check"}
    assert named <= targets
