"""Trained trials recorded in MLflow as a sweep records them, without Ray; tests export them."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loragrid.tracking.recorder import Recorder
from loragrid.trials.trial import Trial
from loragrid.worker.export import export_member
from loragrid.worker.worker_tags import WorkerEnvironment
from tests.support.small_packs import Run, Setup, run_pack


@dataclass(frozen=True, kw_only=True)
class RecordedTrials:
    """Trials of one setup that were trained in one pack: their store, and the pack after training."""

    uri: str
    setup: Setup
    trials: list[Trial]
    run: Run

    def logits(self, member: int) -> Tensor:
        """The trained member's logits (2, L, V) for two evaluation rows."""
        return logits_of(self.run.model.base, self.setup, len(self.trials))[member]


@torch.no_grad()
def logits_of(model: Any, setup: Setup, num_members: int = 1) -> list[Tensor]:
    """The logits (2, L, V) of each member for two evaluation rows."""
    ids = setup.rows.evaluation.input_ids[:2]
    return list(model(input_ids=ids.repeat(num_members, 1)).logits.chunk(num_members))


def record_trials(
    setup: Setup,
    trials: list[Trial],
    folder: Path,
    *,
    without_tags: frozenset[str] = frozenset(),
    chat_template: str | None = None,
) -> RecordedTrials:
    """Train the trials as one pack and record what a worker reports about them.

    without_tags: tags that an older version did not record. chat_template: see `export_member`.
    """
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    run = run_pack(setup, trials)
    tags = WorkerEnvironment(torch.device("cpu"), 1)(trials[0], setup.rows)
    recorder = Recorder("exports", uri, str(folder / "artifacts"))
    recorder.start_sweep("exports-1", {}, {})
    for member, trial in enumerate(trials):
        kept = {key: value for key, value in tags.items() if key not in without_tags}
        recorder.start_trial(trial.trial_id, trial.parameters(), kept)
        with tempfile.TemporaryDirectory() as name:
            output = Path(name) / "adapter"
            if export_member(run.model, member, trial.model.name, output, chat_template=chat_template):
                recorder.log_artifacts(trial.trial_id, output, "adapter")
        recorder.end_trial(trial.trial_id, "FINISHED")
    recorder.end_sweep("FINISHED")
    return RecordedTrials(uri=uri, setup=setup, trials=trials, run=run)


def run_snippet(snippet: str) -> Mapping[str, Any]:
    """The names that a snippet of Python defines."""
    names: dict[str, Any] = {}
    exec(snippet, names)
    return names
