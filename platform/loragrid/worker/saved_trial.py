"""A trial that has not ended, stored as named tensors, because reading these cannot run code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from loragrid.training.member_state import MemberState
from loragrid.trials.successive_halving import SettingScore

_TENSOR, _CURVE, _PROGRESS = "tensor/", "curve/", "progress"


@dataclass(frozen=True, kw_only=True)
class SavedTrial:
    """A trial that has not ended: its member's state, and what has been reported about it.

    records: its whole curve, `{"step": 3, "train/loss": 2.5}`. figures, seconds: as in `PackUpdate` and `TrialEnd`.
    rankings: for the rungs that the trial has passed, rung -> all settings that were ranked there, best first.
    """

    state: MemberState
    records: list[dict[str, float]] = field(default_factory=list)
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    rankings: Mapping[int, list[SettingScore]] = field(default_factory=dict)

    def without_tensors(self) -> "SavedTrial":
        """The saved trial without its weights and moments."""
        return replace(self, state=replace(self.state, tensors={}))


def to_tensors(saved: SavedTrial) -> dict[str, torch.Tensor]:
    """The saved trial as named tensors: weights and moments, curves, and the rest as JSON."""
    progress = {
        "completed": saved.state.completed,
        "active": saved.state.active,
        "figures": dict(saved.figures),
        "seconds": dict(saved.seconds),
        "setting_rankings": {str(rung): [list(own) for own in ranking] for rung, ranking in saved.rankings.items()},
    }
    points: dict[str, list[tuple[float, float]]] = {}
    for record in saved.records:
        for key, value in record.items():
            if key != "step":
                points.setdefault(key, []).append((record["step"], value))
    tensors = {_TENSOR + name: tensor.contiguous() for name, tensor in saved.state.tensors.items()}
    tensors |= {_CURVE + key: torch.tensor(found, dtype=torch.float64) for key, found in points.items()}
    tensors[_PROGRESS] = torch.tensor(list(json.dumps(progress).encode()), dtype=torch.uint8)
    return tensors


def from_tensors(tensors: Mapping[str, torch.Tensor]) -> SavedTrial:
    """The inverse of `to_tensors`.

    Raises:
        KeyError, ValueError: the tensors are not those of a saved trial.
    """
    progress = json.loads(bytes(tensors[_PROGRESS].tolist()))
    records: dict[int, dict[str, float]] = {}
    for name, points in tensors.items():
        if name.startswith(_CURVE):
            for step, value in points.tolist():
                records.setdefault(int(step), {"step": int(step)})[name.removeprefix(_CURVE)] = value
    return SavedTrial(
        state=MemberState(
            completed=progress["completed"],
            active=progress["active"],
            tensors={
                name.removeprefix(_TENSOR): tensor for name, tensor in tensors.items() if name.startswith(_TENSOR)
            },
        ),
        records=[records[step] for step in sorted(records)],
        figures=progress["figures"],
        seconds=progress["seconds"],
        # Earlier versions ranked single trials under another key; their rankings are not read.
        rankings={
            int(rung): [SettingScore(*own) for own in ranking]
            for rung, ranking in progress.get("setting_rankings", {}).items()
        },
    )
