"""Outcomes that a model gave to episodes whose recording has none, in one file per segment beside what was recorded.

    <store>/outcome/<segment>.json    ``labels`` by episode of the segment, and ``rule``: which model, which threshold

The recording does not change, and only readers who ask for the labels see them (``ReplayStore.with_outcome_labels``).
An episode whose recording says how it ended is never relabelled.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.layout import EPISODE, WORDS, write_group, write_json
from data.segment import Segment
from data.types import Success

FOLDER = "outcome"
_SUCCESS, _DECISIONS = EPISODE.index("success"), EPISODE.index("decisions")
_UNKNOWN = WORDS["success"].index(Success.UNKNOWN)


@dataclass(frozen=True, kw_only=True)
class OutcomeLabel:
    """What a model says of one episode."""

    success: Success
    """Yes or no."""
    step: int
    """The control step after which the task was done; -1 for no."""
    probability: float
    """The model's largest probability of success over the frames."""


def write_labels(store: Path, segment: str, labels: Mapping[int, OutcomeLabel], rule: Mapping[str, Any]) -> None:
    """Label episodes of a sealed segment, by their row in it. Earlier labels of the segment move to ``superseded/``."""
    (store / FOLDER).mkdir(exist_ok=True)
    file = store / FOLDER / f"{segment}.json"
    _supersede(store, file)
    write_json(file, {"rule": dict(rule), "labels": {
        str(row): {"success": label.success.value, "step": label.step, "probability": label.probability}
        for row, label in sorted(labels.items())}})


def read_labels(file: Path) -> tuple[dict[int, OutcomeLabel], dict[str, Any]]:
    """Labels by row, and the rule. Raises ``ValueError`` for a file that is damaged."""
    try:
        content = json.loads(file.read_text())
        labels = {int(row): OutcomeLabel(success=Success(each["success"]), step=int(each["step"]),
                                         probability=float(each["probability"]))
                  for row, each in content["labels"].items()}
        return labels, dict(content["rule"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not readable ({type(error).__name__})") from None


def revoke_labels(store: Path) -> int:
    """Take all labels back: their files move to ``superseded/``. Returns how many files there were, a segment each."""
    files = sorted((store / FOLDER).glob("*.json"))
    for file in files:
        _supersede(store, file)
    return len(files)


def lay_over(segment: Segment, file: Path) -> None:
    """Give the episodes of unknown success what ``file`` says: success, the step that ends it, and its reward of 1.

    Decisions after that step are no longer any (``data.outcome``).
    """
    labels, rule = read_labels(file)
    table = segment.table.copy()
    columns = {name: segment.columns[name][: segment.rows].copy()
               for name in ("reward", "terminated", "truncated", "decision")}
    for row, label in labels.items():
        start, length = table[row, :2].tolist()
        if table[row, _SUCCESS] != _UNKNOWN:
            continue
        table[row, _SUCCESS] = WORDS["success"].index(label.success)
        segment.labelled[row] = {"success": label.success.value, "probability": label.probability, **rule}
        if label.success is Success.YES:
            if not 0 <= label.step < length:
                raise ValueError(f"{file}: episode {row} has {length} steps, its label names step {label.step}")
            columns["reward"][start + label.step] = 1
            columns["terminated"][start + label.step] = True
            columns["truncated"][start : start + length] = False
            columns["decision"][start + label.step + 1 : start + length] = False
        table[row, _DECISIONS] = np.count_nonzero(columns["decision"][start : start + length])
    segment.table = table
    segment.columns |= columns


def _supersede(store: Path, file: Path) -> None:
    if file.exists():
        aside = store / "superseded" / str(sum(each.is_dir() for each in (store / "superseded").iterdir()))
        write_group(aside, {})
        file.rename(aside / f"{FOLDER}-{file.name}")
