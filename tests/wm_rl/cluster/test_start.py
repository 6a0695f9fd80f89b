"""Joining a cluster that was started elsewhere, as ``ray start`` starts it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]
ROOT = Path(__file__).parents[3]
JOIN = """
import sys
from data.types import UserError
from tests.wm_rl.cluster import toy
from wm_rl.cluster.start import cluster
try:
    with cluster(toy.runtime(address=sys.argv[1]), cpus=1):
        print("joined")
except UserError as error:
    print(error)
"""


def join(address, **variables):
    return subprocess.run([sys.executable, "-c", JOIN, address], env={**os.environ, **variables}, cwd=ROOT, text=True,
                          capture_output=True, check=True, timeout=200).stdout


def test_a_cluster_with_a_token_lets_in_who_has_it_and_others_read_what_to_type():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "7" * 64}
    head = subprocess.Popen(
        [Path(sys.executable).parent / "ray", "start", "--head", "--node-ip-address=127.0.0.1", "--num-cpus=1",
         f"--port={address.split(':')[1]}", "--include-dashboard=false", "--disable-usage-stats", "--block",
         "--object-store-memory=100000000"],
        env={**os.environ, **token}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert join(address, **token).strip().endswith("joined")
        refused = join(address, RAY_AUTH_MODE="disabled")
        assert f"expected a Ray cluster at runtime.address={address}" in refused
        assert "type RAY_AUTH_MODE=token" in refused
    finally:
        head.terminate()
        head.wait(timeout=60)
