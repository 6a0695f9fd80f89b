"""The end of a training run: judge what it made, and say on one page what it was made from."""

from __future__ import annotations

import json
import time
from typing import Any

from omegaconf import OmegaConf

from data.store import ReplayStore
from data.types import Source
from sim.report import Curve, FilmStrip, ReportData, SourceRow, StalenessRow, write_report
from wm_rl.evaluation import EvaluationConfig, Judgement, judge, kept_episodes, write_videos
from wm_rl.loop import Loop
from wm_rl.policy import TinyVLA
from wm_rl.staleness import BUCKETS, LAG_EDGES, NOT_OURS
from world_model.learner import WorldModelLearner

STRIP_STEPS = 12
"""Control steps of a film strip: longer than imagination goes, so that its limits show."""


def judge_run(loop: Loop, config: EvaluationConfig) -> None:
    """Judge the policy against its warm start on held-out trials; write ``summary.json``, videos, ``report.html``."""
    begun = time.perf_counter()
    env = loop.make_env()
    try:
        judgement = judge(env, TinyVLA.load(loop.folder / "policy"), TinyVLA.load(loop.folder / "warm_start"), config,
                          loop.journal)
        held_out = _held_out_store(loop, env.spec, env.statistics, env.embodiment, judgement)
    finally:
        env.close()
    quality: dict[str, float] = {}
    strips: list[FilmStrip] = []
    if loop.world_model is not None:
        quality = loop.world_model.evaluate(
            held_out, imagination=loop.imagination_config, episodes=range(len(held_out)))
        strips = [_strip(loop.world_model, held_out, i) for i in range(len(held_out))]
    videos = write_videos(loop.folder / "videos", judgement)
    seconds = {**loop.progress["seconds"], "evaluate": time.perf_counter() - begun}

    history = [row for row in loop.journal.read() if row["kind"] == "train"]
    store = loop.store()
    sources = _sources(store, history, stand_in=loop.config.logs is None)
    summary = {**judgement.summary(), "seed": loop.seed, "gradient_share": _shares(history),
               "world_model": quality, "seconds": seconds, "store": store.summary(),
               "real_data": "robot stand-in" if loop.config.logs is None else loop.config.logs}
    (loop.folder / "summary.json").write_text(json.dumps(summary, indent=2, default=str))
    saved = loop.folder / ".hydra" / "config.yaml"
    write_report(loop.folder / "report.html", ReportData(
        title=f"wm-rl training run, seed {loop.seed}", verdict=judgement.verdict(), passed=judgement.better,
        success=judgement.rows(), sources=sources, staleness=_staleness(history),
        curves=[*_curves(loop.journal.read()), *_usage(history)],
        strips=strips, videos=videos, stage_seconds=seconds, notes=_notes(loop, quality, history),
        config=OmegaConf.to_yaml(OmegaConf.load(saved)) if saved.is_file() else ""))
    loop.journal.say(f"\n[bold]{judgement.verdict()}[/bold]")
    loop.journal.say(f"report: {loop.folder / 'report.html'}")


def _held_out_store(loop: Loop, spec: Any, statistics: Any, embodiment: str, judgement: Judgement) -> ReplayStore:
    """The candidate's held-out episodes, in a store of their own: the world model has not seen them."""
    path = loop.folder / "evaluation.zarr"
    exists = (path / "zarr.json").is_file()
    store = ReplayStore.open(path) if exists else ReplayStore.create(
        path, spec=spec, statistics=statistics, embodiment=embodiment)
    store.rollback({})
    store.append(kept_episodes(judgement))
    store.close()
    return store


def _strip(model: WorldModelLearner, store: ReplayStore, episode: int) -> FilmStrip:
    length = int(store.episodes.length[episode])
    start = max(0, length - STRIP_STEPS)
    real, imagined = model.film_strip(store, episode, start, STRIP_STEPS)
    task, outcome = store.episodes.task[episode], store.episodes.success[episode]
    return FilmStrip(title=f"{task}, success: {outcome}, control steps {start}-{start + len(real) - 1}",
                     real=real, imagined=imagined)


def _shares(history: list[dict[str, Any]]) -> dict[str, float]:
    """Each source's share of the absolute policy gradient, averaged over the run; 0 for one never drawn."""
    return {source.value: sum(row.get(f"gradient_share/{source}", 0.0) for row in history) / max(len(history), 1)
            for source in Source}


def _sources(store: ReplayStore, history: list[dict[str, Any]], *, stand_in: bool) -> list[SourceRow]:
    rows, table, shares = [], store.episodes, _shares(history)
    for source in Source:
        mine = table.source == source.value
        if not mine.any():
            continue
        known = mine & (table.success != "unknown")
        name = "real (robot stand-in)" if source is Source.REAL and stand_in else source.value
        rows.append(SourceRow(
            source=name, episodes=int(mine.sum()), steps=int(table.length[mine].sum()),
            success_rate=float((table.success[known] == "yes").mean()) if known.any() else None,
            gradient_share=shares[source.value], behaviour=", ".join(sorted(set(table.behaviour[mine].tolist())))))
    return rows


def _staleness(history: list[dict[str, Any]]) -> list[StalenessRow]:
    """Token-weighted means over the run."""
    tokens = {bucket: sum(row.get(f"staleness/{bucket}/tokens", 0.0) for row in history) for bucket in BUCKETS}
    total = sum(tokens.values())

    def mean(bucket: str, name: str) -> float:
        weighted = sum(row.get(f"staleness/{bucket}/{name}", 0.0) * row.get(f"staleness/{bucket}/tokens", 0.0)
                       for row in history)
        return weighted / tokens[bucket]

    labels = {NOT_OURS: "not ours (cloned log-probs)", f"lag_{LAG_EDGES[-1]}_up": f"{LAG_EDGES[-1]} and more"}
    return [StalenessRow(lag=labels.get(bucket, bucket.removeprefix("lag_").replace("_", "-")),
                         share=tokens[bucket] / total, mean_abs_log_ratio=mean(bucket, "abs_log_ratio"),
                         effective_sample_size=mean(bucket, "effective_sample_share"),
                         weight_above=mean(bucket, "utilisation")) for bucket in BUCKETS if tokens[bucket]]


def _usage(history: list[dict[str, Any]]) -> list[Curve]:
    """Utilisation against lag, over the run: the objective's own, and what others would have used of the same data."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for bucket in BUCKETS[:-1]:
        rows = [row for row in history if row.get(f"staleness/{bucket}/tokens")]
        tokens = sum(row[f"staleness/{bucket}/tokens"] for row in rows)
        if not tokens:
            continue

        def mean(name: str, rows: list[dict[str, Any]] = rows, bucket: str = bucket, tokens: float = tokens) -> float:
            return sum(row[name] * row[f"staleness/{bucket}/tokens"] for row in rows) / tokens

        lag = mean(f"staleness/{bucket}/lag")
        names = {"own": f"staleness/{bucket}/utilisation"} | {
            name: f"counterfactual/{name}/{bucket}/utilisation" for name in ("ppo_0.2", "sapo", "truncated_is")}
        for label, name in names.items():
            lines.setdefault(label, []).append((lag, mean(name)))
    if not lines:
        return []
    return [Curve(title="utilisation against lag", x_label="lag, in updates", lines={
        label: ([x for x, _ in points], [y for _, y in points]) for label, points in lines.items()})]


def _curves(rows: list[dict[str, Any]]) -> list[Curve]:
    """Training curves, smoothed only by being what they are: one point per iteration."""
    def line(kind: str, name: str) -> tuple[list[float], list[float]]:
        points = [(row["step"], row[name]) for row in rows if row["kind"] == kind and name in row]
        return [x for x, _ in points], [y for _, y in points]

    plans = [("success on training goals, sampled", "iteration", "train",
              {"simulation": "collected_success", "imagination": "imagined_success"}),
             ("effective sample share", "iteration", "train",
              {source.value: f"staleness/{source}/effective_sample_share" for source in Source}),
             ("gradient share", "iteration", "train",
              {source.value: f"gradient_share/{source}" for source in Source}),
             ("imagination audited, dB", "iteration", "train",
              {"imagined": "audit/psnr", "last frame copied": "audit/psnr_copy"}),
             ("imagined over recorded successes", "iteration", "train", {"ratio": "imagined_ratio"}),
             ("per action token", "iteration", "train",
              {"entropy": "entropy", "KL": "kl_to_warm_start"}),
             ("value loss", "iteration", "train", {"value loss": "value_loss"}),
             ("cloning", "step", "clone", {"accuracy": "accuracy"})]
    curves = []
    for title, x_label, kind, names in plans:
        lines = {label: line(kind, name) for label, name in names.items()}
        shown = {label: points for label, points in lines.items() if points[0]}
        if shown:
            curves.append(Curve(title=title, x_label=x_label, lines=shown))
    return curves


def _notes(loop: Loop, quality: dict[str, float], history: list[dict[str, Any]]) -> list[str]:
    notes = []
    if loop.uses_logs and loop.config.logs is None:
        notes.append("'real' data was recorded on the robot stand-in: a simulator with other dynamics, camera, light "
                     "and latency. No robot took part.")
    if "psnr_model_8" in quality:
        notes.append(
            f"World model on the held-out episodes of the videos, 8 steps ahead with the true actions: "
            f"{quality['psnr_model_8']:.1f} dB, against {quality['psnr_copy_8']:.1f} for copying the last frame and "
            f"{quality['psnr_shuffled_8']:.1f} with shuffled actions. summary.json has the rest.")
    audits = [row for row in history if "audit/psnr" in row]
    if audits:
        def total(name: str) -> float:
            return sum(row[f"audit/{name}"] for row in audits)

        paused = sum(row.get("imagination_paused", 0.0) for row in history)
        notes.append(
            f"Imagined data gave {_shares(history)['imagined']:.1%} of the gradient. Held against newly collected "
            f"episodes ({total('windows'):.0f} windows, same actions, unseen by the model), imagination claimed "
            f"{total('imagined_successes'):.0f} successes where {total('recorded_successes'):.0f} were recorded, and "
            f"its last frames had {total('psnr') / len(audits):.1f} dB against {total('psnr_copy') / len(audits):.1f} "
            f"for copying. It was paused in {paused:.0f} of {len(history)} iterations.")
    return notes
