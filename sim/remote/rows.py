"""The rows of one simulator process: what they show now, and how that outlives the process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float32, Int64

from sim.remote.process import Program, SimulatorProcess
from sim.remote.protocol import Answers, Description


class RemoteRows:
    """A process, and the side of its shared memory that holds its last whole answers."""

    def __init__(self, program: Program) -> None:
        """Start the process; ``begin`` waits for it."""
        self._program = program
        self.process = SimulatorProcess(program)

    def begin(self, first: int) -> None:
        """Wait until it is built; its rows are ``first`` and the following of all. Raises as ``wait_until_made``."""
        self.process.wait_until_made()
        self.rows = slice(first, first + len(self.description.row_tasks))
        self._side = self._next_side = 0
        self._alike = np.zeros(len(self.description.row_tasks), bool)
        """Rows that both sides show alike."""

    @property
    def description(self) -> Description:
        """What the simulator says of itself."""
        return self.process.description

    @property
    def shown(self) -> Answers:
        """The last whole answers of every row. Not to be kept: they change with the next call but one."""
        return self.process.block.sides[self._side]

    def ask_to_reset(
        self, mask: Bool[np.ndarray, " n"], seeds: Int64[np.ndarray, " n"], changes: Sequence[Mapping[str, Any]],
    ) -> None:
        """Of rows of this process, like all that follows; ``changes``: by which each differs from nominal."""
        self.process.block.seeds[:] = seeds
        self._ask_to_show("reset", mask, changes=changes)

    def ask_to_step(self, mask: Bool[np.ndarray, " n"], actions: Float32[np.ndarray, "n a"]) -> None:
        """Actions of rows outside the mask are not looked at."""
        self.process.block.actions[:] = actions
        self._ask_to_show("step", mask)

    def ask_expert(self, mask: Bool[np.ndarray, " n"]) -> None:
        """Its answer is in ``process.block.expert``."""
        self._next_side = self._side
        self.process.block.mask[:] = mask
        self.process.ask("expert")

    def answer(self) -> dict[str, Any]:
        """Wait until what was asked is done, and show it. Raises ``LostError`` and leaves what is shown as it was."""
        answer, _ = self.process.answer()
        self._side = self._next_side
        return answer

    def snapshot(self, row: int) -> dict[str, np.ndarray]:
        """Raises ``LostError``."""
        self.process.ask("snapshot", row=row)
        return self.process.answer()[1]

    def restore(self, row: int, snapshot: Mapping[str, np.ndarray], changes: Mapping[str, Any]) -> str:
        """Show what the snapshot, taken under ``changes``, showed; returns the instruction. Raises ``LostError``."""
        mask = np.arange(len(self._alike)) == row
        self._ask_to_show("restore", mask, snapshot, row=row, changes=changes)
        return self.answer()["instruction"]

    def replace(self) -> None:
        """Kill the process and start another, whose rows show what these did. Raises as ``wait_until_made``."""
        self.process.kill()
        shown, rows = self.shown, self.rows
        self.process = SimulatorProcess(self._program)
        self.begin(rows.start)
        for old, new in zip(shown.arrays(), self.shown.arrays(), strict=True):
            new[:] = old

    def cut(self, mask: Bool[np.ndarray, " n"]) -> None:
        """The rows of the mask end here: no reward, and no observation but the last."""
        shown = self.shown
        shown.reward[mask] = 0
        shown.time[mask] += 1 / self.description.control_hz  # of the step that nobody saw
        shown.terminated[mask], shown.truncated[mask] = shown.decided[mask], ~shown.decided[mask]

    def _ask_to_show(self, call: str, mask: np.ndarray, arrays: Mapping[str, np.ndarray] | None = None,
                     **arguments: Any) -> None:
        """The other side takes the answers, so that these stay whole; rows that are not asked are carried over."""
        block, self._next_side = self.process.block, 1 - self._side
        target, carried = block.sides[self._next_side], ~mask & ~self._alike
        if carried.any():
            for old, new in zip(self.shown.arrays(), target.arrays(), strict=True):
                new[carried] = old[carried]
        self._alike = ~mask
        block.mask[:] = mask
        self.process.ask(call, arrays, side=self._next_side, **arguments)
