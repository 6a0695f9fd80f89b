import contextlib
import json
import random
from pathlib import Path

import h5py
import numpy as np
import pytest

from data.logs import hdf5_process, minari
from data.logs.streams import Kind, LogEpisode, Refused
from data.types import Success, UserError
from tests.logs.damage import flipped, well_formed

SHARED = Path(__file__).parents[3] / "shared/logs/derived_conformance"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="no sample logs in ../shared/logs beside the repository")
RNG = np.random.default_rng(0)


def write_set(folder, episodes=2, steps=4, *, success=None, metadata=None, **more):
    """As Minari writes them: nested dictionaries are groups, tuples are groups of ``_index_<i>``."""
    data = folder / "data"
    data.mkdir(parents=True)
    with h5py.File(data / "main_data.hdf5", "w", track_order=True) as file:
        for number in range(episodes):
            group = file.create_group(f"episode_{number}")
            group.attrs.update({"id": number, "total_steps": steps, "seed": 7 + number})
            for name, values in {
                "observations/robot/q": RNG.normal(size=(steps + 1, 3)),
                "observations/_index_0": np.arange(steps + 1) + 10 * number,
                "observations/camera": RNG.integers(0, 256, (steps + 1, 6, 5, 3), np.uint8),
                "actions": RNG.normal(size=(steps, 2)).astype("f4"), "rewards": RNG.random(steps),
                "terminations": np.zeros(steps, bool), "truncations": np.arange(steps) == steps - 1,
                **({"infos/success": np.array(success[number])} if success else {}), **more}.items():
                group.create_dataset(name, data=values, chunks=True, maxshape=(None, *np.shape(values)[1:]))
            group.create_dataset("observations/mission", data=["go"] * (steps + 1), dtype=h5py.string_dtype())
    (data / "metadata.json").write_text(json.dumps({
        "total_episodes": episodes, "total_steps": episodes * steps, "data_format": "hdf5", "minari_version": "0.5.4",
        "dataset_id": "door/human-v2", "env_spec": json.dumps({"id": "AdroitHandDoor-v1", "entry_point": "os:system"}),
        **(metadata or {})}))
    return folder


def read(path):
    return list(minari.open_log(path).episodes())


def test_nested_observations_have_one_row_more(tmp_path):
    folder = write_set(tmp_path / "door/human-v2", episodes=11)
    for path in (folder, folder / "data", folder / "data/main_data.hdf5"):
        assert minari.sniff(path) == "Minari"
    assert minari.sniff(tmp_path) is minari.sniff(tmp_path / "door") is minari.sniff(tmp_path / "missing") is None
    episodes = read(folder)
    assert [episode.name for episode in episodes] == [f"episode_{number}" for number in range(11)]
    with h5py.File(folder / "data/main_data.hdf5") as file:
        for episode in episodes:
            group = file[episode.name]
            assert set(episode.streams) == {
                "observations/robot/q", "observations/_index_0", "observations/camera", "observations/mission",
                "actions", "rewards", "terminations", "truncations"}
            for name, stream in episode.streams.items():
                rows = 5 if name.startswith("observations") else 4
                assert {key: list(clock) for key, clock in stream.clocks.items()} == {"index": list(range(rows))}
                if stream.kind is Kind.VECTOR:
                    np.testing.assert_array_equal(stream.values, group[name][:].reshape(rows, -1))
            np.testing.assert_array_equal(list(episode.streams["observations/camera"].pictures([0, 4])),
                                          group["observations/camera"][:][[0, 4]])
            assert episode.streams["observations/mission"].texts == ("go",) * 5
    assert (episodes[1].task, episodes[1].problems, episodes[1].success) == ("AdroitHandDoor-v1", (), Success.UNKNOWN)
    assert episodes[1].facts == {"format": "Minari", "file": "main_data.hdf5", "rows": 4, "clock": "none", "seed": 8}
    assert len({episode.sha256 for episode in episodes}) == 11


@pytest.mark.parametrize(("success", "expected"), [
    ([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]], ["yes", "no"]), ([[0] * 5, [0] * 5], ["unknown"] * 2),
    ([[0, 0, 0.5, 0, 0], [0, 1, 0, 0, 0]], ["unknown"] * 2), (None, ["unknown"] * 2)])
def test_success_is_what_infos_say(tmp_path, success, expected):
    assert [str(episode.success) for episode in read(write_set(tmp_path / "a-v0", success=success))] == expected


def test_infos_as_texts(tmp_path):
    """As newer versions write them: one JSON text per row."""
    folder = write_set(tmp_path / "a-v0")
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        file["episode_0"].create_dataset("infos", data=['{"a": 1}'] * 5, dtype=h5py.string_dtype())
    assert read(folder)[0].streams["infos"].texts == ('{"a": 1}',) * 5


@pytest.mark.parametrize(("name", "rows", "reason"), [
    ("observations/extra", 4, "observations/extra has 4 rows, expected 5: one more than the steps"),
    ("actions", 3, "actions has 3 rows, expected 4 like the others; half-written?")])
def test_rows_that_do_not_line_up_are_refused(tmp_path, name, rows, reason):
    folder = write_set(tmp_path / "a-v0")
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        if name in file["episode_1"]:
            del file[f"episode_1/{name}"]
        file[f"episode_1/{name}"] = np.zeros((rows, 2))
    first, second = read(folder)
    assert isinstance(first, LogEpisode)
    assert second == Refused(name="episode_1", reason=reason)


def test_metadata_that_contradict_the_file(tmp_path):
    folder = write_set(tmp_path / "a-v0", metadata={"total_episodes": 9}, extra=np.zeros(2))
    with h5py.File(folder / "data/main_data.hdf5", "a") as file:
        file["episode_0"].attrs["total_steps"] = 99
        file["episode_1x/observations"] = np.zeros((3, 2))
        file["episode_2"] = h5py.ExternalLink("additional_data_0.hdf5", "episode_2")
    first, second, third, strange, counted = read(folder)
    assert first.problems == ("extra: 1 skipped, not of 4 or 5 rows", "total_steps says 99, found 4 rows")
    assert isinstance(second, LogEpisode)
    assert (third.name, third.reason.split(";")[0]) == ("episode_2", "no rows of rewards or actions")
    assert strange == Refused(name="episode_1x", reason="expected a group episode_<number>")
    assert counted == Refused(name="metadata.json", reason="counts 9 episodes, found 3")


@pytest.mark.parametrize("content", [None, "", "[1, 2]", '{"env_spec": 5, "dataset_id": ["/home/me"]}', "[" * 100_000])
def test_metadata_may_be_missing_or_damaged(tmp_path, content):
    folder = write_set(tmp_path / "a-v0")
    file = folder / "data/metadata.json"
    file.unlink() if content is None else file.write_text(content)
    assert [episode.task for episode in read(folder)] == ["", ""]


def test_no_set_is_an_error(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/main_data.hdf5").write_bytes(b"no HDF5")
    assert minari.sniff(tmp_path) is None
    with h5py.File(tmp_path / "data/other.hdf5", "w") as file:
        file["x"] = [1]
    with h5py.File(tmp_path / "main_data.hdf5", "w") as file:
        file["x"] = [1]
    for path in (tmp_path / "missing", tmp_path / "data", tmp_path / "data/other.hdf5", tmp_path):
        with pytest.raises(UserError, match=r"expected a Minari set[^\n]+$"):
            minari.open_log(path)
    assert minari.sniff(tmp_path / "data/other.hdf5") is None


def test_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(hdf5_process, "WAIT_S", 5.0)
    path = write_set(tmp_path / "a-v0", episodes=2, steps=2) / "data/main_data.hdf5"
    whole = path.read_bytes()
    random_state = random.Random(1)
    damaged = [whole[: len(whole) * part // 50] for part in range(50)]
    for _ in range(60):
        damaged.append(flipped(whole, random_state))
    for content in damaged:
        path.write_bytes(content)
        minari.sniff(path)
        with contextlib.suppress(UserError):
            well_formed(read(path))


@needs_shared
def test_sample():
    """Against h5py."""
    folder = SHARED / "minari/derived/tiny-v0"
    assert minari.sniff(SHARED / "minari") is None
    with h5py.File(folder / "data/main_data.hdf5") as file:
        episodes = read(folder)
        assert [episode.name for episode in episodes] == list(file)
        for episode in episodes:
            assert len(episode.streams["observations"]) == len(episode.streams["actions"]) + 1
            for name in ("observations", "actions"):
                np.testing.assert_array_equal(episode.streams[name].values, file[episode.name][name][:])
