"""What messages of every type become."""


import numpy as np
import pytest
from rosbags.typesys import Stores, get_types_from_msg, get_typestore

from data.logs.streams import Kind
from tests.logs.bags import (
    POSE,
    SECOND,
    START,
    TWIST,
    header,
    joints,
    make,
    one,
    pose,
    quaternion,
    read,
    vector3,
    write_bag,
)


def test_joints_are_matched_by_name(tmp_path):
    episode = one(tmp_path, "sensor_msgs/msg/JointState", joints([1, 2], velocity=np.array([3.0, 4])),
                  joints([20, 10], names=("b", "a"), effort=np.array([6.0, 5])), joints([5, 6], names=("a", "c")),
                  joints([7]), joints([], names=()))
    assert episode.streams["/t.position"].values.tolist() == [[1, 2], [10, 20]]
    assert episode.streams["/t.position"].names == ("a", "b")
    assert episode.streams["/t.velocity"].values.tolist() == [[3, 4]]
    assert episode.streams["/t.effort"].values.tolist() == [[6, 5]]
    assert episode.streams["/t.effort"].clocks["log"].tolist() == [1]
    other = "2 messages whose names or number of values are not those of most"
    assert episode.problems == ("/t: 1 messages without values", f"/t.position: {other}")


def test_names_that_do_not_fit_the_values_are_kept(tmp_path):
    stream = one(tmp_path, "sensor_msgs/msg/JointState", joints([1, 2, 3])).streams["/t.position"]
    assert (stream.names, stream.values.tolist()) == (("a", "b"), [[1, 2, 3]])


def test_numbers_and_words(tmp_path):
    kinds = {"Bool": True, "Int8": -3, "UInt64": 7, "Float32": 0.5, "Float64": -2.5, "String": "go"}
    episode = read(write_bag(tmp_path / "bag", [
        (f"/{kind}", f"std_msgs/msg/{kind}", START, make(f"std_msgs/msg/{kind}", data=value))
        for kind, value in kinds.items()]))
    for kind, value in kinds.items():
        stream = episode.streams[f"/{kind}"]
        if kind == "String":
            assert (stream.kind, stream.texts) == (Kind.TEXT, ("go",))
        else:
            assert (stream.names, stream.values.tolist()) == (("data",), [[value]])


@pytest.mark.parametrize(("labels", "names"), [
    (("x", "y", "z"), ("x", "y", "z")), (("arm",), ("arm[0]", "arm[1]", "arm[2]")), (("a", "b"), ()), ((), ()),
    (("",), ())])
def test_arrays_are_named_by_their_layout(tmp_path, labels, names):
    dims = [make("std_msgs/msg/MultiArrayDimension", label=label) for label in labels]
    layout = make("std_msgs/msg/MultiArrayLayout", dim=dims)
    message = make("std_msgs/msg/Float32MultiArray", layout=layout, data=np.array([1, 2, 3], np.float32))
    stream = one(tmp_path, "std_msgs/msg/Float32MultiArray", message).streams["/t"]
    assert (stream.names, stream.values.tolist()) == (names, [[1, 2, 3]])


def test_arrays_of_changing_length(tmp_path):
    messages = [make("std_msgs/msg/Float64MultiArray", data=np.arange(n, dtype=float)) for n in (2, 3, 3, 0)]
    episode = one(tmp_path, "std_msgs/msg/Float64MultiArray", *messages)
    assert episode.streams["/t"].values.shape == (2, 3)
    assert len(episode.problems) == 2


def twist():
    return make("geometry_msgs/msg/Twist", linear=vector3(1, 2, 3), angular=vector3(4, 5, 6))


def transform(child, ns=START):
    inner = make("geometry_msgs/msg/Transform", translation=vector3(1, 2, 3), rotation=quaternion(0, 0, 0.6, 0.8))
    return make("geometry_msgs/msg/TransformStamped", header=header(ns), child_frame_id=child, transform=inner)


GIVEN_POSE, POSE_VALUES = pose(1, 2, 3, 0, 0, 0.6, 0.8), [1, 2, 3, 0, 0, 0.6, 0.8]
STAMP = header(START + SECOND)


@pytest.mark.parametrize(("kind", "given", "expected"), [
    ("geometry_msgs/msg/Twist", vars(twist()), {"": (TWIST, [1, 2, 3, 4, 5, 6])}),
    ("geometry_msgs/msg/TwistStamped", {"header": STAMP, "twist": twist()}, {"": (TWIST, [1, 2, 3, 4, 5, 6])}),
    ("geometry_msgs/msg/Pose", vars(GIVEN_POSE), {"": (POSE, POSE_VALUES)}),
    ("geometry_msgs/msg/PoseStamped", {"header": STAMP, "pose": GIVEN_POSE}, {"": (POSE, POSE_VALUES)}),
    ("geometry_msgs/msg/PoseWithCovarianceStamped",
     {"header": STAMP, "pose": make("geometry_msgs/msg/PoseWithCovariance", pose=GIVEN_POSE)},
     {"": (POSE, POSE_VALUES)}),
    ("geometry_msgs/msg/Wrench", {"force": vector3(1, 2, 3), "torque": vector3(4, 5, 6)},
     {"": (("force.x", "force.y", "force.z", "torque.x", "torque.y", "torque.z"), [1, 2, 3, 4, 5, 6])}),
    ("geometry_msgs/msg/PointStamped", {"header": STAMP}, {"": (("x", "y", "z"), [0, 0, 0])}),
    ("nav_msgs/msg/Odometry",
     {"header": STAMP, "pose": make("geometry_msgs/msg/PoseWithCovariance", pose=GIVEN_POSE),
      "twist": make("geometry_msgs/msg/TwistWithCovariance", twist=twist())},
     {".pose": (POSE, POSE_VALUES), ".twist": (TWIST, [1, 2, 3, 4, 5, 6])}),
    ("geometry_msgs/msg/TransformStamped", vars(transform("hand")), {".hand": (POSE, POSE_VALUES)}),
    ("tf2_msgs/msg/TFMessage", {"transforms": [transform("hand"), transform("eye")]},
     {".hand": (POSE, POSE_VALUES), ".eye": (POSE, POSE_VALUES)}),
    ("sensor_msgs/msg/Imu", {"orientation": quaternion(0, 0, 0.6, 0.8), "angular_velocity": vector3(1, 2, 3)},
     {".orientation": (("x", "y", "z", "w"), [0, 0, 0.6, 0.8]), ".angular_velocity": (("x", "y", "z"), [1, 2, 3]),
      ".linear_acceleration": (("x", "y", "z"), [0, 0, 0])}),
    ("sensor_msgs/msg/Imu", {"orientation_covariance": np.array([-1.0] + [0] * 8)},
     {".angular_velocity": (("x", "y", "z"), [0, 0, 0]), ".linear_acceleration": (("x", "y", "z"), [0, 0, 0])}),
    ("sensor_msgs/msg/Joy", {"axes": np.array([0.5, -1], np.float32), "buttons": np.array([1], np.int32)},
     {".axes": ((), [0.5, -1]), ".buttons": ((), [1])}),
    ("trajectory_msgs/msg/JointTrajectory",
     {"joint_names": ["a", "b"], "points": [
         make("trajectory_msgs/msg/JointTrajectoryPoint", positions=np.array([1.0, 2]), effort=np.array([3.0, 4])),
         make("trajectory_msgs/msg/JointTrajectoryPoint", positions=np.array([5.0, 6]))]},
     {".positions": (("a", "b"), [1, 2]), ".effort": (("a", "b"), [3, 4])}),
    ("trajectory_msgs/msg/JointTrajectoryPoint", {"velocities": np.array([1.0, 2])}, {".velocities": ((), [1, 2])}),
    ("builtin_interfaces/msg/Duration", {"sec": 2, "nanosec": 500_000_000}, {"": (("",), [2.5])}),
    ("sensor_msgs/msg/Range", {"header": STAMP, "range": 0.5},
     {"": (("radiation_type", "field_of_view", "min_range", "max_range", "range"), [0, 0, 0, 0, 0.5])}),
    ("geometry_msgs/msg/Polygon", {"points": [make("geometry_msgs/msg/Point32", x=1, y=2, z=3)]},
     {"": (("points[0].x", "points[0].y", "points[0].z"), [1, 2, 3])}),
])
def test_types_that_robots_speak(tmp_path, kind, given, expected):
    message = make(kind, **{key: value for key, value in given.items() if not key.startswith("__")})
    episode = one(tmp_path, kind, message, message)
    assert {stream.removeprefix("/t") for stream in episode.streams} == set(expected)
    for suffix, (names, values) in expected.items():
        stream = episode.streams["/t" + suffix]
        assert stream.names == names
        np.testing.assert_array_equal(stream.values, [values, values])
    if "header" in given:
        seconds = 0 if kind.endswith("TransformStamped") else 1
        assert episode.streams["/t" + suffix].clocks["header"].tolist() == [seconds, seconds]


def test_a_type_of_ones_own(tmp_path):
    store = get_typestore(Stores.ROS2_HUMBLE)
    store.register(get_types_from_msg(
        "uint8 OPEN=1\nstd_msgs/Header header\nstring label\nMotor[2] motor\nbool on\ngeometry_msgs/Pose tip\n"
        "builtin_interfaces/Duration age\n" + "=" * 80 + "\nMSG: my/Motor\nfloat32 q\nfloat32 dq", "my/msg/State"))
    motors = [make("my/msg/Motor", store, q=1.5, dq=2), make("my/msg/Motor", store, q=3, dq=4)]
    message = make("my/msg/State", store, header=header(START, store), label="ready", motor=motors, on=True,
                   tip=GIVEN_POSE, age=make("builtin_interfaces/msg/Duration", store, sec=3, nanosec=0))
    stream = one(tmp_path, "my/msg/State", message, store=store).streams["/t"]
    assert stream.names == ("motor[0].q", "motor[0].dq", "motor[1].q", "motor[1].dq", "on",
                            *(f"tip.{axis}" for axis in POSE), "age")
    assert stream.values.tolist() == [[1.5, 2, 3, 4, 1, *POSE_VALUES, 3]]
    assert stream.clocks["header"].tolist() == [0]


@pytest.mark.parametrize(("kind", "given", "reason"), [
    ("sensor_msgs/msg/PointCloud2", {"data": np.zeros(5000, np.uint8)}, "with more than 4096 numbers"),
    ("std_msgs/msg/Empty", {}, "without numbers"),
    ("trajectory_msgs/msg/JointTrajectory", {}, "without points"),
    ("std_msgs/msg/Float32MultiArray", {}, "without values"),
    ("sensor_msgs/msg/Image", {"encoding": "bayer_rggb8"}, "with encoding 'bayer_rggb8', known are mono8, rgb8"),
    ("sensor_msgs/msg/Image", {"encoding": "16UC1"}, "with encoding '16UC1', known are mono8, rgb8"),
    ("sensor_msgs/msg/Image", {"encoding": "rgb8", "height": 2, "width": 2, "step": 6,
                               "data": np.zeros(11, np.uint8)}, "with fewer bytes than their size needs"),
    ("sensor_msgs/msg/Image", {"encoding": "rgb8", "height": 2, "width": 2, "step": 5,
                               "data": np.zeros(99, np.uint8)}, "with fewer bytes than their size needs"),
    ("sensor_msgs/msg/Image", {"encoding": "rgb8"}, "with fewer bytes than their size needs"),
    ("sensor_msgs/msg/Image", {"encoding": "yuv422", "height": 1, "width": 3, "step": 6,
                               "data": np.zeros(6, np.uint8)}, "in YUV 4:2:2 with an odd width"),
    ("sensor_msgs/msg/CompressedImage", {"format": "16UC1; compressedDepth", "data": np.zeros(30, np.uint8)},
     "whose pictures are neither JPEG nor PNG"),
])
def test_what_becomes_no_stream(tmp_path, kind, given, reason):
    refused = one(tmp_path, kind, make(kind, **given), make(kind, **given))
    assert refused.reason.startswith(f"no topic that can be read; /t: 2 messages {reason}")


def test_two_types_on_one_topic(tmp_path):
    messages = [("/t", "std_msgs/msg/Bool", START, make("std_msgs/msg/Bool", data=True)),
                ("/t", "std_msgs/msg/Float64", START, make("std_msgs/msg/Float64", data=0.5))]
    episode = read(write_bag(tmp_path / "bag", messages))
    assert episode.streams["/t"].values.tolist() == [[1]]
    assert episode.problems[0] == ("/t: 1 messages of type std_msgs/msg/Float64, where others of /t are "
                                   "std_msgs/msg/Bool")
