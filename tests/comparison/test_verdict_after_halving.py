"""Simulated sweeps through the worker's own rungs: early stopping leaves every method with a choice of all seeds.

75 trials: 5 methods x 5 learning rates x 3 seeds, two rungs, one in three continues. Noise as measured on GSM8K. Over
100 sweeps, single trials leave a choice for 1.2 methods, settings of the sweep for 1.8, settings of each method for 5.
"""

from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pytest
import torch

import loragrid as lg
from loragrid.comparison.selection import choose
from loragrid.config.experiment import EarlyStoppingConfig, PackConfig
from loragrid.training.member_state import MemberState
from loragrid.training.meters import Stopwatch
from loragrid.trials.expand import expand
from loragrid.trials.packing import Pack, group_into_packs
from loragrid.trials.successive_halving import rank, score, survivors
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.open_trials import OpenTrials
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.queue_worker import QueueWorker
from loragrid.worker.reporter import Reporter
from loragrid.worker.rung import Rung, stop_settings_behind
from loragrid.worker.saved_trial import SavedTrial
from loragrid.worker.trial_log import TrialLogs
from tests.support.comparisons import made_up_comparison

METHODS = ["lora", "lora_plus", "vera", "dora", "pissa"]
RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2]
WORSE_BY = dict(zip(RATES, (0.03, 0.006, 0.0, 0.006, 0.05), strict=True))
STEPS, RUNGS, REDUCTION = 27, (3, 9), 3
SEED_DEVIATION = RUNG_DEVIATION = 0.002
NUM_SWEEPS = 12


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    return expand(
        lg.Experiment(
            name="simulated",
            model={"name": "some-base"},
            data={"name": "rows.jsonl", "max_length": 64},
            training={"steps": STEPS},
            methods=METHODS,
            grid={"training.lr": RATES, "seed": [0, 1, 2]},
        )
    )


def final_losses(trials: list[Trial], noise: np.random.Generator) -> dict[str, float]:
    """Trial id -> the loss at its last step: method, rate and seed."""
    return {
        trial.trial_id: 0.7
        + WORSE_BY[trial.training.lr]
        + 0.004 * METHODS.index(trial.method.name)
        + noise.normal(0, SEED_DEVIATION)
        for trial in trials
    }


def left_by_single_trials(losses: dict[str, float], noise: np.random.Generator) -> set[str]:
    """The trials left if every trial counts by itself, as earlier versions did."""
    left = list(losses)
    for _ in RUNGS:
        seen = [score(key, [losses[key] + noise.normal(0, RUNG_DEVIATION)], has_diverged=False) for key in left]
        left = [own.setting_id for own in survivors(rank(seen), REDUCTION)]
    return set(left)


def left_by_settings(
    trials: list[Trial], losses: dict[str, float], noise: np.random.Generator, config: EarlyStoppingConfig, store: Path
) -> set[str]:
    """The trials left by the rungs of a real worker that reads these losses and trains nothing."""
    logs, stopwatch = TrialLogs(), Stopwatch()
    reporter = Reporter(lambda update: None, logs, stopwatch)
    group = ProcessGroup(device=torch.device("cpu"), isolate_failures=True)
    opened = OpenTrials(TrialStore(str(store)), logs, reporter, group)
    nothing = cast(Any, None)
    worker = QueueWorker(group=group, inputs=nothing, trainer=nothing, trials=opened, logs=logs, reporter=reporter)
    packs: list[Pack] = group_into_packs(trials, PackConfig(), early_stopping=config)
    for number, step in enumerate(RUNGS, start=1):
        for trial in (trial for trial in trials if number == 1 or trial.trial_id in opened):
            state = MemberState(completed=step, active=True, tensors={"w": torch.zeros(1)})
            loss = losses[trial.trial_id] + noise.normal(0, RUNG_DEVIATION)
            record = {"step": step, config.metric: loss}
            opened.restore(trial, SavedTrial(state=state, records=[record], rankings=logs[trial.trial_id].rankings))
        stop_settings_behind(packs, worker, Rung(number=number, step=step, config=config))
    return {trial.trial_id for trial in trials if trial.trial_id in opened}


def num_seeds_of_choices(trials: list[Trial], losses: dict[str, float], left: set[str]) -> dict[str, int]:
    """Method -> seeds of its chosen setting; methods without a choice are left out."""
    rows = [
        {
            "trial_id": trial.trial_id,
            "method": trial.method.name,
            "lr": trial.training.lr,
            "seed": trial.seed,
            "status": "FINISHED" if trial.trial_id in left else "KILLED",
            "reason": "" if trial.trial_id in left else "stopped early at rung 1 (step 3): eval/loss",
            "eval/final_loss": losses[trial.trial_id] if trial.trial_id in left else None,
        }
        for trial in trials
    ]
    comparison = made_up_comparison(rows, {"lr": "training.lr", "seed": "seed"})
    return {choice.method: choice.evaluation.num for choice in choose(comparison).choices}


@pytest.mark.parametrize(
    ("within", "lowest", "highest"),
    [("trial", 1.0, 1.5), ("sweep", 1.0, 2.5), ("method", 5.0, 5.0)],
    ids=["single trials", "settings of the sweep", "settings of each method"],
)
def test_methods_with_a_choice_after_two_rungs(
    trials: list[Trial], tmp_path: Path, within: Literal["trial", "sweep", "method"], lowest: float, highest: float
) -> None:
    noise = np.random.default_rng([ord(letter) for letter in within])
    found: list[dict[str, int]] = []
    for number in range(NUM_SWEEPS):
        losses = final_losses(trials, noise)
        if within == "trial":
            left = left_by_single_trials(losses, noise)
        else:
            config = EarlyStoppingConfig(grace_steps=RUNGS[0], reduction_factor=REDUCTION, within=within)
            left = left_by_settings(trials, losses, noise, config, tmp_path / str(number))
        found.append(num_seeds_of_choices(trials, losses, left))
    mean = sum(map(len, found)) / NUM_SWEEPS
    print(f"{within}: a choice for {mean:.2f} of {len(METHODS)} methods")
    assert lowest <= mean <= highest
    if within != "trial":
        assert {num for choices in found for num in choices.values()} == {3}, "with all seeds"
