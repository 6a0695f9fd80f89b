"""``python main.py ingest`` without a process of its own: composing Hydra's configuration takes most of a second."""

import contextlib
import io
from functools import cache
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from data.store import ReplayStore
from data.types import UserError

ROOT = Path(__file__).parents[2]


@cache
def _config():
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("ingest", overrides=["source=x", "folder=x"])


def ingest(**settings) -> str:
    """The command with these settings; what it prints. Raises ``UserError``, unwrapped as ``wm_rl.cli`` does it."""
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            instantiate(_config(), **settings)
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return out.getvalue()


def contents(store: Path) -> list[tuple[np.ndarray, ...]]:
    """State ``[r, p]``, action in raw units ``[r - 1, a]`` and frames ``[r, h, w, 3]`` of every episode.

    An action at the edge of the store's range is NaN: it may have been clipped to it.
    """
    replay = ReplayStore.open(store)
    return [(t.proprio, np.where(np.abs(t.action) < 1 - 1e-6, replay.statistics.denormalise(t.action), np.nan),
             *t.frames.values()) for t in map(replay.trajectory, range(len(replay)))]


def assert_actions(found: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Those that are not at the edge of the store's range, most of all, are these."""
    inside = np.isfinite(found)
    assert inside.mean() > 0.8
    np.testing.assert_allclose(found[inside], expected[inside], atol=tolerance)
