"""The command line: all of it composes, nothing that composes is ignored, a mistake is one line and exit code 2."""

import dataclasses
import inspect
import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from wm_rl import cli
from wm_rl.cli import COMMANDS, CONFIGS

ROOT = Path(__file__).parents[1]
CHOICES = sorted((path.parent.name, path.stem) for path in CONFIGS.glob("*/*.yaml"))


def main(*words, folder=None):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, str(ROOT / "main.py"), *words], capture_output=True, text=True, check=False,
                          cwd=folder or ROOT, env=environment, timeout=300)


def compose(command, *overrides):
    with hydra.initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return OmegaConf.to_container(hydra.compose(command, overrides=list(overrides)), resolve=False)


def nodes(config, place="config"):
    """Every mapping with a ``_target_`` in a composed configuration."""
    if isinstance(config, dict):
        if "_target_" in config:
            yield place, config
        for key, value in config.items():
            yield from nodes(value, f"{place}.{key}")
    elif isinstance(config, list):
        for i, item in enumerate(config):
            yield from nodes(item, f"{place}[{i}]")


def check_binding(config):
    for place, node in nodes(config):
        target = hydra.utils.get_object(node["_target_"])
        parameters = inspect.signature(target).parameters
        free = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        for key in node:
            known = str(key).startswith("_") or key in parameters
            assert known or free, f"{place}.{key} is read by nothing"
        if dataclasses.is_dataclass(target):
            named = {f.name for f in dataclasses.fields(target)}
            settable = {str(key) for key in node}
            optional = {f.name for f in dataclasses.fields(target)
                        if f.default is not dataclasses.MISSING or f.default_factory is not dataclasses.MISSING}
            assert named - settable <= optional, f"{place} leaves out {named - settable}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes_and_binds(command):
    check_binding(compose(command))


@pytest.mark.parametrize(("group", "choice"), CHOICES)
def test_every_choice_composes_and_binds(group, choice):
    command = {"logs": "ingest", "suite": "benchmark", "regime": "benchmark",
               "perturbations": "evaluate"}.get(group, "train")
    needed = ["suite=metaworld"] if group == "regime" else []
    check_binding(compose(command, *needed, f"{group}={choice}"))


def test_help_names_the_commands_and_settings():
    plain = main("--help")
    assert plain.returncode == 0
    assert all(command in plain.stdout for command in COMMANDS)
    assert "objective" in main("train", "--help").stdout
    shown = main("train", "--cfg", "job", "objective=ppo_clip").stdout
    assert "epsilon: 0.2" in shown


MISTAKES = [
    (["trian"], "there is no command 'trian', did you mean 'train'?"),
    (["train", "objective.bta=3"], "did you mean 'objective.beta'?"),
    (["train", "objective=ppo_clp"], "did you mean 'ppo_clip'?"),
    (["train", "obective=gipo"], "did you mean 'objective'?"),
    (["train", "+sede=3"], "nothing reads 'sede', did you mean 'seed'?"),
    (["train", "+objective.width=3"], "nothing reads 'width' of objective"),
    (["train", "objective.beta=-1"], "objective.beta must be positive"),
    (["train", "replay.mix.real=-1"], "replay.mix.real"),
    (["train", "+replay.mix.dreams=1"], "dreams"),
    (["train", "runtime.strategy=fsdp"], "expected at least 2 devices to shard over, got 1; type runtime.devices=2"),
    (["train", "runtime.strategy=dpp"], "expected auto, ddp, fsdp, got 'dpp'"),
    (["train", "runtime=ray", "runtime.fabric.strategy=fsdp"], "type runtime.learners=2"),
    (["train", "learner.micro_batches=9999"], "type replay.windows=9999"),
    (["train", "resume=nowhere"], "no run to resume in nowhere"),
    (["evaluate", "candidate=nowhere"], "no policy in nowhere"),
    (["evaluate", "candidate=nowhere", "gate=true"], "baseline=<folder of a policy>"),
    (["evaluate"], "candidate"),
    (["pretrain", "store=nowhere"], "no replay store at nowhere"),
    (["train_world_model", "store=nowhere"], "no replay store at nowhere"),
    (["ingest", "source=nowhere", "store=made"], "nowhere"),
    (["collect", "episodes=2"], "store=<folder>, lerobot=<folder> or rosbag=<folder>"),
    (["collect", "env.tasks=[door-clse-v3]", "store=made"], "did you mean 'door-close-v3'?"),
    (["collect", "env=pusht", "env.config.perturbation={zoom:2}", "store=made"], "zoom does not exist in PushT"),
    (["collect", "env.config.randomise={fog:[0,1]}", "store=made"], "perturbation fog is not known"),
    (["evaluate", "candidate=nowhere", "perturbations=standrd"], "did you mean 'standard'?"),
    (["train", "loop.collect_tasks=fails"], "collect_tasks must be one of even, failures"),
    (["train", "runtime=ray", "loop.collect_tasks=failures"], "type loop.collect_tasks=even, or runtime=local"),
    (["collect", "env.config.camera=corner9", "store=made"], "did you mean 'corner"),
    (["benchmark", "suite=lop"], "there is no suite=lop, did you mean 'loop'?"),
    (["benchmark", "suite=crash", "trails=3"], "there is no setting 'trails', did you mean 'trials'?"),
    (["benchmark", "suite=crash", "trials=0"], "trials"),
    (["benchmark", "suite=endurance", "hours=0"], "hours"),
]


@pytest.mark.parametrize(("words", "said"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_a_mistake_is_one_line(words, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["main.py", *words])
    code = cli.run(sys.argv)
    error = capsys.readouterr().err
    assert code == 2, error
    assert said in error
    assert error.startswith("error: ")
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "made").exists()


def test_a_mistake_on_the_real_command_line(tmp_path):
    result = main("train", "objective.bta=3", folder=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "error: there is no setting 'objective.bta', did you mean 'objective.beta'?\n"


@pytest.mark.parametrize("words", [["-m", "logs.image_size=8,16"], ["logs.image_size=8,16", "-m"],
                                   ["logs.clip=true", "-m", "logs.image_size=8,16"]])
def test_a_sweep_may_be_typed_in_any_order(words, tmp_path):
    result = main("ingest", "source=nowhere", "store=made", *words, folder=tmp_path)
    assert result.stdout.count("Launching") == 1
    assert result.stderr.count("error: ") == 2  # one for each of the two jobs
    assert result.returncode == 2


def test_options_may_follow_overrides():
    assert "epsilon: 0.3" in main("train", "objective=ppo_clip", "objective.epsilon=0.3", "--cfg", "job").stdout


def test_completion_offers_commands_and_choices(monkeypatch):
    monkeypatch.setenv("COMP_LINE", "python main.py ev")
    assert main("-sc", "query=bash").stdout.split() == ["evaluate", "evaluate_world_model"]
    monkeypatch.setenv("COMP_LINE", "python main.py train objective=")
    assert "objective=gipo" in main("-sc", "query=bash").stdout.split()


def test_completion_imports_no_torch():
    code = "import sys, wm_rl.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0
