"""Whatever happens to a journal's file leaves an exact prefix of its records, alone and through the store."""

import os
import shutil
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import journal
from data.store import ReplayStore

RECORDS = st.lists(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6), max_size=6)


def written(path, records):
    lines = [journal.encode(record) for record in records]
    path.write_bytes(b"".join(lines))
    return np.cumsum([0, *map(len, lines)]).tolist()


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return tmp_path_factory.mktemp("journal") / "journal"


@given(records=RECORDS)
def test_records_come_back_from_any_record_on(file, records):
    ends = written(file, records)
    for i, end in enumerate(ends):
        assert journal.read(file, end) == (records[i:], ends[-1])


@given(records=RECORDS, data=st.data())
def test_a_cut_leaves_the_records_before_it(file, records, data):
    ends = written(file, records)
    size = data.draw(st.integers(0, ends[-1]))
    os.truncate(file, size)
    whole = sum(end <= size for end in ends[1:])
    assert journal.read(file) == (records[:whole], ends[whole])


@given(records=RECORDS.filter(bool), data=st.data())
def test_a_flipped_bit_leaves_the_records_before_it(file, records, data):
    ends = written(file, records)
    bit = data.draw(st.integers(0, 8 * ends[-1] - 1))
    flip(file, bit)
    whole = sum(end <= bit // 8 for end in ends[1:])
    assert journal.read(file) == (records[:whole], ends[whole])


@given(records=RECORDS, torn=st.binary(max_size=99), record=st.integers())
def test_what_is_appended_after_a_torn_record_is_read(file, records, torn, record):
    ends = written(file, records)
    with file.open("ab") as handle:
        handle.write(torn.replace(b"\n", b""))
    found, end = journal.read(file)
    assert (found, end) == (records, ends[-1])
    descriptor = os.open(file, os.O_RDWR)
    journal.append(descriptor, end, journal.encode(record))
    os.close(descriptor)
    assert journal.read(file)[0] == [*records, record]


def flip(file, bit):
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


@pytest.fixture(scope="module")
def left_open(tmp_path_factory, make_store, make_trajectory):
    """A store whose writer was killed after four appends, the episodes, and how many each record's end stands for."""
    path = tmp_path_factory.mktemp("store") / "whole"
    given_episodes = [make_trajectory(i, 1 + 3 * i) for i in range(6)]
    store = make_store(path)
    log, counts = path / "open/00000000/journal", {0: 0}
    done = 0
    for count in (1, 2, 1, 2):
        store.append(given_episodes[done : done + count])
        done += count
        counts[log.stat().st_size] = done
    copy = path.with_name("killed")  # a copy has no owner
    shutil.copytree(path, copy)
    store.close()
    return copy, given_episodes, counts


@given(data=st.data(), flipped=st.booleans())
def test_a_damaged_journal_recovers_to_a_prefix(left_open, assert_same, data, flipped):
    killed, episodes, counts = left_open
    path = killed.with_name("damaged")
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(killed, path)
    log = path / "open/00000000/journal"
    at = data.draw(st.integers(0, log.stat().st_size - 1))
    if flipped:
        flip(log, 8 * at + data.draw(st.integers(0, 7)))
    else:
        os.truncate(log, at)
    expected = max(count for end, count in counts.items() if end <= at)
    before = ReplayStore.open(path)
    recovered = ReplayStore.open(path)
    recovered.recover()
    for reader in (before, recovered, ReplayStore.open(path)):
        assert len(reader) == expected
        for index, trajectory in enumerate(episodes[:expected]):
            assert_same(reader.trajectory(index), trajectory)
    assert not list((path / "open").glob("*/journal"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recovered.append([episodes[0]])
    assert_same(recovered.trajectory(expected), episodes[0])
