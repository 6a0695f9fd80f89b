"""``python main.py store``: see what a replay store holds, check it, export it, compress it, label outcomes."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
from rich.console import Console
from rich.filesize import decimal
from rich.progress import Progress
from rich.table import Table

from data.cold import compact
from data.lerobot_writer import write_lerobot
from data.outcome_labels import revoke_labels
from data.sampler import check_sources
from data.store import ReplayStore
from data.types import Trajectory, UserError
from data.verify import verify

ACTIONS = ("info", "verify", "export", "compact", "label_success", "revoke_labels")


def store_tool(
    *,
    action: str,
    store: str,
    budget_bytes: int | None,
    repair: bool,
    to: str | None,
    source: str | None,
    task: str | None,
    codec: str,
    quality: int,
    keep_newest: int,
    model: str | None,
    success_threshold: float,
    success_frames: int,
) -> int:
    """Do one ``action``; every other setting belongs to the action that ``configs/store.yaml`` names beside it.

    Returns 1 when ``verify`` leaves damage in the store, else 0. Raises ``UserError`` for bad input.
    """
    path, console = Path(store), Console()
    if action == "info":
        _info(ReplayStore.open(path), budget_bytes, console)
    elif action == "verify":
        report = verify(path, repair=repair)
        for line in report.lines():
            print(line)
        if report.remaining and not repair:
            print(f"type python main.py store action=verify repair=true store={path}")
        return 1 if report.remaining else 0
    elif action == "export":
        _export(ReplayStore.open(path), to, source, task)
    elif action == "compact":
        _compact(path, codec, quality, keep_newest, console)
    elif action == "label_success":
        _label_success(ReplayStore.open(path), model, success_threshold, success_frames)
    elif action == "revoke_labels":
        files = revoke_labels(ReplayStore.open(path).path)
        print(f"the labels of {files} segments were taken back; they lie in {path / 'superseded'}")
    else:
        close = difflib.get_close_matches(action, ACTIONS, n=1)
        raise UserError(f"action: expected {', '.join(ACTIONS[:-1])} or {ACTIONS[-1]}, got {action!r}; type action="
                        f"{close[0] if close else 'info'}")
    return 0


def _info(store: ReplayStore, budget_bytes: int | None, console: Console) -> None:
    """Episodes by source, task and success, then segments and bytes."""
    episodes = store.episodes
    sizes = np.array([sum(file.stat().st_size for file in segment.path.rglob("*") if file.is_file()) / segment.rows
                      if segment.rows else 0 for segment in store.segments])
    table = Table(title=f"{store.path}: {store.embodiment}", title_justify="left")
    for name in ("source", "task", "success"):
        table.add_column(name)
    for name in ("policy versions", "episodes", "steps", "bytes"):
        table.add_column(name, justify="right")
    names = ("source", "task", "success")
    groups, group_of = np.unique(np.stack([episodes.code(name) for name in names], 1), axis=0, return_inverse=True)
    rows = []
    for number in range(len(groups)):
        mine = np.flatnonzero(group_of.reshape(-1) == number)
        versions, steps = episodes.policy_version[mine], episodes.length[mine]
        span = f"{versions.min()}" if versions.min() == versions.max() else f"{versions.min()} to {versions.max()}"
        size = float((sizes[episodes.place[mine]] * (steps + 1)).sum())
        rows.append((*(episodes.words(name, mine[:1])[0] for name in names), span, f"{len(mine)}", f"{steps.sum()}",
                     decimal(int(size))))
    for row in sorted(rows):
        table.add_row(*row)
    console.print(table)
    kinds = Counter(segment.tier if segment.sealed else "open" for segment in store.segments)
    used = store.used_bytes()
    share = "no budget was given" if budget_bytes is None else f"{used / budget_bytes:.0%} of {decimal(budget_bytes)}"
    console.print(f"{len(store)} episodes, {episodes.length.sum()} steps in {len(store.segments)} segments: "
                  f"{kinds['open']} open, {kinds['hot']} sealed, {kinds['cold']} cold", highlight=False)
    console.print(f"{decimal(used)} on the disk, open segments counted as if they were full: {share}", highlight=False)


def _export(store: ReplayStore, to: str | None, source: str | None, task: str | None) -> None:
    if to is None:
        raise UserError("export needs a destination: type to=<folder>")
    episodes = store.episodes
    chosen = np.ones(len(episodes), bool)
    if source is not None:
        check_sources("source", {source: None})
        chosen &= episodes.source == source
    if task is not None:
        known = sorted(set(episodes.task))
        if task not in known:
            raise UserError(f"task: expected one of {', '.join(known)}, got {task!r}; type task=<one of these>")
        chosen &= episodes.task == task
    if not chosen.any():
        raise UserError(f"nothing to export: {store.path} has {len(store)} episodes, none of source={source} and task="
                        f"{task}; type python main.py store action=info store={store.path}")
    picked = _Chosen(store, np.flatnonzero(chosen).tolist())
    write_lerobot(to, picked, spec=store.spec, statistics=store.statistics, fps=store.spec.control_hz, version="v3.0")
    print(f"{len(picked)} episodes, {episodes.length[chosen].sum()} control steps → {to}")


def _label_success(store: ReplayStore, folder: str | None, threshold: float, frames: int) -> None:
    from world_model.label import label_outcomes  # late: torch and diffusers take seconds to load
    from world_model.learner import WorldModelLearner

    if folder is None:
        raise UserError("label_success needs a success model: type model=<folder of a train_world_model run>")
    if not 0 < threshold < 1 or frames < 1:
        raise UserError(f"expected success_threshold in (0, 1) and success_frames of at least 1, got {threshold} and "
                        f"{frames}")
    nested = Path(folder) / "world_model"  # in the folder of a run
    model = WorldModelLearner.from_pretrained(nested if nested.is_dir() else folder).success_model()
    for line in label_outcomes(store, model, threshold=threshold, success_frames=frames).lines():
        print(line)


class _Chosen(Sequence[Trajectory]):
    """Episodes of a store, read one at a time whenever they are looked at."""

    def __init__(self, store: ReplayStore, indices: list[int]) -> None:
        self._store, self._indices = store, indices

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Trajectory]: ...

    def __getitem__(self, index: int | slice) -> Trajectory | Sequence[Trajectory]:
        if isinstance(index, slice):
            return _Chosen(self._store, self._indices[index])
        return self._store.trajectory(self._indices[index])


def _compact(path: Path, codec: str, quality: int, keep_newest: int, console: Console) -> None:
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("compact", total=None)
        report = compact(path, codec=codec, quality=quality, keep_newest=keep_newest,
                         progress=lambda done, total: progress.update(bar, completed=done, total=total))
    for done in report.done:
        loss = "" if done.psnr is None else f", {done.psnr:.1f} dB"
        print(f"segment {done.segment}: {decimal(done.before)} → {decimal(done.after)}{loss}")
    for name in report.skipped:
        print(f"segment {name} was left alone: it is damaged or was evicted; type python main.py store action=verify "
              f"store={path}")
    before, after = (sum(getattr(done, name) for done in report.done) for name in ("before", "after"))
    print(f"{len(report.done)} segments are cold now: {decimal(before)} → {decimal(after)}" if report.done else
          f"nothing to compress: no source has more than keep_newest={keep_newest} sealed segments that are hot")
