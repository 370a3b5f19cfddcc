"""The messages between a sweep and its workers; quick to import, because every process that forwards them does so."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from loragrid.config.experiment import DataConfig, EarlyStoppingConfig, EngineConfig, ModelConfig, SamplesConfig
from loragrid.trials.outcome import TrialEnd
from loragrid.trials.packing import Pack, PackQueue
from loragrid.trials.tags import SPLIT_TAG

if TYPE_CHECKING:
    import ray

    from loragrid.data.dataset import TokenizedData
    from loragrid.worker.checkpoints import TrialStore

RowsByConfig = Mapping[tuple[ModelConfig, DataConfig], "ray.ObjectRef[TokenizedData]"]
"""References into Ray's object store: rows are tokenised once per sweep, and workers fetch them from there."""


@dataclass(frozen=True, kw_only=True)
class WorkerTask:
    """Everything a worker gets.

    by_tune: a scheduler or searcher of Tune decides about the trial. Then no trial is stopped here, and updates are
    held back until there are losses to report with them, because a `Tuner` with a metric accepts no report without it.
    shard: every worker holds its share of the base.
    folder: the working folder of the driver, to which relative paths are relative.
    """

    queue: PackQueue
    rows: RowsByConfig
    store: "TrialStore"
    threads: int
    engine: EngineConfig
    folder: str
    early_stopping: EarlyStoppingConfig | None = None
    samples: SamplesConfig | None = None
    by_tune: bool = False
    shard: bool = False


@dataclass(frozen=True, kw_only=True)
class QueueFailure:
    """Why a queue's workers were given up: the reason in one line, and the traceback."""

    reason: str
    traceback: str
    out_of_memory: bool = False


@dataclass(frozen=True, kw_only=True)
class PackUpdate:
    """What a queue reports to the sweep's driver about the pack it trains; every mapping is keyed by trial id.

    completed: steps. steps: the step at which this pack's training ends. done: this is the pack's last update.
    """

    pack_id: str
    trial_ids: tuple[str, ...]
    phase: str
    completed: int = 0
    steps: int = 0
    records: Mapping[str, list[dict[str, float]]] = field(default_factory=dict)
    figures: Mapping[str, dict[str, float]] = field(default_factory=dict)
    tags: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    ended: Mapping[str, TrialEnd] = field(default_factory=dict)
    done: bool = False

    def after(self, previous: "PackUpdate") -> "PackUpdate":
        """This update merged with an earlier one of the same pack."""
        records = {
            trial_id: [*previous.records.get(trial_id, []), *self.records.get(trial_id, [])]
            for trial_id in {**previous.records, **self.records}
        }
        figures = {
            trial_id: {**previous.figures.get(trial_id, {}), **self.figures.get(trial_id, {})}
            for trial_id in {**previous.figures, **self.figures}
        }
        tags = {
            trial_id: {**previous.tags.get(trial_id, {}), **self.tags.get(trial_id, {})}
            for trial_id in {**previous.tags, **self.tags}
        }
        ended = {**previous.ended, **self.ended}
        return replace(self, records=records, figures=figures, tags=tags, ended=ended)


def split_tags(half: Pack, whole: Pack, reason: str) -> dict[str, str]:
    """The tags of trials whose pack was halved."""
    what = f"{whole.pack_id} of {len(whole.trials)} trials was halved: {reason}"
    return {"loragrid.pack": half.pack_id, SPLIT_TAG: what}
