import contextlib
import io
import json
import random

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tensorboard.summary.writer.record_writer import RecordWriter

from data.logs import rlds, tfrecord
from data.logs.streams import Kind, LogEpisode, Refused
from data.types import Success, UserError
from tests.logs.damage import flipped, well_formed

RNG = np.random.default_rng(0)


def example_class():
    """``tf.train.Example`` of Google's own protobuf, for an independent writer."""
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="test", syntax="proto3")
    field = descriptor_pb2.FieldDescriptorProto
    for kind, element in (("BytesList", field.TYPE_BYTES), ("FloatList", field.TYPE_FLOAT),
                          ("Int64List", field.TYPE_INT64)):
        file.message_type.add(name=kind).field.add(name="value", number=1, type=element, label=field.LABEL_REPEATED)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, kind in enumerate(("bytes_list", "float_list", "int64_list"), 1):
        feature.field.add(name=kind, number=number, type=field.TYPE_MESSAGE, label=field.LABEL_OPTIONAL, oneof_index=0,
                          type_name=f".test.{kind.title().replace('_', '')}")
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=field.TYPE_STRING, label=field.LABEL_OPTIONAL)
    entry.field.add(name="value", number=2, type=field.TYPE_MESSAGE, label=field.LABEL_OPTIONAL,
                    type_name=".test.Feature")
    features.field.add(name="feature", number=1, type=field.TYPE_MESSAGE, label=field.LABEL_REPEATED,
                       type_name=".test.Features.FeatureEntry")
    file.message_type.add(name="Example").field.add(
        name="features", number=1, type=field.TYPE_MESSAGE, label=field.LABEL_OPTIONAL, type_name=".test.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("test.Example"))


Example = example_class()


def serialize(features):
    example = Example()
    for name, values in features.items():
        feature = example.features.feature[name]
        if isinstance(values, list):
            feature.bytes_list.value.extend(values)
        elif values.dtype.kind == "f":
            feature.float_list.value.extend(values.ravel().tolist())
        else:
            feature.int64_list.value.extend(values.ravel().astype(int).tolist())
    return example.SerializeToString()


def write_records(path, records):
    with path.open("wb") as file:
        writer = RecordWriter(file)
        for record in records:
            writer.write(record)
    return path


def frames(steps):
    level = np.arange(steps)[:, None, None, None] * 20 + np.linspace(0, 60, 16)[None, :, None, None]
    return np.broadcast_to(level + np.array([0, 40, 80]), (steps, 16, 16, 3)).astype(np.uint8)


def encode(frame, kind):
    content = io.BytesIO()
    Image.fromarray(frame).save(content, kind)
    return content.getvalue()


def episode(steps=5, *, reward=None, sentence="pick the cup", codec="PNG", **more):
    return {
        "steps/observation/image": [encode(frame, codec) for frame in frames(steps)],
        "steps/observation/state": RNG.normal(size=(steps, 3)).astype("f4"),
        "steps/observation/pose": RNG.normal(size=(steps, 2, 2)).astype("f4"),
        "steps/action": RNG.normal(size=(steps, 7)).astype("f4"),
        "steps/reward": np.array([0] * steps if reward is None else reward, "f4"),
        "steps/is_first": np.arange(steps) == 0, "steps/is_terminal": np.arange(steps) == steps - 1,
        "steps/mode": np.arange(steps) - 2,
        "steps/language_instruction": [sentence.encode()] * steps,
        "episode_metadata/file_path": [b"/home/somebody/run_3/"], "episode_metadata/episode_id": np.array([42]), **more}


def tensor(dtype, *shape):
    return {"pythonClassName": "tensorflow_datasets.core.features.tensor_feature.Tensor",
            "tensor": {"dtype": dtype, "encoding": "none", "shape": {"dimensions": list(map(str, shape))}}}


def features_dict(**features):
    return {"pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
            "featuresDict": {"features": features}}


FEATURES = features_dict(
    episode_metadata=features_dict(file_path={"text": {}}, episode_id=tensor("int64")),
    steps={"pythonClassName": "tensorflow_datasets.core.features.dataset_feature.Dataset", "sequence": {
        "length": "-1", "feature": features_dict(
            observation=features_dict(
                image={"image": {"shape": {"dimensions": ["16", "16", "3"]}, "dtype": "uint8",
                                 "encodingFormat": "png"}},
                state=tensor("float64", 3), pose=tensor("float32", 2, 2)),
            action=tensor("float32", 7), reward=tensor("float32"), is_first=tensor("bool"), is_terminal=tensor("bool"),
            mode={"classLabel": {"numClasses": "3"}}, language_instruction={"text": {}},
            raw=tensor("uint8", 8, 8, 3))}})


def write_set(folder, shards, *, features=FEATURES, info=None, split="train"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, episodes in enumerate(shards):
        name = f"cups-{split}.tfrecord-{number:05}-of-{len(shards):05}"
        write_records(folder / name, [serialize(each) for each in episodes])
    if features is not None:
        (folder / "features.json").write_text(json.dumps(features))
    if info is not None:
        (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def read(path):
    return list(rlds.open_log(path).episodes())


@pytest.mark.parametrize("features", [FEATURES, None], ids=["features.json", "lengths"])
def test_episodes(tmp_path, features):
    raw = RNG.integers(0, 256, (5, 8, 8, 3))
    shards = [[episode(), episode(3, codec="JPEG")], [], [episode() | {"steps/raw": raw}]]
    folder = write_set(tmp_path / "cups/1.0.0", shards, features=features)
    assert rlds.sniff(folder) == rlds.open_log(folder).format == "RLDS (TFRecord)"
    found = read(folder)
    assert [each.name for each in found] == [
        "cups-train.tfrecord-00000-of-00003 record 0", "cups-train.tfrecord-00000-of-00003 record 1",
        "cups-train.tfrecord-00002-of-00003 record 0"]
    for each, expected in zip(found, [*shards[0], *shards[2]], strict=True):
        steps = len(expected["steps/is_first"])
        assert set(each.streams) == {name for name in expected if name.startswith("steps/")}
        for name in ("observation/state", "observation/pose", "action", "reward", "is_first", "is_terminal", "mode"):
            np.testing.assert_array_equal(each.streams[f"steps/{name}"].values,
                                          expected[f"steps/{name}"].reshape(steps, -1))
        np.testing.assert_array_equal(each.streams["steps/action"].clocks["index"], np.arange(steps))
        camera = each.streams["steps/observation/image"]
        assert (camera.kind, camera.size) == (Kind.IMAGE, (16, 16))
        np.testing.assert_allclose(list(camera.pictures(range(steps))), frames(steps), atol=8)
        assert each.streams["steps/language_instruction"].texts == ("pick the cup",) * steps
        assert (each.instruction, each.success, each.problems) == ("pick the cup", Success.UNKNOWN, ())
        assert each.facts["episode_metadata/episode_id"] == 42
        assert "somebody" not in json.dumps(each.facts)
    raw_stream = found[2].streams["steps/raw"]
    if features:  # else nothing tells that these 192 numbers are a picture
        np.testing.assert_array_equal(list(raw_stream.pictures(range(5))), raw)
    else:
        np.testing.assert_array_equal(raw_stream.values, raw.reshape(5, -1))
    (alone,) = read(folder / "cups-train.tfrecord-00002-of-00003")
    assert alone.sha256 == found[2].sha256
    well_formed(found)


@pytest.mark.parametrize(("rewards", "expected"), [
    (([0, 0, 1], [0, 0, 0]), ["yes", "no"]), (([0, 0, 0], [0, 0, 0]), ["unknown"] * 2),
    (([0, 0, 1], [0, 0.5, 0]), ["unknown"] * 2)])
def test_success_of_rewards(tmp_path, rewards, expected):
    folder = write_set(tmp_path / "a", [[episode(3, reward=reward)] for reward in rewards])
    assert [str(each.success) for each in read(folder)] == expected


def test_success_of_metadata_counts_first(tmp_path):
    episodes = [episode(3, reward=[0, 0, 1]) | {"episode_metadata/success": np.array([flag])} for flag in (0, 1)]
    found = read(write_set(tmp_path / "a", [episodes]))
    assert [each.success for each in found] == [Success.NO, Success.YES]
    assert found[0].success_from == "episode_metadata/success"


@pytest.mark.parametrize(("change", "instruction", "count"), [
    ({"steps/language_instruction": [b"", b"open  it\n", b"close it"]}, "open it", 2),
    ({"steps/language_instruction": [b"\xff\xfe"] * 3}, "", None),
    ({"steps/language_instruction": [], "language_instruction": [b"go"]}, "go", None),
    ({"steps/observation/natural_language_instruction": [b"go"] * 3, "steps/language_instruction": []}, "go", None)])
def test_instructions(tmp_path, change, instruction, count):
    (found,) = read(write_set(tmp_path / "a", [[episode(3) | change]], features=None))
    assert (found.instruction, found.facts.get("instructions")) == (instruction, count)


def test_what_is_skipped(tmp_path):
    depth = io.BytesIO()
    Image.fromarray(np.full((8, 8), 9000, np.uint16)).save(depth, "PNG")
    more = {"steps/ragged/ragged_flat_values": np.arange(7), "steps/ragged/ragged_row_lengths_0": np.arange(3),
            "steps/depth": [depth.getvalue()] * 3, "steps/blob": [b"\x80\x04\xff"] * 3,
            "steps/../../evil": np.arange(3), "steps/none": np.zeros(0)}
    (found,) = read(write_set(tmp_path / "a", [[episode(3) | more]], features=None))
    assert set(found.streams) == {*(name for name in episode() if name.startswith("steps/")),
                                  "steps/ragged/ragged_row_lengths_0"}
    assert set(found.problems) == {
        "steps/ragged/ragged_flat_values: 1 skipped, of 7 numbers for 3 steps",
        "steps/depth: 1 skipped, of pictures in mode I;16, not in colours of 8 bits",
        "steps/blob: 1 skipped, of bytes that are neither a picture nor a text",
        "steps/../../evil: 1 skipped, with a name that is none", "steps/none: 1 skipped, empty"}
    (found,) = read(write_set(tmp_path / "b", [[episode(3) | more]]))
    assert any(problem.endswith("5 skipped, not in features.json as a list of one shape") for problem in found.problems)


@pytest.mark.parametrize(("change", "reason"), [
    ({"steps/action": np.zeros(20, "f4")}, "steps/action has 20 values, expected a multiple of [7]"),
    ({"steps/action": np.zeros(28, "f4")}, "has 3 steps"),
    ({"steps/reward": np.zeros(2, "f4")}, "steps/reward has 2 steps")])
def test_features_that_do_not_agree_are_refused(tmp_path, change, reason):
    first, second = read(write_set(tmp_path / "a", [[episode(3) | change, episode(3)]]))
    assert reason in first.reason
    assert isinstance(second, LogEpisode)


def test_features_json_of_another_set(tmp_path):
    (refused,) = read(write_set(tmp_path / "a", [[episode()]], features=features_dict(
        steps={"sequence": {"feature": features_dict(torque=tensor("float32", 2))}})))
    assert refused.reason.startswith("no steps, or none that features.json describes")


@pytest.mark.parametrize("content", ["", "[]", '{"featuresDict": 5}', '{"featuresDict": {"features": {"steps": []}}}',
                                     '{"featuresDict": {"features": {"steps": {"sequence": {"feature": {"tensor": '
                                     '{"shape": {"dimensions": [[], "x"]}}}}}}}}', "[" * 100_000])
def test_damaged_metadata_are_none(tmp_path, content):
    folder = write_set(tmp_path / "a", [[episode()]], features=None)
    for name in ("features.json", "dataset_info.json"):
        (folder / name).write_text(content)
    (found,) = read(folder)
    assert len(found.streams) == 9
    assert found.facts["shapes"] == "lengths of the lists"


def test_a_bad_checksum_costs_its_record(tmp_path):
    folder = write_set(tmp_path / "a", [[episode(2), episode(3), episode(4)]])
    (file,) = folder.glob("*.tfrecord*")
    content = bytearray(file.read_bytes())
    records = list(tfrecord.read_records(file))
    content[records[1].offset + 50] ^= 1
    file.write_bytes(content)
    first, second, third = read(folder)
    assert (first.facts["rows"], third.facts["rows"]) == (2, 4)
    assert second == Refused(name=f"{file.name} record 1",
                             reason=f"the record at byte {records[1].offset - 12} does not fit its checksum")
    content[records[1].offset - 12] ^= 1  # its length: where the next one begins cannot be told
    file.write_bytes(content)
    first, rest = read(folder)
    assert isinstance(first, LogEpisode)
    assert rest.name == f"{file.name} from record 1 on"
    assert "length of the record" in rest.reason


def test_a_cut_file_yields_what_is_whole(tmp_path):
    file = write_records(tmp_path / "a.tfrecord", [serialize(episode(2)), serialize(episode(3))])
    whole = file.read_bytes()
    second = list(tfrecord.read_records(file))[1].offset
    for size in (second - 6, second, second + 100, len(whole) - 1):
        file.write_bytes(whole[:size])
        first, rest = read(file)
        assert isinstance(first, LogEpisode)
        assert rest.name == "a.tfrecord from record 1 on"
        assert f"the file ends at byte {size}" in rest.reason
    file.write_bytes(whole[: second - 12])
    assert len(read(file)) == 1
    file.write_bytes(whole[:100])
    assert rlds.sniff(file) == "RLDS (TFRecord)"
    with pytest.raises(UserError, match=r"found no whole record[^\n]+$"):
        rlds.open_log(file)


def test_missing_shards_and_records(tmp_path):
    folder = write_set(tmp_path / "a", [[episode()]] * 5, info={"splits": [
        {"name": "val", "shardLengths": ["7"]}, {"name": "train", "shardLengths": ["1", "3", "1", "x"]}]})
    for number in (2, 3):
        (folder / f"cups-train.tfrecord-{number:05}-of-00005").unlink()
    found = read(folder)
    assert [each for each in found if isinstance(each, Refused)] == [
        Refused(name="cups-train.tfrecord-00001-of-00005",
                reason="dataset_info.json counts 3 episodes in it, found 1; half-copied?"),
        Refused(name="split train", reason="shards 2-3 of 5 are missing")]
    assert len(found) == 5


def test_what_is_no_rlds_set(tmp_path):
    (tmp_path / "text.tfrecord").write_text("hello, this is no record")
    write_records(tmp_path / "images", [serialize({"image": [b"x"]})])
    write_records(tmp_path / "events", [b"\x09\x00\x00\x80\x9f\x17\x1d\xdaA\x1a\rbrain.Event:2"])
    (tmp_path / "empty.tfrecord").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for name in ("images", "events", "empty.tfrecord", "folder", "missing"):
        assert rlds.sniff(tmp_path / name) is None
        with pytest.raises(UserError, match=r"expected RLDS episodes in TFRecord files, found [^\n]+$"):
            rlds.open_log(tmp_path / name)
    with pytest.raises(UserError, match="no whole record"):
        rlds.open_log(tmp_path / "text.tfrecord")


def test_damaged_pictures_are_named(tmp_path):
    change = episode(3)
    change["steps/observation/image"][1] = change["steps/observation/image"][1][:60]
    folder = write_set(tmp_path / "a", [[change]])
    (found,) = read(folder)
    camera = found.streams["steps/observation/image"]
    assert len(list(camera.pictures([0, 2]))) == 2
    with pytest.raises(ValueError, match=r"^steps/observation/image: picture 1 cannot be decoded \([^\n]+\)$"):
        list(camera.pictures([1]))
    next(folder.glob("*.tfrecord*")).unlink()
    with pytest.raises(ValueError, match="picture 0 cannot be decoded"):
        list(camera.pictures([0]))


@given(st.dictionaries(st.text(max_size=8), st.one_of(
    st.lists(st.binary(max_size=5), max_size=4),
    st.lists(st.floats(width=32), min_size=1, max_size=4).map(lambda values: np.array(values, "f4")),
    st.lists(st.integers(-2**63, 2**63 - 1), min_size=1, max_size=4).map(lambda values: np.array(values, "i8"))),
    max_size=4))
def test_examples_survive(features):
    record = serialize(features)
    found = tfrecord.parse_example(record)
    assert found.keys() == features.keys()
    for name, values in features.items():
        if isinstance(values, list):
            assert [record[at] for at in found[name]] == values
        else:
            np.testing.assert_array_equal(found[name], values)
        only = tfrecord.parse_example(record, only=name)
        assert only.keys() == {name}


def test_lists_that_are_not_packed():
    """As protobuf lets a writer have them."""
    def field(number, content):
        return bytes([number << 3 | 2, len(content)]) + content

    integers = field(3, b"\x08\x01\x08\x96\x01\x08" + b"\xff" * 9 + b"\x01")
    floats = field(2, b"\x0d" + np.float32(1.5).tobytes() + b"\x0d" + np.float32(-2).tobytes())
    entries = b"".join(field(1, field(1, name) + field(2, content)) for name, content in
                       ((b"i", integers), (b"f", floats)))
    found = tfrecord.parse_example(field(1, entries))
    assert found["i"].tolist() == [1, 150, -1]
    assert found["f"].tolist() == [1.5, -2.0]


@given(st.binary(max_size=60))
def test_bytes_that_are_no_example(content):
    with contextlib.suppress(ValueError):
        tfrecord.parse_example(content)


def test_damage(tmp_path):
    """Cut anywhere, or with any bits flipped, also such that the checksums hold."""
    file = write_records(tmp_path / "a.tfrecord", [serialize(episode(2)), serialize(episode(3, codec="JPEG"))])
    (tmp_path / "features.json").write_text(json.dumps(FEATURES))
    whole = file.read_bytes()
    record = next(tfrecord.read_records(file)).content
    random_state = random.Random(0)

    def check():
        rlds.sniff(file)
        with contextlib.suppress(UserError):
            well_formed(read(file))

    for part in range(50):
        file.write_bytes(whole[: len(whole) * part // 50])
        check()
    for _ in range(150):
        file.write_bytes(flipped(whole, random_state))
        check()
        write_records(file, [flipped(record, random_state)])
        check()
    features = (tmp_path / "features.json").read_bytes()
    file.write_bytes(whole)
    for _ in range(50):
        (tmp_path / "features.json").write_bytes(flipped(features, random_state))
        check()
