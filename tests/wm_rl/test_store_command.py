import dataclasses

import numpy as np
import pytest

from data.logs.ingest import IngestConfig, ingest
from data.store import ReplayStore
from data.types import Source, Success, UserError
from tests import examples
from wm_rl import cli
from wm_rl.commands.store import store_tool
from world_model.config import WorldModelConfig
from world_model.learner import WorldModelLearner

DEFAULTS = {"budget_bytes": None, "repair": False, "to": None, "source": None, "task": None, "codec": "zstd",
            "quality": 90, "keep_newest": 0, "model": None, "success_threshold": 0.5, "success_frames": 2}


@pytest.fixture
def store(tmp_path):
    with examples.store(tmp_path / "s") as made:
        return made


def tool(path, action, **settings):
    return store_tool(action=action, store=str(path), **(DEFAULTS | settings))


def test_info_counts_what_there_is(store, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tool(store.path, "compact", keep_newest=0)
    store.refresh()
    store.append([examples.trajectory(3, 9, Source.SIM)])
    capsys.readouterr()
    assert tool(store.path, "info", budget_bytes=10**9) == 0
    said = capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if "sim" in line and "no" in line]
    assert [cell.strip() for cell in line.strip("│").split("│")][:6] == ["sim", "reach", "no", "1 to 3", "3", "23"]
    assert "13 episodes, 87 steps in 4 segments: 1 open, 0 sealed, 3 cold" in said
    assert "% of 1.0 GB" in said


def test_an_empty_store_has_info(tmp_path, capsys):
    ReplayStore.create(tmp_path / "s", spec=examples.SPEC, statistics=examples.STATISTICS, embodiment="toy")
    assert tool(tmp_path / "s", "info") == 0
    assert "0 episodes, 0 steps in 0 segments" in capsys.readouterr().out
    assert tool(tmp_path / "s", "verify") == 0
    with pytest.raises(UserError, match="nothing to export"):
        tool(tmp_path / "s", "export", to=str(tmp_path / "log"))


def test_verify_says_by_its_exit_code_that_damage_is_left(store, capsys):
    assert tool(store.path, "verify") == 0
    file = store.path / "seg/00000001/reward/c.0"
    content = bytearray(file.read_bytes())
    content[3] ^= 4
    file.write_bytes(content)
    assert tool(store.path, "verify") == 1
    said = capsys.readouterr().out
    assert "seg/00000001: reward: differs from its checksum (episodes 0 of 4)" in said
    assert "action=verify repair=true" in said
    assert tool(store.path, "verify", repair=True) == 0
    assert "3 episodes are in segment 00000003 now, 1 episodes lost" in capsys.readouterr().out
    assert tool(store.path, "verify") == 0


@pytest.mark.parametrize("cold", [False, True])
def test_an_export_comes_back_through_ingest(store, tmp_path, cold):
    if cold:
        tool(store.path, "compact")
    assert tool(store.path, "export", to=str(tmp_path / "log"), source="sim", task="reach") == 0
    config = IngestConfig(image_size=16, cameras=None, embodiment=None, action_range="quantile", clip=False)
    report = ingest(tmp_path / "log", tmp_path / "again", config)
    assert (report.added, report.refused) == (4, {})
    again = ReplayStore.open(tmp_path / "again")
    sims = np.flatnonzero(store.episodes.source == "sim")
    assert again.episodes.length.tolist() == store.episodes.length[sims].tolist()
    for index, episode in enumerate(sims):
        read, given = again.trajectory(index), store.trajectory(int(episode))
        assert read.frames["front"].shape == given.frames["front"].shape
        np.testing.assert_allclose(again.statistics.denormalise(read.action), given.action, atol=1e-5)
        assert (read.success, read.instruction) == (given.success, given.instruction)


def test_compact_keeps_the_newest_and_says_what_it_saved(store, capsys):
    assert tool(store.path, "compact", codec="jpeg", keep_newest=1) == 0
    assert "no source has more than keep_newest=1 sealed segments that are hot" in capsys.readouterr().out
    assert tool(store.path, "compact", codec="jpeg") == 0
    assert "3 segments are cold now" in capsys.readouterr().out
    assert {segment.tier for segment in ReplayStore.open(store.path).segments} == {"cold"}


MISTAKES = [
    (["action=inof"], "action: expected info, verify, export, compact, label_success or revoke_labels, got 'inof'; "
                        "type action=info"),
    (["action=label_success"], "label_success needs a success model: type model=<folder"),
    (["action=label_success", "model=nowhere"], "no world model at nowhere"),
    (["action=label_success", "model=nowhere", "success_frames=0"], "success_frames of at least 1, got 0.5"),
    (["action=export"], "export needs a destination: type to=<folder>"),
    (["action=export", "to=log", "source=siml"], "source: expected sim, real or imagined, got 'siml'"),
    (["action=export", "to=log", "task=push"], "task: expected one of reach, got 'push'"),
    (["action=export", "to=s"], "s exists already"),
    (["action=compact", "codec=gzip"], "codec: expected zstd or jpeg, got 'gzip'; type codec=zstd"),
    (["action=compact", "codec=jpeg", "quality=100"], "quality: expected 1 to 95, got 100"),
    (["action=verify", "store=nowhere"], "no replay store at nowhere"),
    (["action=info", "kep_newest=3"], "did you mean 'keep_newest'?"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_line(words, said, store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    argv = ["main.py", "store", "store=s", *words]
    monkeypatch.setattr("sys.argv", argv)
    code = cli.run(argv)
    error = capsys.readouterr().err
    assert code == 2, error
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "log").exists()


def test_outcomes_are_labelled_and_taken_back(store, tmp_path, capsys):
    unknown = dataclasses.replace(examples.trajectory(5, 6, Source.REAL), success=Success.UNKNOWN)
    store.append([unknown])
    store.close()
    config = WorldModelConfig(widths=(16, 24), warmup=0, sources={"real": 1.0})
    WorldModelLearner(config, spec=store.spec, statistics=store.statistics, seed=0).save_pretrained(
        tmp_path / "model" / "world_model")  # as train_world_model does
    tool(store.path, "label_success", model=str(tmp_path / "model"), success_threshold=1 - 1e-9)
    said = capsys.readouterr().out
    assert "1 episodes of unknown success were labelled: 0 yes, 1 no; 0 stay unknown" in said
    assert "agrees on 2 of 4 (0 false yes, 2 false no" in said  # an untrained model claims nothing
    store.refresh()
    assert store.episodes.success.tolist()[-1] == "unknown"
    labelled = store.with_outcome_labels()
    assert labelled.episodes.success.tolist()[-1] == "no"
    assert labelled.provenance(len(store) - 1)["outcome_label"]["threshold"] == 1 - 1e-9
    tool(store.path, "revoke_labels")
    assert "the labels of 1 segments were taken back" in capsys.readouterr().out
    assert store.with_outcome_labels().episodes.success.tolist()[-1] == "unknown"
