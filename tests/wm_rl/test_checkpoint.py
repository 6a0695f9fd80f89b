"""Resume points: whole or absent, the newest few, and a clear word about a damaged one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.types import UserError
from wm_rl.checkpoint import load_checkpoint, save_checkpoint


def test_the_newest_of_the_kept(tmp_path):
    assert load_checkpoint(tmp_path) is None
    for number in (1, 2, 10):
        save_checkpoint(tmp_path, number, {"weights": torch.full((2,), number), "n": number}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10.pt", "2.pt"]
    assert load_checkpoint(tmp_path)["n"] == 10


def test_a_cut_write_is_not_seen_and_a_damaged_file_is_named(tmp_path):
    save_checkpoint(tmp_path, 1, {"n": 1}, keep=2)
    (tmp_path / "2.pt.partial").write_bytes(b"half")
    assert load_checkpoint(tmp_path)["n"] == 1
    (tmp_path / "2.pt").write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"2\.pt is damaged .* mv "):
        load_checkpoint(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    generator = torch.Generator().manual_seed(0)
    save_checkpoint(folder, 1, {"weights": torch.randn(300, generator=generator), "progress": {"stage": 3}}, keep=1)
    return folder


def refused(folder):
    with pytest.raises(UserError, match=r"1\.pt is damaged \(.*checksum.*\); move it away .* mv ") as caught:
        load_checkpoint(folder)
    assert "\n" not in str(caught.value)


@given(data=st.data())
def test_any_flipped_bit_is_noticed(saved, data):
    path = saved / "1.pt"
    whole = path.read_bytes()
    place, bit = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, 7))
    try:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1:])
        refused(saved)
    finally:
        path.write_bytes(whole)
    assert load_checkpoint(saved)["progress"] == {"stage": 3}


@given(data=st.data())
def test_any_truncation_and_anything_appended_is_noticed(saved, data):
    path = saved / "1.pt"
    whole = path.read_bytes()
    other = data.draw(st.integers(0, len(whole) - 1).map(lambda n: whole[:n]) | st.binary(min_size=1).map(
        lambda more: whole + more))
    try:
        path.write_bytes(other)
        refused(saved)
    finally:
        path.write_bytes(whole)


def test_a_damaged_one_is_left_behind_as_its_message_says(tmp_path):
    for number in (1, 2):
        save_checkpoint(tmp_path, number, {"n": number}, keep=2)
    (tmp_path / "2.pt").write_bytes((tmp_path / "2.pt").read_bytes()[:-1])
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path)
    _, source, target = str(caught.value).split(": ")[-1].split(" ")
    (tmp_path / source).rename(target)
    assert load_checkpoint(tmp_path)["n"] == 1
    save_checkpoint(tmp_path, 2, {"n": 22}, keep=2)
    assert load_checkpoint(tmp_path)["n"] == 22


@pytest.mark.parametrize("died_in", ["torch.save", "os.fsync", "pathlib.Path.rename"])
def test_whenever_the_writer_dies_the_one_before_is_there(died_in, tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"n": 1}, keep=1)

    def dies(*arguments):
        if died_in == "torch.save":
            arguments[1].write(b"the first half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(died_in, dies)
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(tmp_path, 2, {"n": 2}, keep=1)
    assert load_checkpoint(tmp_path)["n"] == 1
    save_checkpoint(tmp_path, 2, {"n": 2}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["2.pt"]
    assert load_checkpoint(tmp_path)["n"] == 2


def test_no_code_is_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    save_checkpoint(tmp_path, 1, {"evil": Evil()}, keep=1)
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path)
