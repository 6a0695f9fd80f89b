"""Start Isaac Lab and build a task, in Isaac Lab's Python: 3.x with or without Isaac Sim's Kit, and 2.x with it."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib
import importlib.metadata
import inspect
import os
from pathlib import Path
from typing import Any

from sim.isaac import assets, usd
from sim.isaac.config import STAND_IN, IsaacConfig
from sim.remote.protocol import BadInputError

_MODERN = "launch_simulation"
"""What ``isaaclab.app`` has from 3.0 on: it starts Kit only for what needs it. Before, Kit came first."""


def build(config: IsaacConfig, num_envs: int, running: contextlib.ExitStack) -> Any:
    """Return the task as ``gymnasium.make`` does; what must be ended with it is on ``running``.

    Raises:
        BadInputError: no such task or camera, or this Python lacks the simulator that the task asks for.
    """
    if config.assets == STAND_IN:
        os.environ["ISAACSIM_ASSET_ROOT"] = str(stand_in_assets())
    elif config.assets != "nvidia":
        os.environ["ISAACSIM_ASSET_ROOT"] = config.assets
    app = importlib.import_module("isaaclab.app")  # reads ISAACSIM_ASSET_ROOT
    if not hasattr(app, _MODERN):
        _start_kit(app, config)
    import gymnasium

    for module in ("isaaclab_tasks", *config.modules):
        importlib.import_module(module)
    task = _registered(config.task, list(gymnasium.registry))
    settings = _settings(config, task, num_envs)
    if hasattr(app, _MODERN):
        with _explained(config):
            running.enter_context(getattr(app, _MODERN)(
                settings, {"headless": True, "device": config.device, "enable_cameras": bool(config.cameras)}))
    with _explained(config):
        env = gymnasium.make(task, cfg=settings)
    running.callback(env.close)
    return env


def stand_in_assets() -> Path:
    """Make the stand-ins in the user's cache, once for each version of the modules that make them."""
    source = "".join(inspect.getsource(module) for module in (assets, usd)).encode()
    version = hashlib.sha256(source).hexdigest()[:12]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return assets.make_assets(cache / "wm-rl" / f"isaac-assets-{version}")


def versions() -> str:
    """Isaac Lab and what may simulate in it."""
    found = []
    for package in ("isaaclab", "isaacsim", "newton", "mujoco-warp", "warp-lang"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def _start_kit(app: Any, config: IsaacConfig) -> None:
    """Isaac Lab 2: Kit runs before anything else of it is imported, and asks for its licence on a terminal."""
    if os.environ.get("OMNI_KIT_ACCEPT_EULA", "").upper() not in ("Y", "YES", "1"):
        raise BadInputError("Isaac Sim runs only for those who accept NVIDIA's licence: read it, and if you do, type: "
                            "export OMNI_KIT_ACCEPT_EULA=YES")
    with _explained(config):
        app.AppLauncher(headless=True, enable_cameras=bool(config.cameras), device=config.device)


@contextlib.contextmanager
def _explained(config: IsaacConfig) -> Any:
    """Without Kit, or without its licence accepted, Isaac Lab leaves by ``SystemExit``."""
    try:
        yield
    except (SystemExit, EOFError) as error:
        raise BadInputError(
            f"Isaac Sim did not start for {config.task} ({error!r}): install it and accept its licence yourself, or "
            "run without it where the task can: env.config.overrides=[physics=newton_mjwarp]") from None


def _registered(wanted: str, known: list[str]) -> str:
    """Isaac Lab 2 ends its ids with ``-v0``, 3 does not."""
    for task in (wanted, f"{wanted}-v0", wanted.removesuffix("-v0")):
        if task in known:
            return task
    ours = [name for name in known if name.startswith(("Isaac", "WmRl"))] or known
    near = difflib.get_close_matches(wanted, ours, n=1, cutoff=0.3) or ours[:1]
    raise BadInputError(f"unknown task {wanted!r}, did you mean {near[0]!r}?")


def _settings(config: IsaacConfig, task: str, num_envs: int) -> Any:
    """Isaac Lab's configuration of the task, with ours in it."""
    from isaaclab_tasks.utils import parse_env_cfg

    takes_overrides = "overrides" in inspect.signature(parse_env_cfg).parameters
    if config.overrides and not takes_overrides:
        raise BadInputError(f"this Isaac Lab takes no overrides, got {list(config.overrides)}; leave them away: "
                            "env.config.overrides=[]")
    more = {"overrides": list(config.overrides)} if takes_overrides else {}
    settings = parse_env_cfg(task, device=config.device, num_envs=num_envs, **more)
    settings.seed = 0  # what is drawn once, at the start, is alike in every process
    if hasattr(settings, "compute_final_obs"):
        settings.compute_final_obs = True
    if config.max_episode_steps is not None:
        step = settings.sim.dt * settings.decimation
        settings.episode_length_s = (config.max_episode_steps - 0.5) * step  # Isaac Lab rounds up
    for name in config.cameras:
        camera: Any = getattr(settings.scene, name, None) or getattr(settings, name, None)
        if not hasattr(camera, "width"):
            have = [key for key, value in vars(settings.scene).items() if hasattr(value, "width")]
            raise BadInputError(f"{task} has no camera {name!r}, it has {have}")
        camera.width = camera.height = config.image_size
    return settings
