"""``python -m tests.wm_rl.loops FOLDER [make_fabric setting]...``: the last stage of the loop, on a toy simulator."""

import sys
from pathlib import Path

import torch
import yaml

from tests.wm_rl.cluster import toy
from wm_rl.fabric import make_fabric
from wm_rl.improve import improve

if __name__ == "__main__":
    folder, *settings = sys.argv[1:]
    given = {name: yaml.safe_load(value) for name, value in (word.split("=", 1) for word in settings)}
    torch.set_num_threads(1)
    fabric = make_fabric(accelerator="cpu", precision="32-true", **given)
    fabric.launch()
    with fabric.rank_zero_first():
        loop = toy.loop(Path(folder), iterations=2, fabric=fabric)
    loop.run(improve)
