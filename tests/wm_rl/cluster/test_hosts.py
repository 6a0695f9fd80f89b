"""A run on two hosts: network namespaces with an address each; the second does not see the first one's files."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.wm_rl.cluster.processes import check_whole, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]
ROOT = Path(__file__).parents[3]
FIRST, SECOND, PORT = "10.213.7.1", "10.213.7.2", 6379
RAY = Path(sys.executable).parent / "ray"
START = ["--num-cpus=2", "--disable-usage-stats", "--object-store-memory=100000000", "--block"]
DRIVER = """
import json, os, sys
from pathlib import Path
import ray
from tests.wm_rl.cluster import toy
from wm_rl.cluster import driver

folder, copies, address = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
checkpoint = driver._Driver._checkpoint

def and_look(self, iteration, learned):
    checkpoint(self, iteration, learned)
    ranks = ray.get(self.learner.handle.__ray_call__.remote(lambda learner: learner._others))
    seen = [ray.get(rank.__ray_call__.remote(lambda rank: {
        "address": ray.util.get_node_ip_address(), "reads": str(rank._store.path),
        "episodes": len(rank._store.episodes), "sees the store": rank._original.exists()})) for rank in ranks]
    (folder / "seen.json").write_text(json.dumps(seen))

driver._Driver._checkpoint = and_look
runtime = toy.runtime(address=address, learners=2, learner_nodes=2, strategy="ddp", copies=copies)
toy.loop(folder, iterations=4).run(runtime.improve)
"""


@contextlib.contextmanager
def two_hosts():
    """What to type before a command to run it on the first or on the second of two hosts that see each other."""
    names = [f"wm{os.getpid()}{letter}" for letter in "ab"]
    if shutil.which("ip") is None or subprocess.run(["ip", "netns", "add", names[0]], check=False).returncode:
        pytest.skip("needs network namespaces: iproute2, and the right to make them")

    def ip(*words):
        subprocess.run(["ip", *words], check=True)

    try:
        ip("netns", "add", names[1])
        ip("link", "add", names[0], "type", "veth", "peer", "name", names[1])
        for name, address in zip(names, (FIRST, SECOND), strict=True):
            ip("link", "set", name, "netns", name)
            for words in (["addr", "add", f"{address}/24", "dev", name], ["link", "set", name, "up"],
                          ["link", "set", "lo", "up"]):
                ip("-n", name, *words)
        yield [["ip", "netns", "exec", name, "env", f"GLOO_SOCKET_IFNAME={name}"] for name in names]
    finally:
        for name in names:
            held = subprocess.run(["ip", "netns", "pids", name], check=False, capture_output=True, text=True).stdout
            subprocess.run(["kill", "-9", *held.split()], check=False, stderr=subprocess.DEVNULL)
            subprocess.run(["ip", "netns", "del", name], check=False)


def test_learners_on_two_hosts_without_a_shared_file_system(tmp_path):
    run, hidden = tmp_path / "run", tmp_path / "only here"
    run.mkdir()
    hidden.mkdir()
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7" * 64}
    quiet = {"env": {**os.environ, **token}, "cwd": ROOT, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with tempfile.TemporaryDirectory(prefix="wm-", dir="/tmp") as ray_folder, two_hosts() as (first, second):
        subprocess.Popen([*first, RAY, "start", "--head", f"--node-ip-address={FIRST}", f"--port={PORT}", *START,
                          "--include-dashboard=false", f"--temp-dir={ray_folder}/a"], **quiet)
        join = f"{RAY} start --address={FIRST}:{PORT} --node-ip-address={SECOND} --temp-dir={ray_folder}/b"
        hide = f"mount -t tmpfs none {run} && mount -t tmpfs none {ray_folder} && mount -t tmpfs none '{hidden}'"
        words = f"{hide} && exec {join} {' '.join(START)}"
        subprocess.Popen([*second, "unshare", "--mount", "bash", "-c", words], **quiet)
        status = [*first, RAY, "status", f"--address={FIRST}:{PORT}"]

        def both_are_there():
            told = subprocess.run(status, env=quiet["env"], check=False, capture_output=True, text=True)
            return "/4.0 CPU" in told.stdout

        wait_for(both_are_there, seconds=180)
        done = subprocess.run([*first, sys.executable, "-c", DRIVER, run, hidden, f"{FIRST}:{PORT}"], check=False,
                              cwd=ROOT, env=quiet["env"], text=True, capture_output=True, timeout=400)
        assert done.returncode == 0, done.stdout + done.stderr
    check_whole(run, 4)
    [seen] = json.loads((run / "seen.json").read_text())
    assert seen["address"] == SECOND
    assert not seen["sees the store"]
    assert seen["reads"].startswith(str(hidden))
    assert seen["episodes"] > 4
    assert not list(hidden.iterdir()), "nothing of the copy was ever on the first host"
