"""``python main.py ingest``: look at robot logs, or bring them into a replay store."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from data.budget import StoreConfig
from data.ingest import IngestConfig, ingest
from data.lerobot import is_lerobot
from data.logs.commit import ingest_logs
from data.logs.inspect import contact_sheet, inspect, propose, write_mapping
from data.logs.mapping import read_mapping
from data.types import UserError

ACTIONS = ("ingest", "inspect")


def ingest_command(
    *, action: str, folder: str, source: str, store: str | None, mapping: str | None, format: str | None, workers: int,
    dry_run: bool, logs: IngestConfig, storage: StoreConfig,
) -> int:
    """Add every usable stretch of the logs to the store, or (``inspect``) print what is in them.

    ``inspect`` writes a mapping to start from and contact sheets to ``folder``. A LeRobot set needs no mapping. May be
    repeated: nothing is added twice. Raises ``UserError`` when nothing usable is found, or a setting is missing.
    """
    if action not in ACTIONS:
        raise UserError(f"action: expected one of {', '.join(ACTIONS)}, got {action!r}")
    if not Path(source).exists():
        raise UserError(f"source={source}: no such file or folder")
    if action == "inspect":
        _inspect(Path(source), Path(folder), format)
        return 0
    if store is None:
        raise UserError("ingest needs store=<folder of a replay store>; it is made when absent")
    if is_lerobot(Path(source)) and mapping is None:
        lines = ingest(source, store, logs, storage).lines()
    elif mapping is None:
        raise UserError(f"source={source} is no LeRobot set, so its streams need a mapping: type python main.py ingest "
                        f"action=inspect source={source} to get one to start from, then mapping=<file>")
    else:
        lines = ingest_logs(Path(source), Path(store), read_mapping(mapping), image_size=logs.image_size, family=format,
                            workers=workers, dry_run=dry_run, clip=logs.clip, storage=storage).lines()
    for line in lines:
        print(line)
    return 0


def _inspect(source: Path, folder: Path, family: str | None) -> None:
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
    write_mapping(folder / "mapping.yaml", propose(found.episodes[0][1]))
    console.print(f"a mapping to start from: {folder / 'mapping.yaml'}; pictures beside it", markup=False)
