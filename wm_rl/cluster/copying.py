"""The store on machines that it does not lie on: learners there read a copy on a disk of their own.

No file system is shared. A ``Librarian`` beside the store says what a copy lacks (``data.mirror``), a ``Copyist`` on
each other machine asks for it and writes it down; what they say travels through Ray's object store.
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

import ray

from data.mirror import Changes, Holding, Mirror, changes
from wm_rl.cluster.crew import Actor

_PAUSE = 0.1
"""Seconds between two questions of a copyist that lacks nothing."""


class Librarian(Actor):
    """Reads the store for those on other machines."""

    def __init__(self, store: Path) -> None:
        self._store = store

    def changes(self, held: Holding) -> Changes:
        """What a copy that has ``held`` lacks."""
        return changes(self._store, held)


class Copyist:
    """Keeps a copy, as long as it lives. Ends with whoever owns it, and a successor begins the copy anew."""

    def __init__(self, librarian: Any, folder: Path | None, name: str) -> None:
        """``folder``: where copies are kept here, None: with the machine's temporary files. ``name``: of this one."""
        kept = Path(tempfile.gettempdir()) if folder is None else folder
        self._librarian, self._folder = librarian, kept / f"wm_rl-copy-{name}"
        self._mirror = Mirror(self._folder / "replay.zarr")
        self._over = threading.Event()

    def catch_up(self) -> Path:
        """Copy all that there is by now. Where the copy lies."""
        while not self._take():
            pass
        return self._mirror.path

    def follow(self) -> None:
        """Copy what comes, until ``leave``."""
        while not self._over.is_set():
            if self._take():
                self._over.wait(_PAUSE)
        shutil.rmtree(self._folder, ignore_errors=True)

    def leave(self) -> None:
        """The copy is not needed any more: ``follow`` deletes it and returns."""
        self._over.set()

    def _take(self) -> bool:
        """Ask once, and a librarian that died again when it is back. True when nothing was left to be told."""
        news = ray.get(self._librarian.changes.options(max_task_retries=-1).remote(self._mirror.held))
        self._mirror.take(news)
        return news.whole


def copy_name(store: Path, number: int) -> str:
    """Tells the copies of different runs, and those of one run, apart; the same whenever the run is resumed."""
    return f"{hashlib.sha256(str(store).encode()).hexdigest()[:12]}-{number}"
