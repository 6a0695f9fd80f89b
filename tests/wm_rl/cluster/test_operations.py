"""A run over actors as operators see it: its status from outside, and what listens where."""

import os
import socket
from functools import partial
from pathlib import Path

import pytest

from tests.wm_rl.cluster import toy
from tests.wm_rl.test_status import printed
from wm_rl import status
from wm_rl.cluster import driver
from wm_rl.commands.train import _describe

on_ray = [pytest.mark.ray, pytest.mark.slow, pytest.mark.xdist_group("ray")]


def family(root):
    """Process ids of ``root`` and everything below it."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue  # it ended
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found


def inodes(pid):
    """Of the sockets that a process holds."""
    found = set()
    for file in Path(f"/proc/{pid}/fd").glob("*"):
        try:
            target = os.readlink(file)
        except OSError:
            continue
        if target.startswith("socket:["):
            found.add(target[8:-1])
    return found


def listening(pids):
    """``{(process name, address)}`` of all TCP sockets on which these processes listen."""
    owners = {inode: pid for pid in pids for inode in inodes(pid)}
    found = set()
    for table, kind in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] != "0A" or fields[9] not in owners:
                continue
            raw = bytes.fromhex(fields[1].split(":")[0])
            packed = b"".join(raw[i:i + 4][::-1] for i in range(0, len(raw), 4))
            name = Path(f"/proc/{owners[fields[9]]}/comm").read_text().strip()
            found.add((name, socket.inet_ntop(kind, packed)))
    return found


def test_listening_sockets_are_found():
    for kind, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::1")):
        with socket.socket(kind) as one:
            one.bind((address, 0))
            assert address not in {found for _, found in listening([os.getpid()])}
            one.listen()
            assert address in {found for _, found in listening([os.getpid()])}


class TestOnRay:
    pytestmark = on_ray

    @pytest.mark.skipif("RAY_ADDRESS" in os.environ, reason="looks at a cluster of the run's own")
    def test_a_run_is_seen_from_outside_and_listens_to_this_machine_only(self, tmp_path, monkeypatch):
        monkeypatch.setattr(status, "_EVERY", 0.2)
        checkpoint, seen, sockets = driver._Driver._checkpoint, [], set()

        def then_look(self, iteration, learned):
            checkpoint(self, iteration, learned)
            seen.append((status.read(folder), printed(folder)))
            sockets.update(listening(family(os.getpid())))

        monkeypatch.setattr(driver._Driver, "_checkpoint", then_look)
        folder = tmp_path / "run"
        loop = toy.loop(folder, iterations=4, latency=0.05)
        with status.told(folder, partial(_describe, loop, "ray")):
            loop.run(toy.runtime().improve)
        newest, table = seen[-1]
        print(table, sockets)
        members = {member["name"]: member for member in newest.facts["live"]["members"]}
        assert set(members) == {"the writer", "inference server 0", "collector 0", "the learner"}
        assert all(member["up"] and member["node"] == socket.gethostname() for member in members.values())
        assert len({member["pid"] for member in members.values()}) == 4
        assert all(member["silent"] < 60 for member in members.values())
        assert newest.rates()["updates_per_s"] > 0
        for said in ("running", "improve (ray)", "collector 0", "updates that data pays for", "lag"):
            assert said in table
        assert status.read(folder).state == "ended"
        assert {name for name, _ in sockets} >= {"gcs_server", "raylet"}
        assert {address for _, address in sockets} <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}, sockets
