"""The ``lerobot`` package, in a virtual environment of its own: it pins other versions than this project.

``python -m tests.data.lerobot_package`` makes the environment, once, in the user's cache folder: 108 packages, 6.5 GB
with torch as it comes (less where pip's settings have torch without CUDA), 2 to 20 minutes. Release 0.4.4 reads
format v3.0, 0.3.3 v2.1; the second shares the packages of the first but for ``datasets``.

Run by the environment's Python with a folder, a repository name and a file, this script opens the set and saves all.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

FOLDER = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wm-rl/lerobot"
PYTHON = FOLDER / "bin/python"
FINISHED = FOLDER / "finished"
"""Made last."""
PACKAGES = {"v3.0": ["lerobot==0.4.4", "torch==2.7.1", "torchvision==0.22.1", "av==15.1.0"],
            "v2.1": ["lerobot==0.3.3", "datasets==3.6.0"]}


def make_environment() -> None:
    """Install with pip's own settings. Raises ``CalledProcessError`` where it cannot be made, offline for example."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER], check=True)
    install = [PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *PACKAGES["v3.0"]], check=True)
    subprocess.run([*install, "--no-deps", "--target", FOLDER / "v2.1", *PACKAGES["v2.1"]], check=True)
    FINISHED.touch()


def read_with_package(folder: Path, version: str, out: Path, cache: Path) -> None:
    """What ``LeRobotDataset`` reads from a set, as ``<out>.npz`` and ``<out>.json``. It never goes online."""
    paths = {name: str(cache / name) for name in ("HF_HOME", "HF_DATASETS_CACHE", "HF_LEROBOT_HOME")}
    package = {"PYTHONPATH": str(FOLDER / "v2.1")} if version == "v2.1" else {}
    result = subprocess.run(
        [PYTHON, "-W", "ignore", __file__, folder, out], check=False, text=True, capture_output=True, timeout=300,
        env={"PATH": os.environ["PATH"], "HOME": str(cache), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **paths,
             **package})
    if result.returncode:
        raise RuntimeError(result.stderr[-3000:])


def _save(folder: str, out: str) -> None:
    import lerobot
    import numpy as np
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    dataset = LeRobotDataset("local/set", root=folder, video_backend="pyav")
    rows = [dataset[i] for i in range(len(dataset))]
    names = [name for name, value in rows[0].items() if hasattr(value, "shape")]
    np.savez(f"{out}.npz", **{name: np.stack([row[name].numpy() for row in rows]) for name in names})
    second = LeRobotDataset("local/set", root=folder, video_backend="pyav", episodes=[1])
    Path(f"{out}.json").write_text(json.dumps({
        "package": lerobot.__version__, "fps": dataset.fps, "episodes": dataset.num_episodes, "frames": len(dataset),
        "cameras": dataset.meta.camera_keys, "tasks": [row["task"] for row in rows],
        "robot": dataset.meta.robot_type, "rows_of_second": len(second),
        "action_mean": np.asarray(dataset.meta.stats["action"]["mean"]).tolist()}))


if __name__ == "__main__":
    if len(sys.argv) == 1:
        make_environment()
    else:
        _save(*sys.argv[1:])
