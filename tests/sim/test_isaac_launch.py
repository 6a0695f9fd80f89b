"""In which order Isaac Lab is started, on made-up packages that only write down what was asked of them."""

import contextlib
import dataclasses
import sys

import gymnasium
import pytest

from sim.isaac.config import IsaacConfig
from sim.isaac.launch import build
from sim.remote.protocol import BadInputError

COMMON = """
import gymnasium, types
LOG.append("tasks")
class Env(gymnasium.Env):
    def __init__(self, cfg):
        self.cfg = cfg
        LOG.append("make")
    def close(self):
        LOG.append("close")
gymnasium.register(id="Isaac-Made-Up{end}", entry_point=Env, disable_env_checker=True)
def settings(task, device, num_envs):
    camera = types.SimpleNamespace(width=1, height=1)
    return types.SimpleNamespace(task=task, sim=types.SimpleNamespace(dt=0.01), decimation=2, seed=None,
                                 scene=types.SimpleNamespace(wrist=camera, num_envs=num_envs))
"""
THREE = {"isaaclab/app.py": """
import contextlib
@contextlib.contextmanager
def launch_simulation(cfg, arguments):
    LOG.append(f"launch cameras={arguments['enable_cameras']}")
    if cfg.task == "Isaac-Made-Up" and KIT:
        raise SystemExit("Isaac Sim is not installed")
    yield
    LOG.append("end")
""", "isaaclab_tasks/__init__.py": COMMON.format(end=""), "isaaclab_tasks/utils.py": """
from isaaclab_tasks import settings
def parse_env_cfg(task, device=None, num_envs=None, overrides=()):
    LOG.append(f"overrides={overrides}")
    return settings(task, device, num_envs)
"""}
TWO = {"isaaclab/app.py": """
class AppLauncher:
    def __init__(self, **arguments):
        LOG.append(f"launch cameras={arguments['enable_cameras']}")
""", "isaaclab_tasks/__init__.py": COMMON.format(end="-v0"), "isaaclab_tasks/utils.py": """
from isaaclab_tasks import settings
def parse_env_cfg(task, device=None, num_envs=None):
    return settings(task, device, num_envs)
"""}
CONFIG = IsaacConfig(task="Isaac-Made-Up", instructions=["-"], cameras=["wrist"], image_size=32, assets="nvidia",
                     max_episode_steps=7)


@pytest.fixture
def isaac(tmp_path, monkeypatch):
    """Install made-up packages; what they were asked is in the list that is returned."""
    log = []

    def install(files, kit=False):
        (tmp_path / "isaaclab").mkdir()
        (tmp_path / "isaaclab/__init__.py").touch()
        (tmp_path / "isaaclab_tasks").mkdir()
        for path, text in files.items():
            (tmp_path / path).write_text(f"from builtins import LOG, KIT\n{text}")
        monkeypatch.setattr("builtins.LOG", log, raising=False)
        monkeypatch.setattr("builtins.KIT", kit, raising=False)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setattr(gymnasium.envs.registration, "registry", registry := {})
        monkeypatch.setattr(gymnasium, "registry", registry)
        return log

    yield install
    for name in [name for name in sys.modules if name.split(".")[0] in ("isaaclab", "isaaclab_tasks")]:
        del sys.modules[name]


def test_isaac_lab_3_launches_what_the_configuration_needs(isaac):
    log = isaac(THREE)
    with contextlib.ExitStack() as running:
        env = build(dataclasses.replace(CONFIG, overrides=["physics=newton_mjwarp"]), 3, running)
        assert log == ["tasks", "overrides=['physics=newton_mjwarp']", "launch cameras=True", "make"]
        settings = env.unwrapped.cfg
        assert (settings.scene.wrist.width, settings.scene.wrist.height, settings.scene.num_envs) == (32, 32, 3)
        assert settings.episode_length_s == pytest.approx(0.13)  # 7 steps of 0.02 s, less a half
        assert settings.seed == 0
    assert log[-2:] == ["close", "end"]


def test_isaac_lab_2_starts_kit_before_anything_else(isaac, monkeypatch):
    monkeypatch.setenv("OMNI_KIT_ACCEPT_EULA", "YES")
    log = isaac(TWO)
    with contextlib.ExitStack() as running:
        build(CONFIG, 3, running)
    assert log == ["launch cameras=True", "tasks", "make", "close"]
    with pytest.raises(BadInputError, match="this Isaac Lab takes no overrides"):
        build(dataclasses.replace(CONFIG, overrides=["physics=physx"]), 3, running)


def test_nobody_accepts_the_licence_for_the_user(isaac, monkeypatch):
    monkeypatch.delenv("OMNI_KIT_ACCEPT_EULA", raising=False)
    log = isaac(TWO)
    with pytest.raises(BadInputError, match=r"read it, and if you do, type: export OMNI_KIT_ACCEPT_EULA=YES"):
        build(CONFIG, 3, contextlib.ExitStack())
    assert log == []


def test_what_is_missing_is_one_line(isaac):
    isaac(THREE, kit=True)
    with pytest.raises(BadInputError, match=r"Isaac Sim did not start for Isaac-Made-Up \(SystemExit"):
        build(CONFIG, 3, contextlib.ExitStack())
    with pytest.raises(BadInputError, match="unknown task 'Isaac-Made-Upp', did you mean 'Isaac-Made-Up'"):
        build(dataclasses.replace(CONFIG, task="Isaac-Made-Upp"), 3, contextlib.ExitStack())
    with pytest.raises(BadInputError, match=r"Isaac-Made-Up has no camera 'head', it has \['wrist'\]"):
        build(dataclasses.replace(CONFIG, cameras=["head"]), 3, contextlib.ExitStack())
