"""Processes that are killed for real while a sweep runs: nothing that was recorded is lost, nothing comes twice."""

import io
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from ray import tune
from rich.console import Console

import loragrid as lg
import loragrid.sweep.tune_runner
from loragrid.sweep.run import open_recorder
from tests.support.sweep_processes import (
    CHECKPOINT_EVERY,
    STEPS,
    assert_undisturbed,
    curves,
    experiment,
    finish,
    living_in_session_of,
    read_until,
    settings_of,
    sqlite_uri,
    start,
    statuses,
    trial_runs,
    wait_for_states,
    write,
)

pytestmark = [pytest.mark.end_to_end]

ONE_PACK_ON_TWO_WORKERS = {"pack": {"max_members": 4}, "workers": {"num_workers": 2, "cpus_per_worker": 1}}


@pytest.fixture(scope="module")
def settings(tiny_gpt2_dir: Path, chat_jsonl: Path) -> dict[str, Any]:
    return settings_of(tiny_gpt2_dir, chat_jsonl)


@pytest.fixture(scope="module")
def calm(settings: dict[str, Any], ray_of_two_cpus: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The store of a sweep that nothing happened to."""
    store = tmp_path_factory.mktemp("calm")
    assert lg.run(experiment(settings, store)).succeeded
    return store


class Strikes(io.StringIO):
    """A terminal that strikes when a line with `text` is printed, once."""

    def __init__(self, text: str, process: str, number: int = signal.SIGKILL) -> None:
        super().__init__()
        self.text, self.process, self.number, self.struck = text, process, number, 0

    def write(self, text: str) -> int:
        if self.text in text and not self.struck:
            for process in psutil.Process().children(recursive=True):
                if self.process in " ".join([process.name(), *process.cmdline()]):
                    os.kill(process.pid, self.number)
                    self.struck += 1
        return super().write(text)


@pytest.mark.usefixtures("ray_of_two_cpus")
@pytest.mark.parametrize(
    ("process", "line"),
    [
        ("RayTrainWorker", "pack-001: training"),
        ("TrainController", "pack-000: training"),
        ("ImplicitFunc", "pack-001: tr"),
    ],
)
def test_whichever_process_of_a_queue_is_killed_the_curves_and_adapters_are_the_undisturbed_ones(
    settings: dict[str, Any], calm: Path, tmp_path: Path, process: str, line: str
) -> None:
    terminal = Strikes(line, process)
    result = lg.run(experiment(settings, tmp_path), console=Console(file=terminal, width=200))
    assert terminal.struck == 1, [child.cmdline() for child in psutil.Process().children(recursive=True)]
    assert result.succeeded
    assert_undisturbed(tmp_path, calm)
    assert not (tmp_path / "trials" / "faults-1").exists(), "nothing is kept of a sweep that is done"


@pytest.fixture(scope="module")
def calm_with_two_workers(
    settings: dict[str, Any], ray_of_two_cpus: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The store of a sweep of one pack, whose steps two workers share, that nothing happened to."""
    store = tmp_path_factory.mktemp("calm-with-two-workers")
    assert lg.run(experiment(settings, store, **ONE_PACK_ON_TWO_WORKERS)).succeeded
    return store


class StrikesOneWorker(io.StringIO):
    """A terminal that kills one of a pack's workers, once the pack is beyond a step at which states are saved."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.struck = number, 0

    def write(self, text: str) -> int:
        if not self.struck and (step := re.search(r": step (\d+)/", text)) and int(step[1]) > CHECKPOINT_EVERY:
            workers = [
                process.pid
                for process in psutil.Process().children(recursive=True)
                if "RayTrainWorker" in " ".join([process.name(), *process.cmdline()])
            ]
            assert len(workers) == 2
            os.kill(sorted(workers)[self.number], signal.SIGKILL)
            self.struck = int(step[1])
        return super().write(text)


@pytest.mark.usefixtures("ray_of_two_cpus")
@pytest.mark.parametrize("number", [0, 1])
def test_a_pack_that_loses_one_of_its_two_workers_goes_on_to_the_undisturbed_curves_and_adapters(
    settings: dict[str, Any],
    calm_with_two_workers: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
) -> None:
    monkeypatch.setattr("loragrid.sweep.progress.PLAIN_LINE_SECONDS", 0.0)  # a line for every step
    terminal = StrikesOneWorker(number)
    result = lg.run(
        experiment(settings, tmp_path, **ONE_PACK_ON_TWO_WORKERS), console=Console(file=terminal, width=200)
    )
    assert CHECKPOINT_EVERY < terminal.struck < STEPS
    assert "pack-000: going on" in terminal.getvalue(), "from the states, and not from the start"
    assert result.succeeded
    assert_undisturbed(tmp_path, calm_with_two_workers)


@pytest.mark.usefixtures("ray_of_two_cpus")
def test_a_sweep_whose_tune_trial_can_never_start_is_failed_and_its_table_says_why(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoSuchProcess(tune.Trainable):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            raise RuntimeError("no process to be had")

    monkeypatch.setattr("loragrid.sweep.tune_runner.lightweight", lambda trainable: NoSuchProcess)
    monkeypatch.setattr("loragrid.sweep.tune_runner.MAX_LOST_DRIVERS", 1)
    result = lg.run(experiment(settings, tmp_path))
    assert not result.succeeded
    table = result.to_pandas()
    assert set(table["trial_id"]) == {trial.trial_id for trial in result.plan.trials}
    assert set(table["status"]) == {"FAILED"}
    assert set(table["reason"]) == {"RuntimeError: no process to be had"}
    client = MlflowClient(tracking_uri=result.tracking_uri)
    assert client.get_run(result.comparison().sweep_run_id).info.status == "FAILED"


def test_a_sweep_whose_driver_is_killed_goes_on_with_resume_and_nothing_is_lost_or_comes_twice(
    settings: dict[str, Any], calm: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    file = write(settings, store, tmp_path / "faults.yaml")
    process = start(file, "--resume")  # as a job does that is started again by itself, whatever happened
    assert "has no sweep yet: this is its first" in read_until(process, "pack-001: training")
    second = lg.plan(experiment(settings, store)).packs[1]
    wait_for_states(store, [trial.trial_id for trial in second.trials])
    process.kill()
    finish(process)
    assert "RUNNING" in statuses(store)
    code, output = finish(start(file, "--resume"))
    assert code == 0, output
    assert ", 2 to be trained" in output
    assert_undisturbed(store, calm)
    code, output = finish(start(file, "--resume"))
    assert code == 0, output
    assert ", 0 to be trained" in output
    assert_undisturbed(store, calm)


def test_ctrl_c_ends_everything_with_130_and_a_hint_and_an_extended_grid_trains_only_what_is_new_and_left(
    settings: dict[str, Any], calm: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    file = write(settings, store, tmp_path / "faults.yaml")
    process = start(file)
    read_until(process, "pack-001: training")
    os.kill(process.pid, signal.SIGINT)
    code, output = finish(process)
    assert code == 130, output
    assert f"loragrid run {file} --name faults-1 --resume" in output
    assert "Traceback" not in output
    for _ in range(600):
        if not living_in_session_of(process.pid):
            break
        time.sleep(0.1)
    assert not living_in_session_of(process.pid)
    before = trial_runs(sqlite_uri(store))
    assert statuses(store) == ["FINISHED", "FINISHED", "KILLED", "KILLED"]
    write(settings, store, file, methods=[*settings["methods"], {"name": "lora", "rank": 4}])
    code, output = finish(start(file, "--resume"))
    assert code == 0, output
    assert statuses(store) == ["FINISHED"] * 5
    for trial_id, run in trial_runs(sqlite_uri(store)).items():
        was = before.get(trial_id)
        if was is not None:
            assert (run.info.end_time == was.info.end_time) == (was.info.status == "FINISHED")
    expected, found = curves(sqlite_uri(calm)), curves(sqlite_uri(store))
    assert {key: found[key] for key in expected} == expected


def test_sigterm_to_the_whole_group_ends_the_sweep_with_its_ray_and_the_record_says_so(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    store = tmp_path / "store"
    file = write(settings, store, tmp_path / "faults.yaml")
    process = start(file)
    read_until(process, "pack-000: training")
    # As `timeout`, Slurm and systemd do, and the first of them to the process itself, too.
    os.kill(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    began = time.monotonic()
    code, output = finish(process)
    assert code == 143, output
    assert time.monotonic() - began < 45, "Ray ends a process that waits for it after 60 s"
    assert f"loragrid run {file} --name faults-1 --resume" in output
    assert "RUNNING" not in statuses(store)
    assert "KILLED" in statuses(store)


@pytest.mark.usefixtures("ray_of_two_cpus")
def test_a_name_that_is_refused_costs_the_sweep_that_has_it_nothing(settings: dict[str, Any], tmp_path: Path) -> None:
    the_experiment = experiment(settings, tmp_path)
    recorder = open_recorder(the_experiment)
    recorder.start_sweep("mine", {}, {})
    recorder.end_sweep("KILLED")
    half_trained = [tmp_path / "trials" / "mine" / trial.trial_id / "state" for trial in lg.plan(the_experiment).trials]
    for path in half_trained:
        path.parent.mkdir(parents=True)
        path.touch()
    with pytest.raises(ValueError, match="has a sweep 'mine' already; allowed: --resume"):
        lg.run(the_experiment, name="mine")
    assert all(path.exists() for path in half_trained)


@pytest.mark.usefixtures("ray_of_two_cpus")
def test_ctrl_c_while_tune_is_starting_is_not_lost(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightweight = loragrid.sweep.tune_runner.lightweight

    def interrupted(trainable: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return lightweight(trainable)

    monkeypatch.setattr(loragrid.sweep.tune_runner, "lightweight", interrupted)
    with pytest.raises(loragrid.sweep.signals.SweepInterrupted):
        lg.run(experiment(settings, tmp_path))
    assert "FINISHED" not in statuses(tmp_path)
