"""What a sweep and its workers send each other; quick to import, for every process it passes through must do so."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loragrid.engine_choice import RequestedMode
from loragrid.planning import Pack

if TYPE_CHECKING:
    import ray

    from loragrid.data import TokenizedData

ADAPTERS = "adapters"


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """All a worker is given.

    data: a reference into Ray's object store; rows are tokenised once per sweep.
    losses_in_every_report: hold updates back until there are losses to report with them: a `Tuner` with a metric
    takes no report without it.
    """

    pack: Pack
    data: "ray.ObjectRef[TokenizedData]"
    threads: int
    engine_mode: RequestedMode = "auto"
    losses_in_every_report: bool = False


@dataclass(frozen=True, kw_only=True)
class PackUpdate:
    """What a pack tells the sweep's driver; every mapping is keyed by trial id, but `tags` are for all its trials."""

    phase: str
    completed: int = 0
    steps: int = 0
    records: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)
    diverged_at: Mapping[str, int] = field(default_factory=dict)
    figures: Mapping[str, dict[str, float]] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    finished: bool = False

    def after(self, earlier: "PackUpdate") -> "PackUpdate":
        """This update and what an earlier one had to say, as one."""
        records = {
            trial_id: [*earlier.records.get(trial_id, []), *self.records.get(trial_id, [])]
            for trial_id in {**earlier.records, **self.records}
        }
        return replace(
            self,
            records=records,
            figures={**earlier.figures, **self.figures},
            tags={**earlier.tags, **self.tags},
        )
