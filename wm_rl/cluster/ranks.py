"""The processes of one learner, as one: they meet, are asked the same, and when one is gone all begin again."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

from wm_rl.cluster.crew import Crew, Member


class Ranks:
    """A group of ``PolicyLearner``s. Collective operations cannot go on without one of them, nor with a new one."""

    def __init__(self, crew: Crew, members: Sequence[Member]) -> None:
        self._crew, self._members = crew, members
        self._folder = tempfile.TemporaryDirectory(prefix="wm_rl-ranks-")
        self._lives: list[int] | None = None
        """Restarts of each when they met; None before they ever did."""

    def together(self, begin: Callable[[], Any]) -> bool:
        """All are there and have met. Where they have not, see to it; ``begin()`` gives the state to begin with."""
        lives = [member.restarts for member in self._members]
        if lives == self._lives:
            return not self.busy("join")
        for member, before in zip(self._members, self._lives or (), strict=False):
            if member.restarts == before:
                self._crew.replace(member, "another rank is gone")
        if all(member.up for member in self._members):
            self._lives = lives
            meeting = Path(self._folder.name) / uuid4().hex
            state = begin()
            for rank, member in enumerate(self._members):
                self._crew.ask(member, "join", rank, len(self._members), meeting, self._crew.patience, state)
        return False

    def busy(self, method: str) -> bool:
        """One of them is not there, or has not answered that call yet."""
        return any(self._crew.busy(member, method) for member in self._members)

    def ask(self, method: str, *arguments: Any, then: Callable[[Any], None], returns: int = 1) -> Any:
        """Ask all; ``then(answer)`` follows the first rank's, whose second result the returned reference is to.

        Nothing is asked while one is gone: the others could not answer, and are about to begin again.
        """
        if not all(member.up for member in self._members):
            return None
        first, *others = self._members
        rest = self._crew.ask(first, method, *arguments, then=then, returns=returns)
        for member in others:
            self._crew.ask(member, method, *arguments, returns=returns)
        return rest
