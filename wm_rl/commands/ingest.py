"""``python main.py ingest``: robot logs into a replay store."""

from __future__ import annotations

from data.budget import StoreConfig
from data.ingest import IngestConfig, ingest


def ingest_logs(*, source: str, store: str, logs: IngestConfig, storage: StoreConfig) -> int:
    """Ingest and say what was added, missing and refused. May be repeated: nothing is added twice."""
    for line in ingest(source, store, logs, storage).lines():
        print(line)
    return 0
