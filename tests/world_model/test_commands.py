import json
import shutil

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from safetensors.torch import load_file

from data.types import UserError
from wm_rl.commands.evaluate_world_model import evaluate_world_model, spread
from wm_rl.commands.train_world_model import train_world_model
from world_model.config import ImaginationConfig, WorldModelConfig

TINY = WorldModelConfig(
    widths=(16, 24), batch=4, success_batch=8, warmup=2, steps=6, success_windows=4, success_ratio=0.5)


def fit(store, folder, **changes):
    folder.mkdir(exist_ok=True)
    given = {"seed": 0, "folder": str(folder), "resume": None, "store": str(store.path), "held_out": 0.2,
             "teacher": None, "checkpoint_every": 3, "world_model": TINY,
             "runtime": lambda: Fabric(accelerator="cpu", devices=1), "logger": []}
    assert train_world_model(**{**given, **changes}) == 0
    return load_file(folder / "world_model" / "video" / "denoiser" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def fitted(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    fit(store, folder)
    return folder


def test_a_stopped_fit_ends_in_the_same_weights(store, fitted, tmp_path):
    whole = load_file(fitted / "world_model" / "video" / "denoiser" / "diffusion_pytorch_model.safetensors")
    cut = tmp_path / "cut"
    shutil.copytree(fitted, cut)
    assert sorted(path.name for path in (cut / "checkpoints").iterdir()) == ["3.pt", "6.pt"]
    (cut / "checkpoints" / "6.pt").unlink()  # as if killed between the two
    shutil.rmtree(cut / "world_model")
    resumed = fit(store, cut, resume=str(cut))
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    rows = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "world_model"] == list(range(6))
    assert [row["step"] for row in rows if row["kind"] == "success_model"] == list(range(3))


def test_a_model_and_its_rival_are_measured_over_seeds(store, fitted, tmp_path):
    result = tmp_path / "evaluated"
    result.mkdir()
    given = {"folder": str(result), "models": [str(fitted), str(fitted)], "rivals": {"the same": [str(fitted)]},
             "store": str(store.path), "held_out": 0.2, "unseen": str(store.path), "policies": [], "env": None,
             "trials_per_task": 1, "first_seed": 0, "starts": 6, "imagination": ImaginationConfig(), "speed": False,
             "compiled": False, "seed": 0}
    assert evaluate_world_model(**given) == 0
    quality = json.loads((result / "quality.json").read_text())
    assert [len(quality[name]) for name in ("model", "the same")] == [2, 1]
    first, again = quality["model"]
    assert first == again
    assert first["psnr_model_4"] == quality["the same"][0]["psnr_model_4"]
    assert np.isfinite(first["unseen_ssim_copy_1"])
    assert "unavailable" in quality["unavailable"]["lpips"]
    for picture in ("quality.png", "strips.png"):
        assert (result / picture).stat().st_size > 5000
    with pytest.raises(UserError, match="needs models"):
        evaluate_world_model(**{**given, "models": []})


def test_a_student_is_distilled(store, tmp_path):
    flow = WorldModelConfig(**{**vars(TINY), "objective": "flow", "teacher_steps": 2})
    taught = fit(store, tmp_path / "teacher", world_model=flow)
    learned = fit(store, tmp_path / "student", world_model=flow, teacher=str(tmp_path / "teacher"))
    assert any(not torch.equal(value, learned[name]) for name, value in taught.items())


def test_spread():
    assert spread([{"a": 1.0}, {"a": 3.0}], "a", ".1f") == "2.0 [1.0, 3.0]"
    assert spread([{"a": 1.25}], "a", ".1f") == "1.2"
    assert spread([{}], "a", ".1f") == "-"
