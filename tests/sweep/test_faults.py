"""Real processes of a running sweep are killed: nothing recorded is lost, and nothing is recorded twice."""

import io
import os
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from ray import tune
from rich.console import Console

import loragrid as lg
import loragrid.sweep.tune_runner
from loragrid.sweep.record import open_recorder
from loragrid.trials.packing import Pack
from tests.support.sweep_processes import (
    CHECKPOINT_EVERY,
    STEPS,
    adapters,
    assert_undisturbed,
    curves,
    experiment,
    finish,
    living_in_session_of,
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

ONE_PACK_ON_TWO_WORKERS = {"pack": {"max_members": 4}, "workers": {"num_workers": 2, "cpus_per_worker": 1}}

ONE_AFTER_THE_OTHER = (
    ("pack-000: training", "TrainController"),
    ("pack-001: training", "RayTrainWorker"),
    ("pack-001: training", "ImplicitFunc"),
)
"""(Line, process): Train's controller, the worker, and the Tune trial of the queue, each struck in mid-pack."""


def processes_named(name: str) -> list[psutil.Process]:
    """The processes below this one with `name` in their title or their command."""
    return [
        process
        for process in psutil.Process().children(recursive=True)
        if name in " ".join([process.name(), *process.cmdline()])
    ]


class Strikes(io.StringIO):
    """A terminal that kills a process when a line is printed, then waits for the next line and process."""

    def __init__(self, strikes: Sequence[tuple[str, str]]) -> None:
        super().__init__()
        self.waiting, self.struck = list(strikes), list[str]()

    def write(self, text: str) -> int:
        if self.waiting and self.waiting[0][0] in text:
            _, name = self.waiting.pop(0)
            for process in processes_named(name):
                process.kill()
                self.struck.append(name)
        return super().write(text)


@pytest.mark.smoke
@pytest.mark.usefixtures("ray_of_two_cpus")
def test_any_killed_process_of_a_queue_changes_no_bit(
    faults_settings: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    terminal = Strikes(ONE_AFTER_THE_OTHER)
    result = lg.run(experiment(faults_settings, tmp_path), console=Console(file=terminal, width=200))
    assert terminal.struck == [name for _, name in ONE_AFTER_THE_OTHER], terminal.getvalue()
    assert_succeeded(result, terminal.getvalue())
    assert_undisturbed(tmp_path, undisturbed)
    assert not (tmp_path / "trials" / "faults-1").exists(), "nothing is kept of a sweep that is done"


class StrikesEachWorker(io.StringIO):
    """A terminal that kills each of a pack's two workers in turn, some steps after states were saved."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = list[int]()

    def write(self, text: str) -> int:
        last = self.steps[-1] if self.steps else 0
        if (
            len(self.steps) < 2
            and (step := re.search(r": step (\d+)/", text))
            and int(step[1]) > last + CHECKPOINT_EVERY
        ):
            workers = sorted(process.pid for process in processes_named("RayTrainWorker"))
            assert len(workers) == 2
            os.kill(workers[len(self.steps)], signal.SIGKILL)
            self.steps.append(int(step[1]))
        return super().write(text)


@pytest.mark.usefixtures("ray_of_two_cpus")
def test_losing_either_of_two_workers_changes_no_bit(
    faults_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm, struck = tmp_path / "calm", tmp_path / "struck"
    assert_succeeded(lg.run(experiment(faults_settings, calm, **ONE_PACK_ON_TWO_WORKERS)))
    monkeypatch.setattr("loragrid.sweep.progress.PLAIN_LINE_SECONDS", 0.0)  # a line for every step
    terminal = StrikesEachWorker()
    result = lg.run(
        experiment(faults_settings, struck, **ONE_PACK_ON_TWO_WORKERS), console=Console(file=terminal, width=200)
    )
    first, second = terminal.steps
    assert CHECKPOINT_EVERY < first < second < STEPS
    assert terminal.getvalue().count("pack-000: going on") == 2, "from the states, and not from the start"
    assert_succeeded(result, terminal.getvalue())
    assert_undisturbed(struck, calm)


@pytest.mark.usefixtures("ray_of_two_cpus")
def test_a_sweep_whose_tune_trial_cannot_start_is_failed(
    faults_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoSuchProcess(tune.Trainable):
        def __init__(self, *arguments: Any, **keywords: Any) -> None:
            raise RuntimeError("no process to be had")

    monkeypatch.setattr("loragrid.sweep.tune_runner.lightweight", lambda trainable: NoSuchProcess)
    monkeypatch.setattr("loragrid.sweep.tune_runner.MAX_LOST_DRIVERS", 1)
    result = lg.run(experiment(faults_settings, tmp_path))
    assert not result.succeeded
    table = result.to_pandas()
    assert set(table["trial_id"]) == {trial.trial_id for trial in result.plan.trials}
    assert set(table["status"]) == {"FAILED"}
    assert set(table["reason"]) == {"RuntimeError: no process to be had"}
    client = MlflowClient(tracking_uri=result.tracking_uri)
    assert client.get_run(result.comparison().sweep_run_id).info.status == "FAILED"


def test_sigterm_sigkill_and_ctrl_c_lose_nothing(
    faults_settings: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    file = write(faults_settings, store, tmp_path / "faults.yaml")
    end_the_group_by_sigterm(file, store)
    kill_the_driver(file, store, lg.plan(experiment(faults_settings, store)).packs[1])
    end_by_ctrl_c(file, store)
    before = trial_runs(sqlite_uri(store))
    write(faults_settings, store, file, methods=[*faults_settings["methods"], {"name": "lora", "rank": 4}])
    code, output = finish(start(file, "--resume"))
    assert code == 0, output
    for trial_id, run in trial_runs(sqlite_uri(store)).items():
        was = before.get(trial_id)
        if was is not None:
            assert (run.info.end_time == was.info.end_time) == (was.info.status == "FINISHED")
    assert_undisturbed_and_one_more(store, undisturbed)
    code, output = finish(start(file, "--resume"))
    assert code == 0, output
    assert ", 0 to be trained" in output
    assert_undisturbed_and_one_more(store, undisturbed)


def end_the_group_by_sigterm(file: Path, store: Path) -> None:
    """The first start of the sweep, with the signal that `timeout`, Slurm and systemd send to all processes."""
    process = start(file, "--resume")  # as a job does that is started again by itself, whatever happened
    assert "has no sweep yet: this is its first" in read_until(process, "pack-000: training")
    # The process itself may get the first of them, too.
    os.kill(process.pid, signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)
    began = time.monotonic()
    code, output = finish(process)
    assert code == 143, output
    assert time.monotonic() - began < 45, "Ray ends a process that waits for it after 60 s"
    assert f"loragrid run {file} --name faults-1 --resume" in output
    assert "RUNNING" not in statuses(store)
    assert "KILLED" in statuses(store)


def kill_the_driver(file: Path, store: Path, second: Pack) -> None:
    """The second start: the first pack ends, and the second has saved its states when the driver is killed."""
    process = start(file, "--resume")
    read_until(process, "pack-001: training")
    wait_for_states(store, [trial.trial_id for trial in second.trials])
    process.kill()
    finish(process)
    assert "RUNNING" in statuses(store)


def end_by_ctrl_c(file: Path, store: Path) -> None:
    """The third start: what is left of the second pack trains when Ctrl-C comes, and no process is left behind."""
    process = start(file, "--resume")
    assert ", 2 to be trained" in read_until(process, "pack-001: training")
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
    assert statuses(store) == ["FINISHED", "FINISHED", "KILLED", "KILLED"]


def assert_undisturbed_and_one_more(store: Path, calm: Path) -> None:
    """Every point and adapter of the undisturbed sweep is there to the bit; one trial more has finished."""
    assert statuses(store) == [*statuses(calm), "FINISHED"]
    found, expected = curves(sqlite_uri(store)), curves(sqlite_uri(calm))
    assert {key: found[key] for key in expected} == expected
    files, expected_files = adapters(store), adapters(calm)
    assert {name: files[name] for name in expected_files} == expected_files


@pytest.mark.usefixtures("ray_of_two_cpus")
def test_a_refused_name_leaves_its_sweep_untouched(faults_settings: dict[str, Any], tmp_path: Path) -> None:
    the_experiment = experiment(faults_settings, tmp_path)
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
    faults_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lightweight = loragrid.sweep.tune_runner.lightweight

    def interrupted(trainable: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return lightweight(trainable)

    monkeypatch.setattr(loragrid.sweep.tune_runner, "lightweight", interrupted)
    with pytest.raises(loragrid.sweep.signals.SweepInterrupted):
        lg.run(experiment(faults_settings, tmp_path))
    assert "FINISHED" not in statuses(tmp_path)
