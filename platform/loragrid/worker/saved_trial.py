"""A trial that has not ended, stored as named tensors, because reading these cannot run code."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from loragrid.training.member_state import MemberState

_TENSOR, _CURVE, _PROGRESS = "tensor/", "curve/", "progress"


@dataclass(frozen=True, kw_only=True)
class SavedTrial:
    """A trial that has not ended: its member's state, and what has been reported about it.

    records: its whole curve, `{"step": 3, "train/loss": 2.5}`. figures, seconds: as in `PackUpdate` and `TrialEnd`.
    rankings: for the rungs that the trial has passed, rung -> all trials that were compared there, best first.
    """

    state: MemberState
    records: list[dict[str, float]] = field(default_factory=list)
    figures: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    rankings: Mapping[int, list[str]] = field(default_factory=dict)


def to_tensors(saved: SavedTrial) -> dict[str, torch.Tensor]:
    """The saved trial as named tensors: weights and moments, curves, and the rest as JSON."""
    progress = {
        "completed": saved.state.completed,
        "active": saved.state.active,
        "figures": dict(saved.figures),
        "seconds": dict(saved.seconds),
        "rankings": {str(rung): ids for rung, ids in saved.rankings.items()},
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
        rankings={int(rung): ids for rung, ids in progress["rankings"].items()},
    )
