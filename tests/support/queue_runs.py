"""Runs packs in this process as a worker does, and collects the updates that it sends."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from loragrid.config.experiment import DataConfig, EarlyStoppingConfig, ModelConfig
from loragrid.data.dataset import TokenizedData
from loragrid.training.step import PackModel
from loragrid.trials.outcome import TrialEnd
from loragrid.trials.packing import Pack
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import PackUpdate
from loragrid.worker.open_trials import OpenTrials
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.queue import run_queue
from loragrid.worker.queue_worker import build_worker
from tests.support.small_packs import Setup, largest_difference, run_pack

STEPS = 8


@dataclass(kw_only=True)
class Seen:
    """All updates that a queue sent, and what they contain together."""

    store: TrialStore = field(default_factory=lambda: TrialStore(tempfile.mkdtemp()))
    updates: list[PackUpdate] = field(default_factory=list)

    def __call__(self, update: PackUpdate) -> None:
        self.updates.append(update)

    @property
    def exported(self) -> set[str]:
        return {path.parent.name for path in Path(self.store.uri).glob("*/adapter")}

    @property
    def ended(self) -> dict[str, TrialEnd]:
        ends = [item for update in self.updates for item in update.ended.items()]
        assert len(ends) == len(dict(ends)), "a trial ends once"
        return dict(ends)

    @property
    def figures(self) -> dict[str, dict[str, float]]:
        return {trial_id: found for update in self.updates for trial_id, found in update.figures.items()}

    def records(self, trial: Trial) -> dict[int, dict[str, float]]:
        found = [record for update in self.updates for record in update.records.get(trial.trial_id, [])]
        by_step = {int(record["step"]): record for record in found}
        assert len(by_step) == len(found), "a step is reported once"
        return by_step

    def tags(self, trial: Trial) -> dict[str, str]:
        return {key: value for update in self.updates for key, value in update.tags.get(trial.trial_id, {}).items()}

    def num_loaded(self) -> int:
        return sum(update.phase == "loading the base" for update in self.updates)


def queue(
    setup: Setup,
    packs: Sequence[Sequence[Trial]],
    early_stopping: EarlyStoppingConfig | None = None,
    *,
    isolate_failures: bool = True,
    device: str = "cpu",
    **settings: Any,
) -> Seen:
    """Run the packs in this process, as a worker would."""

    def rows_of(model: ModelConfig, data: DataConfig) -> TokenizedData:
        assert (model, data) == (setup.model, setup.data)
        return setup.rows

    seen = Seen()
    group = ProcessGroup(device=torch.device(device), isolate_failures=isolate_failures)
    worker = build_worker(rows_of, seen, seen.store, group, early_stopping=early_stopping, **settings)
    named = [Pack(pack_id=f"pack-{index:03d}", trials=tuple(trials)) for index, trials in enumerate(packs)]
    run_queue(named, worker, early_stopping)
    return seen


def assert_as_alone(setup: Setup, seen: Seen, trial: Trial, steps: int = STEPS) -> None:
    """Asserts that the trial's curves up to `steps` equal those of an undisturbed pack of one."""
    alone, ours = run_pack(setup, [trial], eval_every=None).records[0], seen.records(trial)
    assert set(ours) == set(range(steps + 1))
    for key in ("train/loss", "train/grad_norm", "train/learning_rate"):
        difference = largest_difference(
            {step: ours[step][key] for step in range(1, steps + 1)},
            {step: alone[step][key] for step in range(1, steps + 1)},
        )
        assert difference <= 1e-10, (trial.trial_id, key)
    assert abs(ours[0]["eval/loss"] - alone[0]["eval/loss"]) <= 1e-10
    if steps == STEPS:
        assert abs(ours[steps]["eval/loss"] - alone[steps]["eval/loss"]) <= 1e-10


def let_diverge(monkeypatch: pytest.MonkeyPatch, trial: Trial) -> None:
    """Give one trial weights that are not finite, so that it diverges in its first step in a pack."""
    original = OpenTrials.put_into

    def put_into(own: OpenTrials, model: PackModel, trials: Sequence[Trial]) -> None:
        original(own, model, trials)
        for member in (place for place, other in enumerate(trials) if other.trial_id == trial.trial_id):
            stacks, index = model.pack.member_stacks(member)
            with torch.no_grad():
                for stack in stacks.values():
                    for tensor in stack.member_tensors(index).values():
                        tensor.fill_(float("nan"))

    monkeypatch.setattr(OpenTrials, "put_into", put_into)
