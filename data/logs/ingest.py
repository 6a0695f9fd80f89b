"""``ingest`` as its command and the training loop call it: a mapping from a file, or from what a set says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data.budget import StoreConfig
from data.lerobot import ACTION, STATE, LeRobotDataset, read_lerobot
from data.logs.commit import ingest_logs
from data.logs.mapping import Camera, LogMapping, Part, read_mapping
from data.logs.readers import find_logs
from data.logs.report import LogReport
from data.logs.survey import Watch
from data.types import UserError


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How logs are read."""

    image_size: int
    """Frames become squares of this many pixels; the whole picture is kept, its aspect is not."""
    cameras: Mapping[str, str] | None
    """Of a LeRobot set without a mapping: camera in the store -> key in the set. None takes every camera."""
    embodiment: str | None
    """Of a LeRobot set without a mapping: name of the robot in the store; None takes the set's ``robot_type``."""
    clip: bool
    """Clip actions outside an existing store's range instead of refusing the logs."""

    def __post_init__(self) -> None:
        if self.image_size < 1:
            raise UserError(f"image_size: expected a number of pixels, got {self.image_size}")


def ingest(
    source: str | Path, store: str | Path, config: IngestConfig, *, mapping: str | Path | None = None,
    family: str | None = None, workers: int = 1, dry_run: bool = False, storage: StoreConfig | None = None,
    report_to: Path | None = None, watch: Watch = lambda what, done, total: None,
) -> LogReport:
    """``ingest_logs`` with the mapping in this file, or else the one that LeRobot sets give of themselves.

    Raises ``UserError`` as that does, and when other logs come without a mapping.
    """
    if mapping is None:
        chosen = own_mapping(Path(source), config, family)
    elif config.cameras is not None or config.embodiment is not None:
        raise UserError("logs.cameras and logs.embodiment are for LeRobot sets without a mapping; write cameras and "
                        f"embodiment in {mapping}")
    else:
        chosen = read_mapping(mapping)
    return ingest_logs(
        Path(source), Path(store), chosen, image_size=config.image_size, family=family, workers=workers,
        dry_run=dry_run, clip=config.clip, storage=storage, report_to=report_to, watch=watch)


def own_mapping(source: Path, config: IngestConfig, family: str | None) -> LogMapping:
    """What the first LeRobot set at ``source`` says its columns are: state, action, all cameras, a row per frame.

    Raises ``UserError`` when there is another log, or the set has no such feature.
    """
    logs = find_logs(source, family)
    others = [path for name, path in logs if name != "lerobot"]
    if others:
        raise UserError(f"{others[0]} is no LeRobot set, so its streams need a mapping: type python main.py ingest "
                        f"action=inspect source={source} to get one to start from, then mapping=<file>")
    return mapping_of(read_lerobot(logs[0][1]), config.cameras, config.embodiment)


def mapping_of(dataset: LeRobotDataset, cameras: Mapping[str, str] | None, embodiment: str | None) -> LogMapping:
    """See ``own_mapping``. Cameras are called by the last part of their keys, where these differ."""
    ends = [key.rsplit(".", 1)[-1] for key in dataset.cameras]
    names = ends if len(set(ends)) == len(ends) else dataset.cameras
    chosen = dict(zip(names, dataset.cameras, strict=True)) if cameras is None else cameras
    for key in chosen.values():
        if key not in dataset.cameras:
            raise UserError(f"cameras: the set {dataset.path} has no {key!r}, but "
                            f"{', '.join(dataset.cameras) or 'no camera at all'}; type logs.cameras.<name>=<a key>")
    return LogMapping(
        proprio=(_whole(dataset, STATE),), action=(_whole(dataset, ACTION),), clock="nominal", rate=dataset.fps,
        cameras={name: Camera(stream=key) for name, key in chosen.items()},
        embodiment=embodiment or dataset.info.get("robot_type") or "unknown")


def _whole(dataset: LeRobotDataset, key: str) -> Part:
    if key not in dataset.features:
        raise UserError(f"{dataset.path}/meta/info.json: expected the feature {key!r}, found "
                        f"{', '.join(dataset.features)}; say in a mapping what is state and what action: python "
                        f"main.py ingest action=inspect source={dataset.path}")
    shape = dataset.features[key]["shape"]
    if len(shape) != 1:
        raise UserError(f"{dataset.path}/meta/info.json: expected {key} to be a vector, got shape {shape}")
    if dataset.names(key):
        return Part(stream=key)
    return Part(stream=key, names=tuple(f"{key.split('.')[-1]}_{i}" for i in range(shape[0])))
