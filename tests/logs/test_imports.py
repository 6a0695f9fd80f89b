"""What ``ingest`` imports: each of its processes waits for that."""

import subprocess
import sys

import pytest

HEAVY = {"torch", "diffusers", "lightning", "transformers", "torchmetrics", "tensorboard", "scipy", "matplotlib",
         "gymnasium", "mujoco"}


@pytest.mark.parametrize("module", [
    "data.logs.decode", "data.logs.commit", "data.logs.ros", "data.logs.lerobot", "wm_rl.commands.ingest"])
def test_logs_are_read_without_what_learners_need(module):
    code = f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True,
                           env={"PYTHONPATH": ":".join(sys.path)}).stdout
    assert not HEAVY & set(found.split())


def test_a_spawned_process_imports_no_command_line():
    code = "import runpy, sys; runpy.run_path('main.py', run_name='__mp_main__'); print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "hydra" not in found.split()
