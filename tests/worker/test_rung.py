"""Early stopping in one worker: settings are ranked by their seeds' mean, and live or end together."""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest

import loragrid.worker.open_trials
from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.training.member_state import MemberState, take_member
from loragrid.training.step import PackModel
from loragrid.trials.packing import cut_evenly
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.saved_trial import SavedTrial
from tests.support.queue_runs import STEPS, Seen, assert_as_alone, let_diverge, queue
from tests.support.small_packs import Setup, make_setup


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


@pytest.fixture(autouse=True)
def stores_that_pytest_cleans_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def halving(
    metric: Literal["eval/loss", "train/loss"] = "eval/loss",
    grace_steps: int = 2,
    reduction_factor: int = 2,
    within: Literal["method", "sweep"] = "method",
) -> EarlyStoppingConfig:
    return EarlyStoppingConfig(metric=metric, grace_steps=grace_steps, reduction_factor=reduction_factor, within=within)


def grid(
    setup: Setup, name: str, rates: Sequence[float], *, seeds: int = 2, label: str = "", **training: Any
) -> list[Trial]:
    """Trials of one method: every rate with every seed."""
    trials = [
        setup.trial(name, lr=rate, seed=seed, **{"measure_steps": 0, "report_every": 1} | training)
        for rate in rates
        for seed in range(seeds)
    ]
    return [replace(trial, label=label) for trial in trials]


def last_steps(seen: Seen, trials: Sequence[Trial]) -> dict[str, int]:
    return {trial.trial_id: max(seen.records(trial)) for trial in trials}


def means(seen: Seen, trials: Sequence[Trial], step: int, metric: str = "eval/loss") -> dict[str, float]:
    """Setting id -> mean over the seeds that reached the step."""
    found: dict[str, list[float]] = {}
    for trial in trials:
        if step in seen.records(trial):
            found.setdefault(trial.setting_id, []).append(seen.records(trial)[step][metric])
    return {setting_id: sum(losses) / len(losses) for setting_id, losses in found.items()}


@pytest.mark.parametrize("metric", ["eval/loss", "train/loss"])
def test_the_best_settings_of_a_sweep_continue_as_if_alone(
    setup: Setup, metric: Literal["eval/loss", "train/loss"]
) -> None:
    rates = [1e-5, 0.02, 1e-4, 0.01, 1e-3, 1e-6, 0.005, 1e-7]
    names = [("lora", "delta_lora", "vera")[index % 3] for index in range(len(rates))]
    trials = [
        setup.trial(name, lr=rate, measure_steps=0, weight_decay=0.1) for name, rate in zip(names, rates, strict=True)
    ]
    seen = queue(setup, cut_evenly(trials, 3), halving(metric, within="sweep"))
    stopped_at = last_steps(seen, trials)
    assert sorted(stopped_at.values()) == [2] * 4 + [4] * 2 + [STEPS] * 2
    assert seen.exported == {trial_id for trial_id, step in stopped_at.items() if step == STEPS}
    for rung in (2, 4):
        there = {t.trial_id: seen.records(t)[rung][metric] for t in trials if stopped_at[t.trial_id] >= rung}
        best = sorted(there, key=there.__getitem__)[: len(there) // 2]
        assert {trial_id for trial_id in there if stopped_at[trial_id] > rung} == set(best)
    for trial in trials:
        assert_as_alone(setup, seen, trial, stopped_at[trial.trial_id])
    first = next(trial for trial in trials if stopped_at[trial.trial_id] == 2)
    end = seen.ended[first.trial_id]
    assert (end.status, seen.tags(first)["loragrid.rung"]) == ("KILLED", "1")
    assert end.reason.startswith(f"stopped early at rung 1 (step 2): {metric} ")
    assert end.reason.endswith("of 8 of all methods, 4 continue")
    assert seen.num_loaded() == 1


def test_every_method_ends_with_all_seeds_of_one_setting(setup: Setup) -> None:
    lora = grid(setup, "lora", [1e-6, 0.02, 1e-3, 0.01])
    vera = grid(setup, "vera", [1e-7, 1e-3, 1e-5])
    seen = queue(setup, cut_evenly([*lora, *vera], 5), halving(grace_steps=4, reduction_factor=3))
    for trials in (lora, vera):
        at_rung = means(seen, trials, 4)
        best = min(at_rung, key=at_rung.__getitem__)
        assert len(at_rung) == len(trials) / 2
        assert {t.trial_id for t in trials if seen.ended[t.trial_id].status == "FINISHED"} == {
            t.trial_id for t in trials if t.setting_id == best
        }
    ranked = means(seen, lora, 4)
    second = sorted(ranked, key=ranked.__getitem__)[1]
    reasons = {seen.ended[trial.trial_id].reason for trial in lora if trial.setting_id == second}
    assert reasons == {
        f"stopped early at rung 1 (step 4): eval/loss {ranked[second]:.4g} (mean of 2 seeds) is setting number 2 of 4 "
        "of lora, 1 continues"
    }
    assert seen.num_loaded() == 1


def test_blocks_with_one_label_are_one_contest(setup: Setup) -> None:
    first = grid(setup, "lora", [0.02, 0.01], seeds=1, label="tuned")
    second = grid(setup, "lora", [1e-6], seeds=1, label="tuned")
    other = grid(setup, "lora", [1e-7], seeds=1, label="other")
    seen = queue(setup, [[*first, *second, *other]], halving(grace_steps=4, reduction_factor=3))
    assert seen.ended[second[0].trial_id].reason.endswith("number 3 of 3 of tuned, 1 continues")
    assert seen.ended[other[0].trial_id].status == "FINISHED"


def test_batch_sizes_of_one_method_compete(setup: Setup) -> None:
    small, large = (grid(setup, "lora", [1e-7, 0.01], seeds=1, batch_size=size) for size in (2, 4))
    seen = queue(setup, [small, large], halving(grace_steps=4, reduction_factor=4))
    at_rung = means(seen, [*small, *large], 4)
    best = min(at_rung, key=at_rung.__getitem__)
    finished = [t for t in (*small, *large) if seen.ended[t.trial_id].status == "FINISHED"]
    assert [trial.setting_id for trial in finished] == [best]
    assert len(at_rung) == 4
    assert_as_alone(setup, seen, finished[0])


def test_full_fine_tuning_passes_rungs_from_stored_states(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []

    def counted(model: PackModel, member: int) -> MemberState:
        taken.append(member)
        return take_member(model, member)

    monkeypatch.setattr(loragrid.worker.open_trials, "take_member", counted)
    full = grid(setup, "full", [1e-3, 1e-6])
    lora = grid(setup, "lora", [1e-6, 0.01])
    seen = queue(setup, [*([trial] for trial in full), lora], halving(grace_steps=4))
    for trials in (full, lora):
        ranked = means(seen, trials, 4)
        best = min(ranked, key=ranked.__getitem__)
        for trial in trials:
            is_best = trial.setting_id == best
            assert (seen.ended[trial.trial_id].status == "FINISHED") == is_best
            assert_as_alone(setup, seen, trial, STEPS if is_best else 4)
    # Saved once at the rung; LoRA's members are also kept in memory.
    assert len(taken) == 4 + 2 * 4


def test_a_lost_stored_state_fails_only_its_trial(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    full = grid(setup, "full", [1e-3, 1e-4, 1e-5], seeds=1)
    original = TrialStore.load
    monkeypatch.setattr(
        TrialStore,
        "load",
        lambda store, trial_id: (None, ["it is gone"]) if trial_id == full[0].trial_id else original(store, trial_id),
    )
    seen = queue(setup, [[trial] for trial in full], halving(grace_steps=4, reduction_factor=2, within="sweep"))
    assert (seen.ended[full[0].trial_id].status, seen.ended[full[0].trial_id].reason) == ("FAILED", "it is gone")
    assert {seen.ended[trial.trial_id].status for trial in full[1:]} == {"KILLED"}


def test_continuing_trials_are_packed_together(setup: Setup) -> None:
    trials = [setup.trial("lora", lr=10.0**-power, measure_steps=0) for power in range(2, 8)]
    seen = queue(setup, cut_evenly(trials, 2), halving(grace_steps=4, reduction_factor=3))
    after = {update.trial_ids for update in seen.updates if update.phase == "training" and update.completed > 4}
    assert after == {tuple(trial.trial_id for trial in trials[:2])}


def test_a_setting_that_lost_all_seeds_is_not_ranked(setup: Setup) -> None:
    trials = [setup.trial("lora", lr=rate, measure_steps=0) for rate in (1e200, 0.01, 0.001)]
    seen = queue(setup, [trials], halving(grace_steps=4))
    assert seen.ended[trials[0].trial_id].reason.startswith("diverged: loss or gradient not finite at step ")
    assert seen.ended[trials[1].trial_id].status == "FINISHED"
    assert seen.ended[trials[2].trial_id].reason.endswith("is setting number 2 of 2 of lora, 1 continues")
    assert_as_alone(setup, seen, trials[1])


def spoil(monkeypatch: pytest.MonkeyPatch, trial: Trial) -> None:
    """The trial's state cannot be written, so the trial fails at its first checkpoint."""
    original = TrialStore.save

    def save(store: TrialStore, trial_id: str, saved: SavedTrial) -> None:
        if trial_id == trial.trial_id:
            raise OSError("disk full")
        original(store, trial_id, saved)

    monkeypatch.setattr(TrialStore, "save", save)


def test_a_failed_seed_leaves_the_mean_of_the_others(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    best, worse = grid(setup, "lora", [0.01]), grid(setup, "lora", [1e-6])
    spoil(monkeypatch, best[0])
    seen = queue(setup, [[*best, *worse]], halving(grace_steps=4))
    ends = seen.ended
    assert ends[best[0].trial_id].reason == "disk full"
    assert ends[best[1].trial_id].status == "FINISHED"
    assert {ends[trial.trial_id].status for trial in worse} == {"KILLED"}


def test_a_diverged_seed_makes_its_setting_last(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    best, worse = grid(setup, "lora", [0.01], seeds=3), grid(setup, "lora", [1e-6], seeds=3)
    let_diverge(monkeypatch, best[1])
    seen = queue(setup, [[*best, *worse]], halving(grace_steps=4))
    ends = seen.ended
    assert ends[best[1].trial_id].reason.startswith("diverged: ")
    assert {ends[trial.trial_id].status for trial in worse} == {"FINISHED"}
    reason = ends[best[0].trial_id].reason
    assert "(mean of 2 seeds, another seed diverged) is setting number 2 of 2 of lora" in reason
    assert ends[best[2].trial_id].reason == reason
