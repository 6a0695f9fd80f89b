"""Outcomes for episodes whose recording has none, from the success model, by the rule that ends imagined episodes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from safetensors.torch import save as serialise

from data.outcome import steps_until_decided
from data.outcome_labels import OutcomeLabel, write_labels
from data.store import ReplayStore
from data.types import Source, Success, UserError
from world_model.success import SuccessModel
from world_model.success_training import recorded_pairs

FRAMES = 256
"""Judged in one forward pass."""
CHECKED = 100
"""Newest episodes with a recorded label that the rule is held against."""


@dataclass(frozen=True, kw_only=True)
class OutcomeReport:
    """What was labelled, and what the same rule says where the recording has a label."""

    yes: int
    no: int
    left: int
    """Episodes that stay unknown: the model saw success, but not in enough consecutive frames."""
    checked: int
    """Episodes with a recorded label, of the sources that were labelled."""
    agreed: int
    false_yes: int
    false_no: int
    steps_off: float
    """Mean absolute difference between the step of success and the recorded one; NaN without a success to compare."""

    def lines(self) -> list[str]:
        """For people."""
        lines = [f"{self.yes + self.no} episodes of unknown success were labelled: {self.yes} yes, {self.no} no; "
                 f"{self.left} stay unknown (success was seen, but not confirmed)"]
        if not self.checked:
            return [*lines, "  no recorded label to hold the rule against: nobody knows how good these are"]
        off = "" if np.isnan(self.steps_off) else f", success {self.steps_off:.1f} steps off"
        return [*lines, f"  where the recording has a label it agrees on {self.agreed} of {self.checked} ("
                        f"{self.false_yes} false yes, {self.false_no} false no{off}); the model may have learned them"]


def label_outcomes(
    store: ReplayStore, model: SuccessModel, *, threshold: float, success_frames: int
) -> OutcomeReport:
    """Label every recorded episode of unknown success beside the recording; nothing recorded changes.

    Raises ``UserError`` when the model does not fit the store.
    """
    store.seal()
    _check_fits(store, model)
    episodes = store.episodes
    recorded = episodes.source != Source.IMAGINED.value
    unknown = np.flatnonzero(recorded & (episodes.success == Success.UNKNOWN.value))
    known = np.flatnonzero(recorded & (episodes.success != Success.UNKNOWN.value)
                           & np.isin(episodes.source, episodes.source[unknown]))[-CHECKED:]
    weights = {name: value.contiguous() for name, value in model.state_dict().items()}
    rule = {"model": hashlib.sha256(serialise(weights)).hexdigest()[:16], "threshold": threshold,
            "success_frames": success_frames}

    def judge(episode: int) -> OutcomeLabel:
        return judge_episode(success_probability(store, model, episode), threshold=threshold,
                             success_frames=success_frames)

    said = {episode: judge(episode) for episode in unknown.tolist()}
    for segment in dict.fromkeys(episodes.segment[unknown].tolist()):
        own = [episode for episode in said if episodes.segment[episode] == segment]
        labels = {int(episodes.row[episode]): said[episode] for episode in own
                  if said[episode].success is not Success.UNKNOWN}
        write_labels(store.path, segment, labels, rule)
    store.refresh()
    return _report(store, list(said.values()), {episode: judge(episode) for episode in known.tolist()})


@torch.inference_mode()
def success_probability(store: ReplayStore, model: SuccessModel, episode: int) -> Float[np.ndarray, " t"]:
    """Probability that the task is done after each control step."""
    device = next(model.parameters()).device
    parts = []
    for steps in torch.arange(1, int(store.episodes.length[episode]) + 1).split(FRAMES):
        parts.append(model(*(part.to(device) for part in recorded_pairs(store, episode, steps.tolist()))))
    return torch.cat(parts).double().cpu().numpy()


def judge_episode(
    probability: Float[np.ndarray, " t"], *, threshold: float, success_frames: int
) -> OutcomeLabel:
    """Yes at the last of the first ``success_frames`` frames in a row of at least ``threshold``; no where none is.

    Unknown where some reach it, but never as many in a row.
    """
    counts = probability >= threshold
    streak = 0
    for step, seen in enumerate(counts.tolist()):
        streak = streak + 1 if seen else 0
        if streak == success_frames:
            return OutcomeLabel(success=Success.YES, step=step, probability=float(probability.max()))
    return OutcomeLabel(success=Success.UNKNOWN if counts.any() else Success.NO, step=-1,
                        probability=float(probability.max()))


def _report(store: ReplayStore, said: Sequence[OutcomeLabel], known: dict[int, OutcomeLabel]) -> OutcomeReport:
    truth = {episode: Success(str(store.episodes.success[episode])) for episode in known}
    off = [abs(label.step - (steps_until_decided(store.column(episode, "terminated")[:-1]) - 1))
           for episode, label in known.items()
           if label.success is truth[episode] is Success.YES and store.column(episode, "terminated").any()]

    def count(outcome: Success) -> int:
        return sum(label.success is outcome for label in said)

    def wrong(claimed: Success, recorded: Success) -> int:
        return sum(label.success is claimed and truth[episode] is recorded for episode, label in known.items())

    return OutcomeReport(
        yes=count(Success.YES), no=count(Success.NO), left=count(Success.UNKNOWN), checked=len(known),
        agreed=sum(label.success is truth[episode] for episode, label in known.items()),
        false_yes=wrong(Success.YES, Success.NO), false_no=wrong(Success.NO, Success.YES),
        steps_off=float(np.mean(off)) if off else float("nan"))


def _check_fits(store: ReplayStore, model: SuccessModel) -> None:
    expected = {"cameras": len(store.spec.cameras), "proprio_dim": store.spec.proprio_dim}
    for name, value in expected.items():
        if model.config[name] != value:
            raise UserError(f"the success model was fitted with {name}={model.config[name]}, the store {store.path} "
                            f"has {value}; fit one with python main.py train_world_model store={store.path}")
