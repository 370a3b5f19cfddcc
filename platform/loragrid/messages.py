"""What a sweep and its workers send each other; quick to import, for every process it passes through must do so."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from loragrid.planning import Pack

if TYPE_CHECKING:
    import ray

    from loragrid.data import TokenizedData

ADAPTERS = "adapters"


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """All a worker is given. `data` is a reference into Ray's object store: rows are tokenised once per sweep."""

    pack: Pack
    data: "ray.ObjectRef[TokenizedData]"
    threads: int


@dataclass(frozen=True, kw_only=True)
class PackUpdate:
    """What a pack tells the sweep's driver; every mapping is keyed by trial id."""

    phase: str
    completed: int = 0
    steps: int = 0
    records: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)
    diverged_at: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, dict[str, float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    finished: bool = False
