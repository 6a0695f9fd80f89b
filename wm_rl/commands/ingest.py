"""``python main.py ingest``: robot logs into a replay store."""

from __future__ import annotations

from data.ingest import IngestConfig, ingest


def ingest_logs(*, source: str, store: str, logs: IngestConfig) -> int:
    """Ingest and say what was added, missing and refused. May be repeated: nothing is added twice."""
    for line in ingest(source, store, logs).lines():
        print(line)
    return 0
