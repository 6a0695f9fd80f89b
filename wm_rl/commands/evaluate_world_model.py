"""``python main.py evaluate_world_model``: the honest protocol, over seeds of a model and beside its rivals.

1. PSNR, SSIM and motion-masked PSNR 1, 4, 8 and 16 steps ahead, against copying the last frame and against rivals.
2. The same with shuffled and with zero actions.
3. Success: AUROC, Brier, calibration on recorded and imagined frames, false and missed successes.
4. The model's own uncertainty against the size of the motion, as predictors of the error.
5. Rank correlation of imagined and simulated success over policies.
6. Imagined episodes of the last policy, their actions played in the simulator from where they begin: what came true.
7. Imagined frames per second against the simulator's, and FLOP/s against plain matrix products.
8. Each figure over the models given, one per training seed.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from data.store import ReplayStore
from data.types import UserError
from sim.figures import new_figure
from sim.vector import VectorEnv
from wm_rl.claims import check_claims
from wm_rl.journal import Journal
from wm_rl.policy import TinyVLA, check_compatible
from wm_rl.ranking import Simulated, imagine, rank_correlation, simulate
from world_model.config import ImaginationConfig
from world_model.evaluation import HORIZONS
from world_model.imagination import ImaginationEnv
from world_model.learner import WorldModelLearner
from world_model.pipeline import WorldModelPipeline
from world_model.speed import denoising_share, imagination_against

SPEED_STEPS = 16
RATES = ("rank_correlation", "denoising_share", "denoising_gflops", "product_gflops", "imagined_fps", "simulated_fps",
         "speed_ratio")
UNAVAILABLE = {"lpips": "unavailable: needs downloaded backbones", "fvd": "unavailable: needs downloaded backbones"}


def evaluate_world_model(
    *,
    folder: str,
    models: Sequence[str],
    rivals: Mapping[str, Sequence[str]],
    store: str,
    held_out: float,
    unseen: str | None,
    policies: Sequence[str],
    env: Callable[[], VectorEnv],
    trials_per_task: int,
    first_seed: int,
    starts: int,
    imagination: ImaginationConfig,
    speed: bool,
    compiled: bool,
    seed: int,
) -> int:
    """Write ``quality.json``, ``quality.png``, ``strips.png`` and, with policies, ``ranking.png`` to ``folder``.

    ``models`` are folders of ``train_world_model`` (one per training seed), ``rivals`` others to compare with, by name.
    The newest ``held_out`` share of ``store``'s episodes is measured on, and all of ``unseen``, whose tasks the models
    have not seen.

    Raises:
        UserError: no model, a model of other cameras or dimensions, a share that leaves nothing.
    """
    if not models:
        raise UserError("evaluate_world_model needs models: type models=[<folder of train_world_model>]")
    run = Path(folder)
    journal = Journal(run, [], enabled=True)
    replay = ReplayStore.open(store)
    episodes = range(len(replay) - max(1, round(len(replay) * held_out)), len(replay))
    others = ReplayStore.open(unseen) if unseen is not None else None
    named: dict[str, Sequence[str]] = {"model": models, **rivals}
    learners = {name: [_load(path, replay, others) for path in paths] for name, paths in named.items()}
    result: dict[str, Any] = {"unavailable": UNAVAILABLE, "models": dict(named), "store": store,
                              "episodes": len(episodes), "windows": starts}
    shared: dict[str, Any] = {"imagination": imagination, "starts": starts, "seed": seed}
    with journal.progress("measure", sum(map(len, learners.values()))) as bar:
        for name, each in learners.items():
            rows = []
            for learner in each:
                rows.append(learner.evaluate(replay, episodes=episodes, **shared))
                if others is not None:
                    quality = learner.evaluate(others, episodes=range(len(others)), **shared)
                    rows[-1] |= {f"unseen_{key}": value for key, value in quality.items()}
                bar.advance()
            result[name] = rows
    if policies or speed:
        _act(result, learners["model"], replay, [Path(each) for each in policies], env, run, journal,
             trials_per_task=trials_per_task, first_seed=first_seed, imagination=imagination, speed=speed,
             compiled=compiled)
    (run / "quality.json").write_text(json.dumps(result, indent=1))
    for table in tables(result):
        journal.console.print(table)
    draw_quality(result, run / "quality.png")
    draw_strips(learners["model"][0], replay, list(episodes), run / "strips.png")
    if "simulated" in result:
        draw_ranking(result, run / "ranking.png")
    journal.say(f"world model: {run / 'quality.json'}, pictures beside it")
    return 0


def tables(result: Mapping[str, Any]) -> list[Table]:
    """Means over training seeds, with the lowest and the highest."""
    made = []
    for prefix, title in (("", "held-out episodes"), ("unseen_", "unseen tasks")):
        horizons = [h for h in HORIZONS if f"{prefix}psnr_model_{h}" in result["model"][0]]
        if not horizons:
            continue
        table = Table(f"{title}: dB / SSIM", *(f"{h} steps" for h in horizons))
        for name in result["models"]:
            for what in ("model", "shuffled", "zero") if name == "model" else ("model",):
                label = {"model": name, "shuffled": "  shuffled actions", "zero": "  no actions"}[what]
                table.add_row(label, *(f"{spread(result[name], f'{prefix}psnr_{what}_{h}', '.2f')} / "
                                       f"{spread(result[name], f'{prefix}ssim_{what}_{h}', '.3f')}" for h in horizons))
        table.add_row("last frame copied", *(f"{spread(result['model'], f'{prefix}psnr_copy_{h}', '.2f')} / "
                                             f"{spread(result['model'], f'{prefix}ssim_copy_{h}', '.3f')}"
                                             for h in horizons))
        for label, what in (("moved pixels, dB", "psnr_moved_model"), ("  copied, dB", "psnr_moved_copy"),
                            ("uncertainty ranks errors", "error_rank_correlation"),
                            ("size of motion ranks errors", "motion_rank_correlation"),
                            ("proprio error, deviations", "proprio_model"), ("  copied", "proprio_copy")):
            table.add_row(label, *(spread(result["model"], f"{prefix}{what}_{h}", ".2f") for h in horizons))
        made.append(table)
    rest = Table("measure", "mean [lowest, highest] over training seeds")
    shown = [key for key in result["model"][0] if key.removeprefix("unseen_").startswith("success_")
             or key.removeprefix("compiled_") in RATES or key.startswith("claims_")]
    for key in shown:
        rest.add_row(key, spread(result["model"], key, ".3f"))
    return [*made, rest]


def spread(rows: Sequence[Mapping[str, float]], key: str, form: str) -> str:
    """``mean [lowest, highest]``; the mean alone of a single row."""
    values = [row[key] for row in rows if key in row]
    if not values:
        return "-"
    mean = format(float(np.mean(values)), form)
    return mean if len(values) == 1 else f"{mean} [{min(values):{form}}, {max(values):{form}}]"


def draw_quality(result: Mapping[str, Any], path: Path) -> None:
    """PSNR and SSIM over the horizon."""
    figure, axes = new_figure(9, 3.4, 2)
    for axis, measure in zip(axes, ("psnr", "ssim"), strict=True):
        for name in (name for name in result["models"]):
            horizons = [h for h in HORIZONS if f"{measure}_model_{h}" in result[name][0]]
            values = np.array([[row[f"{measure}_model_{h}"] for h in horizons] for row in result[name]])
            axis.plot(horizons, values.mean(0), marker="o", label=name)
            axis.fill_between(horizons, values.min(0), values.max(0), alpha=0.2)
        for what, label in (("copy", "last frame copied"), ("shuffled", "shuffled actions")):
            values = np.array([[row[f"{measure}_{what}_{h}"] for h in horizons] for row in result["model"]])
            axis.plot(horizons, values.mean(0), linestyle="--", label=label)
        axis.set_xlabel("control steps ahead")
        axis.set_title({"psnr": "PSNR, dB", "ssim": "SSIM"}[measure], fontsize=10)
    axes[0].legend(fontsize=8, frameon=False)
    figure.savefig(path)


def draw_strips(learner: WorldModelLearner, store: ReplayStore, episodes: Sequence[int], path: Path) -> None:
    """Recorded above imagined frames, the last 16 steps of one held-out episode of each task."""
    tasks = {str(store.episodes.task[e]): e for e in reversed(episodes)}
    figure, axes = new_figure(9, 1.75 * len(tasks), 1)
    figure.delaxes(axes)
    grid = figure.subplots(len(tasks), 1, squeeze=False)[:, 0]
    for axis, (task, episode) in zip(grid, sorted(tasks.items()), strict=True):
        start = max(0, int(store.episodes.length[episode]) - HORIZONS[-1])
        real, imagined = learner.film_strip(store, episode, start, HORIZONS[-1])
        chosen = np.linspace(0, len(real) - 1, min(9, len(real))).round().astype(int)
        axis.imshow(np.concatenate([np.concatenate(list(frames[chosen]), 1) for frames in (real, imagined)]))
        axis.set_title(f"{task}: recorded above imagined, steps {', '.join(map(str, chosen))}", fontsize=8)
        axis.axis("off")
    figure.savefig(path)


def draw_ranking(result: Mapping[str, Any], path: Path) -> None:
    """Imagined against simulated success, a point per policy and model."""
    figure, axis = new_figure(4.6, 4)
    for i, row in enumerate(result["imagined"]):
        axis.scatter([result["simulated"][name] for name in row], list(row.values()), s=18, label=f"model {i}")
    axis.plot([0, 1], [0, 1], linestyle="--", color="grey", linewidth=1)
    axis.set_xlabel("simulated success")
    axis.set_ylabel("imagined success")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path)


def _act(
    result: dict[str, Any], learners: Sequence[WorldModelLearner], replay: ReplayStore, policies: Sequence[Path],
    make_env: Callable[[], VectorEnv], run: Path, journal: Journal, *, trials_per_task: int, first_seed: int,
    imagination: ImaginationConfig, speed: bool, compiled: bool,
) -> None:
    """What needs the simulator: the ranking of policies, and its speed."""
    env = make_env()
    try:
        if env.spec != replay.spec:
            raise UserError(f"the environment has {env.spec}, the store {replay.spec}; give env.* as it was recorded")
        replay.statistics.check_same(env.statistics, mine=f"the replay store {replay.path}", theirs="the environment")
        if policies:
            loaded = {str(path): TinyVLA.load(path) for path in policies}
            for policy in loaded.values():
                check_compatible(policy, spec=env.spec, statistics=env.statistics, what="environment")
            with journal.progress("policies", 1 + len(learners)) as bar:
                simulated = simulate(env, loaded, trials_per_task=trials_per_task, first_seed=first_seed, folder=run)
                bar.advance()
                _rank(result, learners, simulated, loaded, env, imagination, bar)
    finally:
        env.close()
    if speed:
        env = make_env()  # its rows in this process, whose time is measured
        imagined = replace(imagination, horizon=HORIZONS[-1], inference_steps=learners[0].config.inference_steps)
        try:
            for row, learner in zip(result["model"], learners, strict=True):
                row |= _speed(learner, learner.pipeline(), replay, imagined, env)
                if compiled:
                    fast = copy.deepcopy(learner.pipeline())
                    fast.denoiser.compile_forward()
                    measured = _speed(learner, fast, replay, imagined, env)
                    row |= {f"compiled_{name}": value for name, value in measured.items()}
        finally:
            env.close()


def _speed(
    learner: WorldModelLearner, pipeline: WorldModelPipeline, replay: ReplayStore, config: ImaginationConfig,
    env: VectorEnv,
) -> dict[str, float]:
    rows = config.micro_batch
    dream = ImaginationEnv(replay, pipeline, learner.success_model(), config, num_envs=rows, version=learner.version)
    return denoising_share(pipeline, rows=rows) | imagination_against(dream, env, steps=SPEED_STEPS)


def _rank(
    result: dict[str, Any], learners: Sequence[WorldModelLearner], simulated: Simulated,
    policies: Mapping[str, TinyVLA], env: VectorEnv, imagination: ImaginationConfig, bar: Any,
) -> None:
    last = list(policies.values())[-1]
    result["simulated"], result["imagined"] = dict(simulated.success), []
    for row, learner in zip(result["model"], learners, strict=True):
        result["imagined"].append(imagine(
            learner, simulated, policies, horizon=env.max_episode_steps, imagination=imagination))
        row["rank_correlation"] = rank_correlation(simulated.success, result["imagined"][-1])
        row |= check_claims(env, learner, simulated.starts, last, imagination)
        bar.advance()


def _load(path: str, *stores: ReplayStore | None) -> WorldModelLearner:
    folder = Path(path)
    nested = folder / "world_model"
    learner = WorldModelLearner.from_pretrained(nested if nested.is_dir() else folder)
    for store in stores:
        if store is not None:
            learner.check_fits(store)
    return learner
