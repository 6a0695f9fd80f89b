"""From ``sys.argv`` to one command's function: names, overrides, resuming, and errors that fit on a line.

No torch here: the shell's tab completion comes through this module on every key press.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import shlex
import sys
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import ConfigCompositionException, HydraException, InstantiationException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from wm_rl import interrupts

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
COMMANDS = tuple(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
_GLOBAL = ("experiment", "suite")
"""Groups whose choices set keys of the whole configuration."""
_LOOKERS = ("status",)
"""Commands that leave nothing behind."""
USAGE = f"""usage: python main.py <command> [overrides]

commands: {", ".join(COMMANDS)}

  python main.py <command> --help      its settings and their defaults
  python main.py <command> --cfg job   the configuration that would run
  python main.py <command> -m seed=1,2 one run for each value
"""


def run(argv: list[str]) -> int:
    """Run what ``argv`` asks for, rewritten in place to what Hydra reads: Fabric starts its other ranks from it."""
    _exit_code[0] = 0
    if _completing(argv):
        _completion_argv(argv)
    elif len(argv) < 2 or argv[1] in ("-h", "--help"):
        print(USAGE)
        return 0
    elif argv[1] in COMMANDS:
        try:
            options, overrides = _split(argv[2:])
            argv[1:] = [f"--config-name={argv[1]}", *options, f"hydra.job.name={argv[1]}",
                        *_with_run_folder(argv[1], options, overrides)]
        except _BadArgumentError as error:
            return _complain(str(error))
    elif not any(word.startswith("--config-name") for word in argv[1:]):
        return _complain(f"there is no command '{argv[1]}'{_did_you_mean(argv[1], COMMANDS)}; "
                         f"commands are {', '.join(COMMANDS)}")
    try:
        _job()
    except KeyboardInterrupt:
        return interrupts.exit_status()
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        return _complain(message)
    return _exit_code[0]


_exit_code = [0]
"""What the command returned: Hydra keeps a task's return value to itself."""


@hydra.main(version_base="1.3", config_path=str(CONFIGS), config_name=None)
def _job(config: DictConfig) -> None:
    """Call the function that the primary YAML names with its other keys, instantiated, as arguments."""
    try:
        code = _call(config)
    except Exception as error:
        message = _explain(error)
        if message is None:
            raise
        code = _complain(message)
    _exit_code[0] = max(_exit_code[0], code)


def _call(config: DictConfig) -> int:
    function = hydra.utils.get_method(config["_target_"])
    accepted = list(inspect.signature(function).parameters)
    for key in map(str, config):
        if key != "_target_" and key not in accepted:
            raise _BadArgumentError(f"nothing reads '{key}'{_did_you_mean(key, accepted)}; "
                               f"settings of this command are {', '.join(accepted)}")
    return function(**{key: _instantiate(config, key) for key in map(str, config) if key != "_target_"}) or 0


class _BadArgumentError(Exception):
    """A command line that cannot be run, in one line."""


def _instantiate(config: DictConfig, key: str) -> Any:
    node = config[key]
    if not OmegaConf.is_config(node):
        return node
    return hydra.utils.instantiate(node, _convert_="all")


def _split(words: list[str]) -> tuple[list[str], list[str]]:
    """Options and overrides: Hydra's parser wants them in this order, people type them in any."""
    options: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("--cfg", "-c", "--package", "-p", "--config-dir", "-cd"):
            options += [word, *[value for value in [next(rest, None)] if value is not None]]
        else:
            (options if word.startswith("-") else overrides).append(word)
    return options, overrides


def _with_run_folder(command: str, options: list[str], overrides: list[str]) -> list[str]:
    """Fix the run's folder now, so that every rank agrees on it; ``resume=<run>`` brings back that run's overrides."""
    resumed = [word.removeprefix("resume=") for word in overrides if word.startswith("resume=")]
    if resumed and resumed[-1] not in ("null", ""):
        folder = Path(resumed[-1])
        saved = folder / ".hydra" / "overrides.yaml"
        if not saved.is_file():
            raise _BadArgumentError(f"no run to resume in {folder}: expected {saved}; "
                               "give the folder of a run, e.g. resume=runs/train/2026-01-31_12-00-00")
        earlier = [word for word in map(str, OmegaConf.load(saved)) if not word.startswith("resume=")]
        return [f"hydra.run.dir={folder}", *earlier, *overrides]
    if command in _LOOKERS:
        return ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=disabled", *overrides]
    chosen = any(word.startswith(("hydra.run.dir=", "hydra.sweep.dir=")) for word in overrides)
    if chosen:
        return overrides
    kind = "sweep" if {"-m", "--multirun"} & set(options) else "run"
    return [f"hydra.{kind}.dir=runs/{command}/{datetime.now():%Y-%m-%d_%H-%M-%S}", *overrides]


def _completing(argv: list[str]) -> bool:
    return any(word in ("-sc", "--shell-completion", "--shell_completion") for word in argv)


def _completion_argv(argv: list[str]) -> None:
    """Tell Hydra which command the half-typed line belongs to; complete the command itself here."""
    words = shlex.split(os.environ.get("COMP_LINE", ""))
    at = next((i for i, word in enumerate(words) if word.endswith("main.py")), None)
    if at is None:
        return
    command = words[at + 1] if len(words) > at + 1 else ""
    if command in COMMANDS:
        argv.insert(1, f"--config-name={command}")
        os.environ["COMP_LINE"] = os.environ["COMP_LINE"].replace(f"main.py {command}", "main.py", 1)
        return
    print(" ".join(name for name in COMMANDS if name.startswith(command)))
    sys.exit(0)


def _explain(error: BaseException) -> str | None:
    """One line for a mistake of the user's; None for a fault of ours, whose traceback must be seen."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for link in chain:
        if isinstance(link, _BadArgumentError) or type(link).__name__ == "UserError":
            return str(link)
    if isinstance(error, InstantiationException):
        return _explain_instantiation(error, chain)
    if isinstance(error, MissingConfigException | ConfigCompositionException | OmegaConfBaseException | HydraException):
        return _explain_composition(error)
    return None


def _explain_instantiation(error: InstantiationException, chain: list[BaseException]) -> str | None:
    text = " ".join(str(link) for link in chain)
    unexpected = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unexpected is None:
        return None
    target = re.search(r"[Ee]rror in call to target '([\w.]+)'|for target '([\w.]+)'", text)
    place = re.search(r"full_key: ([\w.]+)", text)
    of = place.group(1) if place else (target.group(1) or target.group(2)) if target else "this setting"
    return f"nothing reads '{unexpected.group(1)}' of {of}: this choice has no such setting"


def _explain_composition(error: BaseException) -> str:
    first = str(error).strip().splitlines()[0]
    key = re.search(r"Could not override '([^']+)'", first)
    if key is None:
        missing = re.search(r"Could not find '([^']+)'", first) or re.search(r"Could not override '([^'@]+)", first)
        if missing and "/" in missing.group(1):
            group, option = missing.group(1).rsplit("/", 1)
            options = sorted(path.stem for path in (CONFIGS / group).glob("*.yaml"))
            return (f"there is no {group}={option}{_did_you_mean(option, options)}; "
                    f"{group} is one of {', '.join(options)}")
        return first
    return f"there is no setting '{key.group(1)}'{_did_you_mean(key.group(1), _known_keys())}"


def _known_keys() -> list[str]:
    """Every key of the command's default configuration, and of every choice that a group offers."""
    command = next((word.split("=", 1)[1] for word in sys.argv if word.startswith("--config-name=")), None)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        composed = hydra.compose(config_name=command)
    keys = list(_flatten(OmegaConf.to_container(composed, resolve=False), ""))
    for path in CONFIGS.glob("*/*.yaml"):
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if path.parent.name not in _GLOBAL:
            keys += _flatten(values, f"{path.parent.name}.")
        elif path.parent.name == "suite" and command == "benchmark":
            keys += _flatten(values, "")
    return [*keys, *(path.name for path in CONFIGS.iterdir() if path.is_dir())]


def _flatten(values: Any, prefix: str) -> Iterable[str]:
    if not isinstance(values, dict):
        return
    for key, value in values.items():
        yield f"{prefix}{key}"
        yield from _flatten(value, f"{prefix}{key}.")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, [name for name in known if name != word], n=1)
    return f", did you mean '{close[0]}'?" if close else ""


def _complain(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
