"""Resume points: whole or absent, the newest few, and a clear word about a damaged one."""

import pytest
import torch

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


def test_no_code_is_loaded(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"evil": Evil()}, tmp_path / "1.pt")
    with pytest.raises(UserError, match="damaged"):
        load_checkpoint(tmp_path)
