"""What a run says: a rich progress line on the terminal, scalars to TensorBoard (or CSV, or W&B), and one JSONL file.

``metrics.jsonl`` in the run folder is the record that reports are made from; loggers are for watching.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Logger(Protocol):
    """What a journal needs of a logger. Those of Fabric have it; their import takes seconds, so it is not done here."""

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        """Scalars by name."""
        ...


class Journal:
    """One per run. ``enabled=False`` on ranks other than the first: everything is then silent."""

    def __init__(self, folder: Path, loggers: Sequence[Logger], *, enabled: bool) -> None:
        """``folder`` receives ``metrics.jsonl``."""
        self.path, self.loggers, self.enabled = folder / "metrics.jsonl", loggers, enabled
        self.console = Console(quiet=not enabled)
        self.live: Mapping[str, Any] = {}
        """What a runtime says of itself between two rows (``wm_rl.status``)."""
        self._shown: Progress | None = None

    def say(self, text: str) -> None:
        """One line for the person at the terminal (rich markup)."""
        self.console.print(text, highlight=False)

    def record(self, kind: str, step: int, metrics: Mapping[str, float]) -> None:
        """Append ``{"kind", "step", …}`` to the file, and show the scalars as ``kind/name``."""
        if not self.enabled:
            return
        with self.path.open("a") as file:
            file.write(json.dumps({"kind": kind, "step": step, **metrics}) + "\n")
        for logger in self.loggers:
            logger.log_metrics({f"{kind}/{name}": value for name, value in metrics.items()}, step)

    def show(self, name: str, step: int, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Give a picture to the loggers that take some (TensorBoard)."""
        for logger in self.loggers if self.enabled else ():
            add_image = getattr(getattr(logger, "experiment", None), "add_image", None)
            if add_image is not None:
                add_image(name, picture, step, dataformats="HWC")

    def rewind(self, steps: dict[str, int]) -> None:
        """After a resume: drop what was recorded at or after ``steps[kind]``, so that nothing is told twice."""
        if not self.enabled or not self.path.is_file():
            return
        kept = [row for row in self.read() if row["step"] < steps.get(row["kind"], 0)]
        partial = self.path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        partial.rename(self.path)

    def read(self) -> list[dict[str, Any]]:
        """Every whole row; a line cut off by a crash is passed over."""
        if not self.path.is_file():
            return []
        rows = []
        for line in self.path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                continue
        return rows

    def doing(self) -> dict[str, Any]:
        """Title and amounts of the newest bar that is being shown; empty where there is none."""
        if self._shown is None or not self._shown.live.is_started or not self._shown.tasks:
            return {}
        task = self._shown.tasks[-1]
        return {"title": task.description, "done": task.completed, "total": task.total}

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Bar]:
        """A progress bar on a terminal; elsewhere one line when it ends."""
        with self._bars() as progress:
            task = progress.add_task(title, total=total, note="")
            yield Bar(progress, task)

    @contextmanager
    def stages(self) -> Iterator[Callable[[str, int, int], None]]:
        """Progress of work that comes in stages, told by ``(stage, done, total)``: a bar for each."""
        with self._bars() as progress:
            tasks: dict[str, Any] = {}

            def watch(stage: str, done: int, total: int) -> None:
                if stage not in tasks:
                    tasks[stage] = progress.add_task(stage, total=total, note="")
                progress.update(tasks[stage], completed=done, total=total)

            yield watch

    def _bars(self) -> Progress:
        self._shown = Progress(SpinnerColumn(), TextColumn("{task.description:<12}"), BarColumn(bar_width=24),
                               MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.fields[note]}"),
                               console=self.console)
        return self._shown


class Bar:
    """Handle on one progress line."""

    def __init__(self, progress: Progress, task: Any) -> None:
        self._progress, self._task = progress, task

    def advance(self, amount: int = 1, note: str | None = None) -> None:
        """Move on; ``note`` stands at the end of the line."""
        self._progress.update(self._task, advance=amount)
        if note is not None:
            self._progress.update(self._task, note=note)
