"""``python main.py <command> [overrides]``: one Hydra entry point for every command.

The first word becomes Hydra's ``--config-name``, which keeps multirun, ``--help``, ``--cfg`` and tab completion as
Hydra has them. Each primary YAML names the function that runs it; its keys are that function's arguments, so a key
that nothing reads is an error. This file imports no torch: tab completion runs it.
"""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run one command; exit code 0, 1 where a gate says no, 2 for bad input, 128 + the signal that stopped it."""
    # One torch thread unless you say otherwise: two on two busy cores wait for each other, up to 4x slower in all.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors reach `cli.run`, which makes one line of them
    from wm_rl import cli  # not above: processes that a command spawns import this file, and need no Hydra

    return cli.run(sys.argv)


if __name__ == "__main__":
    sys.exit(main())
