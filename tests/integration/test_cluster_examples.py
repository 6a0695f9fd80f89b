"""The examples for Slurm and KubeRay, as far as they can be checked without either: stand-ins replace the commands."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SBATCH = ROOT / "examples" / "slurm" / "train.sbatch"
RAYJOB = ROOT / "examples" / "kuberay" / "rayjob.yaml"


def composes(words):
    """Our command line accepts these words, all of them."""
    result = subprocess.run([sys.executable, str(ROOT / "main.py"), *words, "--cfg", "job"], text=True, cwd=ROOT,
                            capture_output=True, check=False, timeout=300)
    assert result.returncode == 0, result.stderr
    return yaml.safe_load(result.stdout)


# -- Slurm ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slurm(tmp_path):
    """Start the script with stand-ins that write down what they were asked; ``python`` waits for ``go`` if told to."""
    stand_ins = {"hostname": 'case "$1" in --ip-address) echo "10.0.0.1 10.0.0.9";; *) echo alpha;; esac',
                 "srun": "", "scontrol": "", "ray": "",
                 "python": f'until [ "$SLURM_NNODES" = 1 ] || grep -q srun {tmp_path}/log; do sleep 0.05; done\n'
                           f'trap "echo USR1 >> {tmp_path}/log; exit 130" USR1; touch {tmp_path}/begun\n'
                           f'if [ -n "$WAIT" ]; then for i in $(seq 600); do sleep 0.05; done; fi; exit ${{CODE:-0}}'}
    for name, does in stand_ins.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        note = "" if name == "hostname" else (f'echo "{name} $*" >> {tmp_path}/log\n'
                                              f'echo "$RAY_AUTH_MODE $RAY_AUTH_TOKEN" >> {tmp_path}/tokens\n')
        file.write_text(f"#!/bin/bash\n{note}{does}\n")
        file.chmod(0o755)

    def start(*words, nodes=3, **variables):
        return subprocess.Popen(
            ["bash", str(SBATCH), *words], cwd=tmp_path, text=True, stderr=subprocess.PIPE,
            env={"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "BIN": f"{tmp_path}/bin", "SLURM_JOB_ID": "7",
                 "SLURM_NNODES": str(nodes), "SLURM_CPUS_PER_TASK": "16", **variables})

    return start


def log(tmp_path):
    return (tmp_path / "log").read_text().splitlines()


def test_the_batch_script_parses():
    subprocess.run(["bash", "-n", str(SBATCH)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(SBATCH)], check=True)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", SBATCH.read_text(), flags=re.MULTILINE))
    assert options["signal"] == "B:USR1@300"  # to the script itself, which hands it on
    assert "requeue" in options
    assert options["open-mode"] == "append"


def test_a_job_starts_ray_everywhere_and_one_driver(slurm, tmp_path):
    assert slurm("env.num_envs=16", "runtime.collectors=32").wait(timeout=60) == 0
    head, *others, stop = log(tmp_path)
    assert head.startswith("ray start --head --node-ip-address=10.0.0.1 --port=6379 --num-cpus=16")
    assert "include-dashboard=false" in head
    [workers] = [line for line in others if line.startswith("srun")]
    assert workers.startswith("srun --nodes=2 --ntasks=2 --exclude=alpha")
    assert "start --address=10.0.0.1:6379 --num-cpus=16" in workers
    [driver] = [line.removeprefix("python main.py ").split() for line in others if line.startswith("python")]
    assert stop.startswith("ray stop")
    config = composes(driver)
    assert config["runtime"]["address"] == "10.0.0.1:6379"
    assert (config["runtime"]["collectors"], config["env"]["num_envs"]) == (32, 16)
    assert "hydra.run.dir=runs/slurm-7" in driver


def test_all_of_a_job_have_one_token_and_the_next_start_another(slurm, tmp_path):
    assert slurm().wait(timeout=60) == 0
    [first] = set((tmp_path / "tokens").read_text().splitlines())
    assert re.fullmatch("token [0-9a-f]{64}", first)
    assert slurm().wait(timeout=60) == 0
    assert len(set((tmp_path / "tokens").read_text().splitlines())) == 2


def test_a_job_on_one_node_starts_no_workers(slurm, tmp_path):
    assert slurm(nodes=1).wait(timeout=60) == 0
    assert not [line for line in log(tmp_path) if line.startswith("srun")]


def test_a_job_that_was_queued_again_resumes(slurm, tmp_path):
    saved = tmp_path / "runs" / "slurm-7" / ".hydra"
    saved.mkdir(parents=True)
    (saved / "overrides.yaml").write_text("[runtime=ray]")
    assert slurm("env.num_envs=16").wait(timeout=60) == 0
    assert "python main.py train resume=runs/slurm-7 runtime.address=10.0.0.1:6379" in log(tmp_path)


def test_the_warning_reaches_the_driver_and_the_job_is_queued_again(slurm, tmp_path):
    job = slurm(WAIT="1")
    for _ in range(400):
        if (tmp_path / "begun").exists():
            break
        time.sleep(0.05)
    time.sleep(0.3)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 130
    assert log(tmp_path)[-3:] == ["USR1", "ray stop --grace-period 10", "scontrol requeue 7"]


def test_a_run_that_fails_is_not_queued_again(slurm, tmp_path):
    assert slurm(CODE="2").wait(timeout=60) == 2
    assert not [line for line in log(tmp_path) if line.startswith("scontrol")]


# -- Kubernetes -------------------------------------------------------------------------------------------------------


def test_the_ray_job_has_what_the_operator_asks_for():
    claim, job = yaml.safe_load_all(RAYJOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert cluster["rayVersion"] == pinned["ray"]
    head, workers = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    for group in (head, *workers):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]["spec"]
        [container] = pod["containers"]
        assert container["image"] == head["template"]["spec"]["containers"][0]["image"]
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    for group in workers:
        assert group["groupName"]
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    [used] = [volume for volume in head["template"]["spec"]["volumes"] if "persistentVolumeClaim" in volume]
    assert used["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert {port["name"] for port in head["template"]["spec"]["containers"][0]["ports"]} >= {"gcs-server", "dashboard"}
    script = job["spec"]["entrypoint"]
    assert "\n" not in script.strip()
    first = re.search(r"else python main.py (.*); fi", script).group(1).split()
    assert composes(first)["runtime"]["address"] == "auto"
    again = re.search(r"then python main.py (.*?);", script).group(1).split()
    folder = next(word for word in first if word.startswith("hydra.run.dir=")).partition("=")[2]
    assert again == ["train", f"resume={folder}", "runtime.address=auto"]
    collectors = composes(first)["runtime"]["collectors"]
    room = sum(group["replicas"] * int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
               for group in workers)
    assert collectors <= room
