"""Which Python a simulator runs in: one of the user's, or the one that ``make`` made outside the checkout."""

from __future__ import annotations

import os
from pathlib import Path

from data.types import UserError


def folder(name: str) -> Path:
    """Where ``make <name>`` puts the environment: the user's cache, which outlives a checkout."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wm-rl" / name


def find_python(name: str, variable: str) -> Path:
    """The interpreter that the environment ``variable`` names, else the one that ``make <name>`` made.

    Raises:
        UserError: there is neither.
    """
    if chosen := os.environ.get(variable):
        if not os.access(chosen, os.X_OK):
            raise UserError(f"expected {variable} to name a Python interpreter, got {chosen}; correct it, or unset it "
                            f"and type: make {name}")
        return Path(chosen)
    python = folder(name) / "bin" / "python"
    if not (folder(name) / "ready").is_file():
        raise UserError(f"env={name} needs an environment of its own, expected it in {folder(name)}; type: make {name}"
                        f" (or name an interpreter that has it: {variable}=<path>)")
    return python
