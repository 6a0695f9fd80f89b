"""Actors under supervision: every call has an answer to wait for and a time by which it must come.

An actor that died, or is silent for too long, is killed and replaced under the same handle (Ray's restart), then told
how to begin again. Nothing here waits for one actor while another has something to say.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayActorError, RayTaskError

from data.types import UserError

_STARTING = 900.0
"""Seconds that an actor may take to appear: on a busy machine imports alone take minutes."""
_HOUR = 3600.0
_RETRY = 0.5
"""Seconds between two knocks on the door of an actor that is being restarted."""


_BORN = time.time_ns()


class Replaced(Exception):  # noqa: N818 # nothing failed
    """The actor that was meant is gone, and this is its successor."""


class Actor:
    """What a ``Crew`` needs of an actor.

    Ray starts one anew under the same handle, and what is asked of it from then on reaches the new one, which knows
    nothing. So every question says which one is meant.
    """

    def ready(self) -> tuple[int, int]:
        """The process, and when it began: no two actors have the same."""
        return os.getpid(), _BORN

    def node(self) -> str:
        """Name of its machine."""
        return socket.gethostname()

    def do(self, who: tuple[int, int], method: str, *arguments: Any) -> Any:
        """Call a method, if ``who`` is the one that answers. Raises ``Replaced`` otherwise."""
        if who != (os.getpid(), _BORN):
            raise Replaced
        return getattr(self, method)(*arguments)


@dataclass(eq=False)
class Member:
    """One actor."""

    name: str
    handle: Any
    begin: Callable[[Member], None]
    """Called once it is there, and again whenever it was replaced."""
    up: bool = False
    who: tuple[int, int] = (0, 0)
    """What it said when it was there: its process, on whatever machine that is, and when that began."""
    node: str = ""
    """Name of that machine."""
    seen: float = 0.0
    """When it last answered, on the monotonic clock."""
    deaths: list[float] = field(default_factory=list)
    """When it was found dead, on the monotonic clock."""
    knock_at: float = 0.0
    """When to ask again whether it is there, on the same clock."""

    @property
    def pid(self) -> int:
        """Of its process."""
        return self.who[0]

    @property
    def restarts(self) -> int:
        """How often it was replaced."""
        return len(self.deaths)


@dataclass(frozen=True, eq=False)
class _Call:
    member: Member
    method: str
    then: Callable[[Any], None]
    due: float


class Crew:
    """All actors of a run."""

    def __init__(self, *, patience: float, max_restarts: int, say: Callable[[str], None]) -> None:
        """``patience``: seconds that an actor may take to answer a call that sets no time of its own."""
        self.patience, self._max_restarts, self._say = patience, max_restarts, say
        self.members: list[Member] = []
        self._pending: dict[Any, _Call] = {}

    def hire(
        self, name: str, kind: type, *arguments: Any, begin: Callable[[Member], None], options: dict[str, Any],
        **named: Any,
    ) -> Member:
        """Start an actor of class ``kind``; ``begin(member)`` follows when it is there."""
        options = {"max_restarts": -1, "enable_task_events": False, **options}  # 4 kB in Ray's head for each call
        handle: Any = ray.remote(kind).options(**options).remote(*arguments, **named)
        member = Member(name, handle, begin)
        self.members.append(member)
        self._knock(member)
        return member

    def ask(
        self, member: Member, method: str, *arguments: Any, then: Callable[[Any], None] = lambda _: None,
        patience: float | None = None, returns: int = 1,
    ) -> Any:
        """Call a method; ``then(answer)`` follows. Returns a reference to the second of two results."""
        results = (member.handle.ready.remote() if method == "ready" else
                   member.handle.do.options(num_returns=returns).remote(member.who, method, *arguments))
        first, rest = (results, None) if returns == 1 else (results[0], results[1])
        due = time.monotonic() + (self.patience if patience is None else patience)
        self._pending[first] = _Call(member, method, then, due)
        return rest

    def busy(self, member: Member, method: str) -> bool:
        """It is not there, or has not answered that call yet."""
        return not member.up or self.calls(member, method) > 0

    def calls(self, member: Member, method: str) -> int:
        """How many calls of that method it has not answered yet."""
        return sum(call.member is member and call.method == method for call in self._pending.values())

    def attend(self, timeout: float) -> None:
        """Wait up to ``timeout`` seconds for answers and deal with those that came, then with what did not come.

        Answers to one actor's calls of one method are dealt with in the order of the calls, whichever Ray shows first.
        """
        ready = set(ray.wait(list(self._pending), num_returns=1, timeout=timeout)[0]) if self._pending else set()
        ready |= set(ray.wait(list(self._pending), num_returns=len(self._pending), timeout=0)[0]) if ready else set()
        waiting: set[tuple[Member, str]] = set()
        for reference, call in list(self._pending.items()):
            if reference not in ready:
                waiting.add((call.member, call.method))
            elif (call.member, call.method) not in waiting and self._pending.pop(reference, None) is not None:
                self._deal(reference, call)  # else its actor is known to be gone
        now = time.monotonic()
        for member in self.members:
            if not member.up and now >= member.knock_at and not self._calls(member):
                self._knock(member)
        for call in list(self._pending.values()):
            if now > call.due and call in self._pending.values():
                self.replace(call.member, f"no answer to {call.method} for too long")

    def replace(self, member: Member, why: str) -> None:
        """Kill an actor that cannot be relied on; Ray starts it anew."""
        ray.kill(member.handle, no_restart=False)
        self._gone(member, why)

    @property
    def restarts(self) -> int:
        """Of all actors."""
        return sum(member.restarts for member in self.members)

    def roll(self) -> list[dict[str, Any]]:
        """Everyone: ``name``, ``up``, ``pid``, ``node``, ``restarts``, ``silent`` (seconds since the last answer)."""
        now = time.monotonic()
        return [{"name": member.name, "up": member.up, "pid": member.pid, "node": member.node,
                 "restarts": member.restarts, "silent": now - member.seen if member.seen else None}
                for member in self.members]

    def _deal(self, reference: Any, call: _Call) -> None:
        member = call.member
        try:
            answer = ray.get(reference)
        except ActorUnavailableError:
            member.knock_at = time.monotonic() + _RETRY
            if member.up:
                self._gone(member, "died")
        except RayActorError as error:
            if error.actor_init_failed:
                raise UserError(f"{member.name} could not be started: {str(error).strip().splitlines()[-1]}") from error
            self._gone(member, "died")
        except RayTaskError as error:
            if isinstance(error.cause, UserError):
                raise error.cause from error
            if isinstance(error.cause, Replaced):
                self._gone(member, "died")
                return
            self.replace(member, f"{call.method} failed: {type(error.cause).__name__}: {error.cause}")
        else:
            member.seen = time.monotonic()
            call.then(answer)

    def _gone(self, member: Member, why: str) -> None:
        self._pending = {reference: call for reference, call in self._pending.items() if call.member is not member}
        now = time.monotonic()
        member.deaths.append(now)
        member.up, member.knock_at = False, now + _RETRY
        if sum(now - death < _HOUR for death in member.deaths) > self._max_restarts:
            raise UserError(f"{member.name} was replaced {self._max_restarts} times within an hour, and failed again "
                            f"({why}); see what is wrong with it, or raise runtime.max_restarts, then resume the run")
        self._say(f"{member.name}: {why}; replaced ({member.restarts})")

    def _knock(self, member: Member) -> None:
        def there(who: tuple[int, int]) -> None:
            member.up, member.who = True, who
            self.ask(member, "node", then=partial(setattr, member, "node"))
            member.begin(member)

        self.ask(member, "ready", then=there, patience=_STARTING)

    def _calls(self, member: Member) -> bool:
        return any(call.member is member for call in self._pending.values())
