import json
from dataclasses import replace

import numpy as np
import pytest

from data.budget import StoreConfig
from data.store import ReplayStore
from data.types import Source
from tests import examples
from wm_rl.cluster.writer import Writer


@pytest.mark.parametrize("field", ["reward", "proprio", "log_prob", "action", "uncertainty"])
def test_a_poisoned_episode_is_put_aside_with_where_it_came_from(field, tmp_path):
    examples.store(tmp_path / "store").close()
    writer = Writer(tmp_path / "store", StoreConfig(segment_bytes=2**20), tmp_path / "quarantine")
    good = examples.trajectory(90, 5, Source.SIM)
    values = getattr(good, field).copy()
    values.flat[3] = np.inf if field == "action" else np.nan
    bad = replace(good, **{field: values})
    for trajectory in (good, bad, good):
        writer.append(trajectory)
    assert [arrival.stored for arrival in writer.report()] == [True, False, True]
    assert writer.report() == []
    writer.close()
    stored = ReplayStore.open(tmp_path / "store")
    assert len(stored) == 12 + 2
    assert all(np.isfinite(stored.trajectory(i).reward).all() for i in range(len(stored)))
    facts = json.loads((tmp_path / "quarantine" / "000000.json").read_text())
    assert facts["not_finite"] == [field]
    assert facts["provenance"] == {"seed": 90}
    kept = np.load(tmp_path / "quarantine" / "000000.npz", allow_pickle=False)
    assert np.array_equal(kept[field], values, equal_nan=True)
    assert np.array_equal(kept["rgb_front"], good.frames["front"])


def test_what_it_says_of_an_episode(tmp_path):
    examples.store(tmp_path / "store").close()
    writer = Writer(tmp_path / "store", StoreConfig(segment_bytes=2**20), tmp_path / "quarantine")
    writer.append(examples.trajectory(10, 6, Source.IMAGINED))
    [arrival] = writer.report()
    assert arrival.source is Source.IMAGINED
    assert (arrival.success, arrival.steps, arrival.version) == (True, 6, 3.0)
    assert arrival.reward == 1
    assert arrival.uncertainty == pytest.approx(0.3)
