from __future__ import annotations

import dataclasses
import importlib.util
import io
import re
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from data.types import UserError
from sim.evaluation import Trial, compare, evaluate_policy, share_seeds
from sim.intervals import wilson
from sim.report import Curve, FilmStrip, ReportData, SourceRow, StalenessRow, SuccessRow, write_report
from sim.video import COLOURS, grid, write_film, write_video

_PATH = Path(__file__).resolve().parents[1] / "data" / "test_rollout.py"
_SPEC = importlib.util.spec_from_file_location("rollout_doubles", _PATH)
doubles = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(doubles)


def _env(rows):
    env = doubles.CountingEnv(rows)
    env.row_tasks = ["count"] * rows
    return env


def test_same_trials_on_any_number_of_rows():
    few = evaluate_policy(_env(1), doubles.Chunks(), trials_per_task=7, first_seed=100, sample=True, keep=2)
    many = evaluate_policy(_env(4), doubles.Chunks(), trials_per_task=7, first_seed=100, sample=True)
    assert few.trials == many.trials
    assert [trial.seed for trial in few.trials] == list(range(100, 107))
    assert [trial.success for trial in few.trials] == [True, False, True, False, True, False, True]
    assert few.success().estimate == few.success_by_task()["count"].estimate == 4 / 7
    assert [episode.provenance["seed"] for episode in few.episodes] == [100, 101]
    assert many.episodes == ()


def test_every_task_gets_every_seed_once():
    shares = share_seeds(["a", "b", "a", "b", "b"], range(5))
    assert sorted(shares[0] + shares[2]) == list(range(5))
    assert sorted(shares[1] + shares[3] + shares[4]) == list(range(5))


def test_compare_pairs_by_task_and_seed():
    before = [Trial(task=task, seed=seed, success=False, steps=3, return_=0.0) for task in "ab" for seed in range(20)]
    after = [dataclasses.replace(trial, success=trial.task == "a") for trial in reversed(before)]
    total, by_task = compare(before, after)
    assert total.estimate == 0.5
    assert by_task["a"].estimate == 1
    assert by_task["b"].estimate == 0
    assert by_task["a"].excludes_zero
    assert not by_task["b"].excludes_zero
    with pytest.raises(UserError, match="1 trials have no partner"):
        compare(before, after[1:])
    with pytest.raises(UserError, match="at least one trial"):
        evaluate_policy(_env(1), doubles.Chunks(), trials_per_task=0, first_seed=0, sample=True)


@pytest.fixture
def episodes():
    seeds = [[0], [1], [2]]
    found = list(doubles.rollout(doubles.CountingEnv(3), doubles.Chunks(), seeds, sample=False))
    return [dataclasses.replace(e, frames={"eye": np.full((len(e) + 1, 64, 64, 3), 120, np.uint8)}) for e in found]


def test_video_plays_and_marks_the_outcome(tmp_path, episodes):
    path = tmp_path / "clip.mp4"
    write_video(path, episodes, scale=2, columns=3)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == max(len(e) + 1 for e in episodes) + 15
    assert frames[0].shape == (128, 384, 3)
    for index, episode in enumerate(episodes):
        edge = frames[-1][1:3, 128 * index + 40 : 128 * index + 90].reshape(-1, 3).mean(0)
        assert np.abs(edge - COLOURS[episode.success]).max() < 40
        assert np.abs(frames[0][1:3, 128 * index + 40].astype(int) - 120).max() < 15
    with pytest.raises(ValueError, match="at least one episode"):
        write_video(path, [])


def test_a_film_strip_goes_from_the_first_frame_to_the_last(tmp_path, episodes):
    for episode in episodes:
        episode.frames["eye"][:] = np.arange(len(episode) + 1, dtype=np.uint8)[:, None, None, None]
    write_film(tmp_path / "film.png", episodes, scale=1, columns=4)
    film = np.asarray(Image.open(tmp_path / "film.png"))
    assert film.shape == (64 * len(episodes), 64 * 4, 3)
    for index, episode in enumerate(episodes):
        row = film[64 * index + 32, 32::64, 0]
        assert row.tolist() == [round(len(episode) * part / 3) for part in range(4)]
        assert film[64 * index, -1].tolist() == list(COLOURS[episode.success])


def test_grid_fills_with_white():
    picture = np.zeros((4, 6, 3), np.uint8)
    laid = grid([picture] * 3, 2)
    assert laid.shape == (8, 12, 3)
    assert (laid[4:, 6:] == 255).all()


def test_report_is_one_file_with_everything_in_it(tmp_path, episodes):
    write_video(tmp_path / "clip.mp4", episodes)
    random = np.random.default_rng(0)
    clip = random.integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    data = ReportData(
        title="A <run>", verdict="Success rose.", passed=True, notes=["real is a robot stand-in"],
        success=[SuccessRow(name="all", mode="sampled", trials=40, before=wilson(20, 40), after=wilson(34, 40),
                            difference=wilson(14, 40)),
                 SuccessRow(name="all", mode="greedy", trials=40, before=None, after=wilson(34, 40), difference=None)],
        sources=[SourceRow(source="real (stand-in)", episodes=3, steps=90, success_rate=None, gradient_share=0.3,
                           behaviour="cloned"),
                 SourceRow(source="sim", episodes=9, steps=400, success_rate=0.5, gradient_share=0.7,
                           behaviour="logged")],
        staleness=[StalenessRow(lag="0-7", share=1.0, mean_abs_log_ratio=0.1, effective_sample_size=0.9,
                                weight_above=0.99)],
        curves=[Curve(title="loss", x_label="update", lines={"sim": ([0, 1], [1, 0.5])})],
        strips=[FilmStrip(title="drawer", real=clip, imagined=clip[::-1])],
        videos={"after": tmp_path / "clip.mp4"}, stage_seconds={"collect": 3.0, "update": 1.0}, config="seed: 1",
    )
    page = write_report(tmp_path / "report.html", data).read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)  # nothing outside the file
    assert "A &lt;run&gt;" in page
    assert page.index("Success rose.") < page.index("<h2>")
    assert page.count("data:image/png") == 4
    assert page.count("data:video/mp4") == 1
    for text in ("0.85 [0.71, 0.93]", "robot stand-in", "real (stand-in)", "unknown", "30 %", "75 %", "seed: 1"):
        assert text in page


def test_an_empty_report_says_so(tmp_path):
    page = write_report(tmp_path / "r.html", ReportData(title="t", verdict="v", passed=None)).read_text()
    assert page.count('class="none"') == 8
    assert "data:" not in page
    assert io.StringIO(page)
