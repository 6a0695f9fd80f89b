"""Damaged logs of every format through the whole of ``ingest``: some of what ``python -m tests.logs.faults`` does."""

import shutil

import numpy as np
import pytest
from mcap.reader import make_reader

from data.types import UserError
from tests.logs import bags, faults, hostile, makers
from tests.logs.command import assert_actions, contents

CHECKED = ("Zarr v2 zip", "RLDS", "Foxglove json", "Foxglove protobuf")
"""Logs with checksums: no flipped bit is taken for a value."""


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(faults.multiprocessing, "get_context", lambda method: faults._Threads)
    return lambda kind: faults.Bench(kind, tmp_path / "bench")


@pytest.mark.slow
@pytest.mark.parametrize("kind", makers.WRITERS)
def test_an_intact_log_becomes_what_was_recorded(kind, bench):
    """Against the numbers that were written, by whatever writer the format has."""
    recorded, found = makers.demos(), bench(kind).expected
    assert len(found) == len(recorded)
    for demo, (state, action, frames) in zip(recorded, found, strict=True):
        rows = len(demo.time) - (kind == "Minari")  # whose last observation has no action
        if kind != "Foxglove protobuf":  # whose my.State has more fields, always the same
            assert (state.shape[1], action.shape[1]) == (2, 3)
        np.testing.assert_array_equal(state[:, :2], demo.state[:rows].astype("f4"))
        assert_actions(action[:, :3], demo.action[: rows - 1], 1e-6)
        difference = np.abs(frames.astype(int) - demo.pictures[:rows])
        assert difference.max() <= (12 if kind.startswith("LeRobot") else 0)  # H.264


@pytest.mark.slow
@pytest.mark.parametrize("kind", makers.WRITERS)
def test_damage_is_refused_or_left_out(kind, tmp_path):
    results = list(faults.run(kind, faults.cases(kind, 10, 25), tmp_path))
    assert len(results) == 10 + 25 + len(hostile.faults(kind))
    for case, result in results:
        assert result.outcome not in faults.NEVER, (case, result)
        assert case.fault == "flip" or result.outcome != "altered", (case, result)
    named = {case.fault: result for case, result in results if case.fault not in ("cut", "flip")}
    assert named["no episodes"].outcome == "refused"
    assert named["a value that is NaN"].outcome in ("in part", "refused")
    if kind in CHECKED:
        assert not [case for case, result in results if result.outcome == "altered"]
    if "a name too many" in named:
        assert named["a name too many"].outcome == "refused"
    if "rows out of order" in named and kind not in hostile.LEROBOT:
        assert named["rows out of order"].outcome == "whole"


@pytest.mark.slow
def test_a_cut_mcap_gives_every_row_of_its_whole_chunks(bench, tmp_path):
    """A chunk per message, three messages per row; where chunks end is what the library's own index says."""
    made = bench("rosbag2 MCAP")
    file = makers.write("rosbag2 MCAP", tmp_path / "long", (recorded := makers.demos(1, 40))) / "run_0/run_0.mcap"
    bags.write_mcap(file, list(makers.messages(recorded[0])), chunk_size=1, enable_crcs=False)
    content = file.read_bytes()
    with file.open("rb") as stream:
        ends = np.array([chunk.chunk_start_offset + chunk.chunk_length
                         for chunk in make_reader(stream).get_summary().chunk_indexes])
    assert len(ends) == 3 * 40
    rows_found = set()
    for cut in np.linspace(0, len(content) - 1, 50).astype(int):
        file.write_bytes(content[:cut])
        rows = int((ends <= cut).sum()) // 3
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        if rows < 2:
            with pytest.raises(UserError, match="nothing usable was found"):
                made.ingest(file.parent, tmp_path / "store")
            continue
        made.ingest(file.parent, tmp_path / "store")
        ((state, _, _),) = contents(tmp_path / "store")
        np.testing.assert_array_equal(state, recorded[0].state[:rows].astype("f4"))
        rows_found.add(rows)
    assert len(rows_found) > 20
    assert max(rows_found) == 40
