"""Episodes under a mapping, on streams made up here."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.logs.mapping import ROTATIONS, LogMapping, Part, Segments, read_mapping, to_yaml
from data.logs.rotation import rotate
from data.logs.sample import dimension_names, sample
from data.logs.streams import Kind, LogEpisode, Stream
from data.types import Success, UserError


def vector(name, time, values, names=()):
    values = np.asarray(values, float)
    return Stream(name=name, kind=Kind.VECTOR, clocks={"log": np.asarray(time, float)}, names=tuple(names),
                  values=values if values.ndim == 2 else values[:, None])


def texts(name, time, said):
    return Stream(name=name, kind=Kind.TEXT, clocks={"log": np.asarray(time, float)}, texts=tuple(said))


def episode(*streams, **other):
    return LogEpisode(name="run", streams={s.name: s for s in streams}, **other)


def mapping(**changes):
    return LogMapping(**{"proprio": (Part(stream="state"),), "action": (Part(stream="command"),), "cameras": {},
                         "clock": "log", "rate": 10.0, "max_gap": 0.25} | changes)


TENTHS = np.arange(20) / 10
PLAIN = (vector("state", TENTHS, np.arange(20)), vector("command", TENTHS + 0.03, 100 + np.arange(20)))


def test_rows_are_what_was_known_then():
    (rows,) = sample(episode(*PLAIN, instruction="push"), mapping()).rows
    np.testing.assert_allclose(rows.time, 0.03 + np.arange(19) / 10)  # from the first moment at which all had begun
    assert rows.proprio[:, 0].tolist() == list(range(19))
    assert rows.action[:, 0].tolist() == [100.0 + i for i in range(19)]
    assert rows.oldest == pytest.approx(0.03)
    assert (rows.instruction, rows.success) == ("push", Success.UNKNOWN)


def test_a_gap_and_a_value_that_is_not_finite_cut_the_episode():
    slow = np.delete(TENTHS, [5, 6, 7])
    values = np.arange(17.0)
    values[11] = np.nan  # at 1.4 s
    values[16] = 1e39  # at 1.9 s: no float32
    made = sample(episode(vector("state", slow, values), vector("command", TENTHS, TENTHS)), mapping())
    spans = [(rows.name, round(rows.time[0], 3), round(rows.time[-1], 3)) for rows in made.rows]
    assert spans == [("run#0", 0.0, 0.6), ("run#1", 0.8, 1.3), ("run#2", 1.5, 1.8)]
    assert made.masked == 3
    assert made.reasons == {"state: no message of the last 0.25 s": 1, "state: values that are not finite": 2}
    assert all(rows.success is Success.UNKNOWN for rows in made.rows)


def test_values_outside_the_limits_cut_the_episode_as_those_do_that_no_float32_holds():
    joints = np.stack([np.arange(20.0), np.zeros(20)], 1)
    joints[4, 1], joints[9, 0], joints[15, 1] = 3.2, 1e300, -3.2
    log = episode(vector("state", TENTHS, joints), vector("command", TENTHS, TENTHS))
    limited = mapping(proprio=(Part(stream="state", limits=((-1, 50), (-3.1, 3.1))),))
    made = sample(log, limited)
    assert [(rows.proprio[0, 0], rows.proprio[-1, 0]) for rows in made.rows] == [(0, 3), (5, 8), (10, 14), (16, 19)]
    assert made.reasons == {"state: values that are not finite": 1, "state: values outside its limits": 2}
    assert len(sample(log, mapping()).rows) == 2  # nobody said what is plausible
    degrees = mapping(proprio=(Part(stream="state", scale=0.1, limits=((-1, 1.4),)),))  # one pair, in the store's unit
    assert [len(rows.time) for rows in sample(log, degrees).rows] == [9, 5]
    with pytest.raises(UserError, match=r"state: 3 limits for 2 dimensions; give one pair, or one for each"):
        sample(log, mapping(proprio=(Part(stream="state", limits=((0, 1),) * 3),)))
    with pytest.raises(UserError, match=r"limits are pairs of lowest and highest, got 1 and 0"):
        Part(stream="state", limits=((1, 0),))
    with pytest.raises(UserError, match=r"needs no limits"):
        Part(stream="state", limits=((0, 1),), opening=(0, 0.08))


def test_dims_by_number_where_the_names_are_wrong():
    wrong = vector("state", TENTHS, np.arange(60.0).reshape(20, 3), ["a", "b"])
    chosen = mapping(proprio=(Part(stream="state", dims=(2, 0)),))
    (rows,) = sample(episode(wrong, PLAIN[1]), chosen).rows
    assert rows.proprio[0].tolist() == [2.0, 0.0]
    assert dimension_names(chosen.proprio, {"state": wrong}) == ("state_0", "state_1")


def test_stamps_that_span_centuries_are_refused():
    late = np.append(TENTHS, 1e12)
    log = episode(vector("state", late, np.zeros(21)), vector("command", late, np.zeros(21)))
    with pytest.raises(UserError, match=r"the log clock goes from 0 to 1e\+12 s; damaged stamps\? type another clock"):
        sample(log, mapping())


def test_joints_are_matched_by_name():
    state = vector("state", TENTHS, np.stack([np.full(20, i) for i in (10, 11, 12)], 1), ["q1", "q2", "q0"])
    command = vector("command", TENTHS, np.zeros((20, 2)), ["q1", "q2"])
    chosen = mapping(proprio=(Part(stream="state", dims=("q0", "q1"), scale=0.5),))
    (rows,) = sample(episode(state, command), chosen).rows
    assert rows.proprio[0].tolist() == [6.0, 5.0]
    assert dimension_names(chosen.proprio, {"state": state}) == ("q0", "q1")
    with pytest.raises(UserError, match=r"state has no dimension 'q3', but q1, q2, q0"):
        sample(episode(state, command), mapping(proprio=(Part(stream="state", dims=("q3",)),)))
    with pytest.raises(UserError, match=r"come twice; give names"):
        dimension_names((Part(stream="command"), Part(stream="state")), {"state": state, "command": command})


def test_names_that_do_not_fit_are_refused():
    wrong = vector("state", TENTHS, np.zeros((20, 3)), ["a", "b"])
    with pytest.raises(UserError, match=r"state has 3 dimensions but 2 names"):
        sample(episode(wrong, PLAIN[1]), mapping())


@pytest.mark.parametrize(("change", "message"), [
    ({"clock": "header"}, r"state has no clock 'header', but log"),
    ({"proprio": (Part(stream="stat"),)}, r"no vector stream 'stat', but state, command"),
    ({"action": (Part(stream="command", dims=(1,)),)}, r"command has dimensions 0 to 0, got 1"),
    ({"action": (Part(stream="command", rotation=("euler_xyz", "rotation_6d")),)}, r"takes 3 dims, got 1"),
    ({"success": "done"}, r"no vector stream 'done'"),
])
def test_what_the_mapping_names_and_the_log_lacks(change, message):
    with pytest.raises(UserError, match=message):
        sample(episode(*PLAIN), mapping(**change))


@pytest.mark.parametrize("closed", [0.0, 0.08])
def test_a_gripper_opens_upwards_whatever_its_polarity(closed):
    opened = 0.08 - closed
    raw = closed + (opened - closed) * np.linspace(0, 1, 20)
    (rows,) = sample(episode(vector("state", TENTHS, raw), PLAIN[1]),
                     mapping(proprio=(Part(stream="state", opening=(closed, opened)),))).rows
    assert rows.proprio[0, 0] == pytest.approx(0, abs=1e-6)
    assert (np.diff(rows.proprio[:, 0]) > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1, 1), min_size=4, max_size=4).filter(lambda q: np.linalg.norm(q) > 0.1))
def test_rotations_turn_vectors_alike_in_every_representation(quaternion):
    x, y, z, w = np.array(quaternion) / np.linalg.norm(quaternion)
    expected = np.array([  # the textbook matrix of a unit quaternion
        [1 - 2 * (y * y + z * z), 2 * (x * y - z * w), 2 * (x * z + y * w)],
        [2 * (x * y + z * w), 1 - 2 * (x * x + z * z), 2 * (y * z - x * w)],
        [2 * (x * z - y * w), 2 * (y * z + x * w), 1 - 2 * (x * x + y * y)]])
    start = {"quaternion_xyzw": [x, y, z, w], "quaternion_wxyz": [w, x, y, z]}
    for given_as, through in itertools.product(start, ROTATIONS):
        middle = rotate(np.array([start[given_as]]), given_as, through)
        matrix = rotate(middle, through, "matrix").reshape(3, 3)
        np.testing.assert_allclose(matrix, expected, atol=1e-6)


def test_what_is_no_rotation_is_not_made_one():
    bad = np.array([[0, 0, 0, 0], [np.nan, 0, 0, 1], [0, 0, 0, 1.0]])
    assert np.isnan(rotate(bad, "quaternion_xyzw", "rotation_6d")).all(1).tolist() == [True, True, False]
    assert np.isnan(rotate(-np.eye(3).reshape(1, 9), "matrix", "euler_xyz")).all()  # a reflection


def test_segments_by_gap_marker_and_side_car(tmp_path):
    time = np.concatenate([TENTHS, 10 + TENTHS])
    state, command = vector("state", time, time), vector("command", time, time)
    parts = sample(episode(state, command, success=Success.YES, success_from="a label"),
                   mapping(segments=Segments(gap=1.0))).rows
    assert [(rows.time[0], round(rows.time[-1], 3)) for rows in parts] == [(0.0, 1.9), (10.0, 11.9)]
    assert [rows.success for rows in parts] == [Success.UNKNOWN, Success.YES]  # the label is that of the end

    marker = texts("task", [0.0, 0.5, 1.0], ["", "open", ""])
    (rows,) = sample(episode(*PLAIN, marker), mapping(segments=Segments(marker="task"))).rows
    assert (round(rows.time[0], 3), round(rows.time[-1], 3), rows.instruction) == (0.5, 0.9, "open")

    (tmp_path / "cuts.csv").write_text("file,start,end,instruction,success\nrun,0.2,0.6,lift,yes\nother,0,1,x,no\n")
    (rows,) = sample(episode(*PLAIN), mapping(segments=Segments(csv="cuts.csv")), folder=tmp_path).rows
    assert (rows.instruction, rows.success, rows.success_from) == ("lift", Success.YES, "side-car CSV")
    assert len(rows.time) == 5
    (tmp_path / "cuts.csv").write_text("file,begin\nrun,0.2\n")
    with pytest.raises(UserError, match=r"cuts\.csv needs the columns file, start, end"):
        sample(episode(*PLAIN), mapping(segments=Segments(csv="cuts.csv")), folder=tmp_path)


def test_success_from_a_stream_and_of_a_cut_recording():
    done = vector("done", [0.0, 1.0], [0, 1])
    (rows,) = sample(episode(*PLAIN, done), mapping(success="done")).rows
    assert rows.success is Success.YES
    assert rows.shows_success.tolist() == [t >= 1 for t in rows.time]
    (rows,) = sample(episode(*PLAIN, success=Success.YES, success_from="a label", whole=False), mapping()).rows
    assert rows.success is Success.UNKNOWN
    (rows,) = sample(episode(*PLAIN, vector("done", [0.0], [0]), whole=False), mapping(success="done")).rows
    assert rows.success is Success.UNKNOWN  # it may have succeeded later
    values = np.arange(20.0)
    values[10] = np.nan
    cut = (vector("state", TENTHS, values), vector("command", TENTHS, TENTHS))
    parts = sample(episode(*cut, vector("done", [0.0, 1.95], [0, 1])), mapping(success="done")).rows
    assert [part.success for part in parts] == [Success.UNKNOWN, Success.YES]  # said after the last row's command


def test_a_reader_that_marks_the_rows_of_a_success_is_followed():
    done = vector("marks", TENTHS, np.arange(20) >= 12)
    (rows,) = sample(episode(*PLAIN, done, marks="marks", success=Success.YES, success_from="it"), mapping()).rows
    assert rows.shows_success.tolist() == [t >= 1.2 for t in rows.time]
    assert (rows.success, rows.success_from) == (Success.YES, "it")


def test_a_mapping_survives_its_file_and_mistakes_are_named(tmp_path):
    made = mapping(proprio=(Part(stream="s", dims=("a",), opening=(0, 1)), Part(stream="t", dims=(1, 2))),
                   segments=Segments(gap=2.0))
    file = tmp_path / "m.yaml"
    file.write_text(to_yaml(made))
    assert read_mapping(file) == made
    for text, message in [
        ("proprioception: []", r"unknown key 'proprioception', did you mean 'proprio'"),
        ("clock: log", r"proprio is missing"),
        (to_yaml(made).replace("rate: 10.0", "rate: fast"), r"rate: expected a number, got 'fast'"),
        (to_yaml(made).replace("clock: log", "clock: logs"), r"clock: expected one of .*did you mean log"),
        ("a: [", r"not YAML"), ("3", r"expected keys and values"),
    ]:
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            read_mapping(file)
    with pytest.raises(UserError, match=r"no such file"):
        read_mapping(tmp_path / "other.yaml")
