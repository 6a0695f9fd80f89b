"""``ingest`` as its command and the training loop call it: a mapping from a file, or from what a set says of itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.budget import StoreConfig
from data.lerobot import ACTION, STATE, LeRobotDataset, read_lerobot
from data.logs.commit import ingest_logs
from data.logs.mapping import Camera, LogMapping, Part, read_mapping
from data.logs.readers import find_logs
from data.logs.report import LogReport
from data.logs.statistics import RANGES
from data.logs.survey import Watch
from data.types import Statistics, UserError


@dataclass(frozen=True, kw_only=True)
class IngestConfig:
    """How logs are read."""

    image_size: int
    """Frames become squares of this many pixels; the whole picture is kept, its aspect is not."""
    cameras: Mapping[str, str] | None
    """Of a LeRobot set without a mapping: camera in the store -> key in the set. None takes every camera."""
    embodiment: str | None
    """Of a LeRobot set without a mapping: name of the robot in the store; None takes the set's ``robot_type``."""
    action_range: str
    """``quantile``: a new store's action range is from the 1 % to the 99 % quantile, the rest is clipped; ``range``:
    from minimum to maximum. Also what of later logs may be clipped: a hundredth beyond either end, or nothing."""
    clip: bool
    """Clip more than that to an existing store's range, instead of refusing the logs."""

    def __post_init__(self) -> None:
        if self.action_range not in RANGES:
            raise UserError(f"action_range: expected {' or '.join(RANGES)}, got {self.action_range!r}; type "
                            f"logs.action_range={RANGES[0]}")
        if self.image_size < 1:
            raise UserError(f"image_size: expected a number of pixels, got {self.image_size}")


def ingest(
    source: str | Path, store: str | Path, config: IngestConfig, *, mapping: str | Path | None = None,
    family: str | None = None, workers: int = 1, dry_run: bool = False, storage: StoreConfig | None = None,
    report_to: Path | None = None, watch: Watch = lambda what, done, total: None,
) -> LogReport:
    """``ingest_logs`` with the mapping in this file, or else the one that the first LeRobot set gives of itself.

    Raises ``UserError`` as that does, and when other logs come without a mapping.
    """
    if mapping is not None and (config.cameras is not None or config.embodiment is not None):
        raise UserError("logs.cameras and logs.embodiment are for LeRobot sets without a mapping; write cameras and "
                        f"embodiment in {mapping}")
    sets = lerobot_sets(Path(source), family)
    if mapping is None and not sets:
        raise UserError(f"source={source} is no LeRobot set, or not all of it, so its streams need a mapping: type "
                        f"python main.py ingest action=inspect source={source} to get one to start from, then "
                        "mapping=<file>")
    chosen = read_mapping(mapping) if mapping is not None else mapping_of(sets[0], config.cameras, config.embodiment)
    return ingest_logs(
        Path(source), Path(store), chosen, image_size=config.image_size, family=family, workers=workers,
        dry_run=dry_run, clip=config.clip, action_range=config.action_range, known=exported_with(sets, chosen),
        storage=storage, report_to=report_to, watch=watch)


def lerobot_sets(source: Path, family: str | None) -> list[LeRobotDataset]:
    """Every log at ``source`` as a LeRobot set, but for those with damaged metadata; none where a log is no such set.

    Raises ``UserError`` when there is no log, or all sets are damaged.
    """
    logs = find_logs(source, family)
    if any(name != "lerobot" for name, _ in logs):
        return []
    sets, damage = [], []
    for _, path in logs:
        try:
            sets.append(read_lerobot(path))
        except UserError as error:
            damage.append(error)
    if not sets:
        raise damage[0]
    return sets


def exported_with(sets: Sequence[LeRobotDataset], mapping: LogMapping) -> Statistics | None:
    """The statistics that all sets were exported with, where ``mapping`` takes state and action as they are."""
    found = [each.statistics for each in sets]
    if not found or found[0] is None or any(each is None or not each.same_as(found[0]) for each in found):
        return None
    whole = mapping_of(sets[0], None, None)
    return found[0] if (mapping.proprio, mapping.action) == (whole.proprio, whole.action) else None


def mapping_of(dataset: LeRobotDataset, cameras: Mapping[str, str] | None, embodiment: str | None) -> LogMapping:
    """What a set says that its columns are: state, action, a row per frame. Cameras: name in the store -> key.

    Without ``cameras`` all are taken and called by the last part of their keys, where these differ; ``embodiment``
    None is the set's ``robot_type``. Raises ``UserError`` when the set has no such feature.
    """
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
