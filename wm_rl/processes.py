"""What a tree of processes holds: memory that no file stands behind, shared memory, open files (Linux)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

_KIB = 1024


def descendants(root: int) -> dict[int, str]:
    """``root`` and every process that descends from it, with a name that people know it by."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found, todo = {}, [root]
    while todo:
        pid = todo.pop()
        todo += children.get(pid, [])
        name = _name(pid)
        if name is not None:
            found[pid] = name
    return found


def holdings(pid: int) -> Mapping[str, int] | None:
    """Bytes of private and of shared memory, and open files of a process; None when it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        files = len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return None
    status = dict(line.split(":", 1) for line in lines)
    if "RssAnon" not in status:  # it has ended, and nobody has taken note
        return None
    return {"private_bytes": int(status["RssAnon"].split()[0]) * _KIB,
            "shared_bytes": int(status["RssShmem"].split()[0]) * _KIB, "open_files": files}


def _parents() -> Iterator[tuple[int, int]]:
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                fields = Path(f"/proc/{entry}/stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            yield int(entry), int(fields[1])


def _name(pid: int) -> str | None:
    """Ray's processes are called ``ray::Collector.play`` while they play; the rest by their program's file."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return None
    first = words[0].split(" ")[0]
    return first.removeprefix("ray::").split(".")[0] if first.startswith("ray::") else Path(first).name
