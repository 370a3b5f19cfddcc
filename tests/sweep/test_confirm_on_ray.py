"""A real sweep confirms what it has chosen: SIGTERM among the trials that confirm, then resumption, changes no bit."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

import loragrid as lg
from loragrid.comparison.selection import choose
from loragrid.trials.tags import PHASE_TAG
from tests.support.sweep_processes import (
    STEPS,
    assert_undisturbed,
    curves,
    experiment,
    finish,
    read_until,
    sqlite_uri,
    start,
    statuses,
    trial_runs,
    wait_for_states,
    write,
)
from tests.support.sweep_results import assert_succeeded

pytestmark = [pytest.mark.end_to_end, pytest.mark.xdist_group("faults")]

CONFIRMED: dict[str, Any] = {
    "methods": [{"name": "lora", "grid": {"lr": [1e-6, 1e-2]}}, {"name": "vera", "lr": 1e-2}],
    "grid": {"method.rank": [2], "seed": [0]},
    "pack": {"max_members": 8},
    "confirm": {"seeds": 3},
}


def phases(store: Path) -> list[tuple[str, str, str]]:
    """(Method, seed, phase) of every trial, sorted."""
    runs = trial_runs(sqlite_uri(store)).values()
    return sorted((r.data.params["method.name"], r.data.params["seed"], r.data.tags[PHASE_TAG]) for r in runs)


@pytest.mark.usefixtures("ray_of_two_cpus")
def test_sigterm_among_the_trials_that_confirm_changes_no_bit(faults_settings: dict[str, Any], tmp_path: Path) -> None:
    calm, store = tmp_path / "calm", tmp_path / "store"
    settings = faults_settings | CONFIRMED | {"data": faults_settings["data"] | {"num_test": 10}}
    whole = lg.run(experiment(settings, calm))
    assert_succeeded(whole)
    assert phases(calm) == sorted(
        [
            *(("lora", "0", "tune") for _ in range(2)),
            ("vera", "0", "tune"),
            *((method, str(seed), "confirm") for method in ("lora", "vera") for seed in (1, 2, 3)),
        ]
    )
    comparison = whole.comparison()
    assert comparison.sweep_metrics["sweep/trials_confirming"] == 6
    (lora,) = [choice for choice in choose(comparison).choices if choice.method == "lora"]
    assert (lora.setting.values, lora.is_confirmed) == ({"lr": 1e-2}, True)
    assert set(lora.reported_trials) == {1, 2, 3}
    points = curves(sqlite_uri(calm))
    assert all(points[trial_id, "train/loss"][-1][0] == STEPS for trial_id in lora.reported_trials.values())

    file = write(settings, store, tmp_path / "faults.yaml")
    process = start(file)
    assert "confirming 2 settings with 3 fresh seeds" in read_until(process, "confirm-000: training")
    wait_for_states(store, [trial.trial_id for trial in whole.plan.trials if trial.phase == "confirm"])
    os.kill(process.pid, signal.SIGTERM)
    code, output = finish(process)
    assert code == 143, output
    assert f"loragrid run {file} --name faults-1 --resume" in output
    assert statuses(store) == ["FINISHED"] * 3 + ["KILLED"] * 6

    resumed = lg.run(experiment(settings, store), resume=True)
    assert_succeeded(resumed)
    assert {trial.trial_id for trial in resumed.plan.trials} == {trial.trial_id for trial in whole.plan.trials}
    assert_undisturbed(store, calm)
    assert not (store / "trials" / "faults-1").exists(), "nothing is kept of a sweep that is done"
    again = lg.run(experiment(settings, store), resume=True)
    assert_succeeded(again)
    assert again.plan.trials == resumed.plan.trials
