"""``python main.py ingest``: look at robot logs, or bring them into a replay store."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from data.budget import StoreConfig
from data.logs.ingest import IngestConfig, ingest, lerobot_sets, mapping_of
from data.logs.inspect import contact_sheet, inspect, propose, write_mapping
from data.types import UserError
from wm_rl.journal import Journal

ACTIONS = ("ingest", "inspect")


def ingest_command(
    *, action: str, folder: str, source: str, store: str | None, mapping: str | None, format: str | None, workers: int,
    dry_run: bool, logs: IngestConfig, storage: StoreConfig,
) -> int:
    """Add every usable stretch of the logs to the store, or (``inspect``) print what is in them.

    ``folder`` receives ``report.json``, or what ``inspect`` finds: a mapping to start from and contact sheets. A
    LeRobot set needs no mapping. May be repeated: nothing is added twice. Raises ``UserError`` when nothing usable is
    found, also with ``dry_run``, or a setting is missing.
    """
    if action not in ACTIONS:
        raise UserError(f"action: expected one of {', '.join(ACTIONS)}, got {action!r}")
    if not Path(source).exists():
        raise UserError(f"source={source}: no such file or folder")
    if action == "inspect":
        _inspect(Path(source), Path(folder), format, logs)
        return 0
    if store is None:
        raise UserError("ingest needs store=<folder of a replay store>; it is made when absent")
    with Journal(Path(folder), [], enabled=True).stages() as watch:
        report = ingest(source, store, logs, mapping=mapping, family=format, workers=workers, dry_run=dry_run,
                        storage=storage, report_to=Path(folder) / "report.json", watch=watch)
    for line in report.lines():
        print(line)
    print(f"report: {Path(folder) / 'report.json'}")
    return 0


def _inspect(source: Path, folder: Path, family: str | None, logs: IngestConfig) -> None:
    found, console = inspect(source, family), Console()
    for table in found.tables():
        console.print(table)
    for refused in found.refused:
        console.print(f"refused {refused.name}: {refused.reason}", markup=False)
    if not found.episodes:
        raise UserError(f"source={source}: nothing usable was found")
    for i, (_, episode) in enumerate(found.episodes):
        sheet = contact_sheet(episode)
        if sheet is not None:
            sheet.save(folder / f"contact_sheet_{i}.png")
    sets = lerobot_sets(source, family)
    mapping = mapping_of(sets[0], logs.cameras, logs.embodiment) if sets else propose(found.episodes[0][1])
    write_mapping(folder / "mapping.yaml", mapping)
    console.print(f"a mapping to start from: {folder / 'mapping.yaml'}; pictures beside it", markup=False)
