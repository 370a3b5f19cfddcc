"""Whatever Tune reports to a sweep's driver, every trial of the plan is recorded when the sweep ends."""

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from ray import cloudpickle
from ray.exceptions import OutOfMemoryError
from ray.train import ControllerError
from rich.console import Console

import loragrid as lg
from loragrid.config.experiment import EarlyStoppingConfig
from loragrid.planning.placement import Placement
from loragrid.planning.plan import Plan, plan
from loragrid.sweep.callback import RecordingCallback
from loragrid.sweep.progress import SweepProgress
from loragrid.sweep.queue_failure import describe_failure
from loragrid.sweep.record import Sweep
from loragrid.sweep.resume import mark_diverged_before
from loragrid.sweep.signals import SweepInterrupted, ended_by_signals
from loragrid.sweep.sweep_writer import SweepWriter
from loragrid.sweep.tune_runner import TuneRunner
from loragrid.tracking.previous_run import find_previous
from loragrid.tracking.recorder import Recorder
from loragrid.trials.outcome import DIVERGED, TrialEnd
from loragrid.trials.packing import Pack, PackQueue
from loragrid.trials.tags import PARENT_TAG, REASON_TAG, TRIAL_TAG
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import PackUpdate, QueueFailure


@pytest.fixture(scope="module")
def the_plan(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Plan:
    """Four trials in two packs."""
    return plan(
        lg.Experiment(
            name="recorded",
            model={"name": str(tiny_gpt2_dir)},
            data={"name": str(chat_jsonl), "max_length": 96, "num_eval": 8},
            training={"steps": 2, "batch_size": 4},
            methods=[{"name": "lora", "label": "rsLoRA"}, "vera"],
            grid={"seed": [0, 1], "method.rank": [2]},
            pack={"max_members": 2},
        )
    )


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    """A sweep that is open in an SQLite store."""
    opened = Recorder("recorded", f"sqlite:///{tmp_path / 'mlflow.db'}")
    opened.start_sweep("recorded-1", {}, {})
    return opened


@pytest.fixture
def callback(recorder: Recorder, the_plan: Plan, tmp_path: Path) -> RecordingCallback:
    """Of a sweep whose every Tune trial trains the one queue with both packs; `{}` is no trial of the experiment."""

    def queue_of(config: Any, tune_id: str) -> PackQueue:
        if not config:
            raise ValueError("no trial of the experiment")
        return PackQueue(queue_id="queue-0", packs=the_plan.packs)

    return RecordingCallback(recorder, TrialStore(str(tmp_path / "trials")), queue_of, {}, several_runs=True)


def tune_trial(folder: Path, tune_id: str = "a", error: Exception | None = None, **config: str) -> Any:
    """What the callback reads of a Tune trial."""
    file = None
    if error is not None:
        file = folder / f"{tune_id}.pkl"
        file.write_bytes(cloudpickle.dumps(error))  # type: ignore[no-untyped-call]
    return SimpleNamespace(trial_id=tune_id, config=config, pickled_error_file=file)


def recorded(folder: Path) -> tuple[str, dict[str, tuple[str, str]]]:
    """(The sweep's status, trial id -> (status, reason)), as MLflow holds them."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("recorded")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    (sweep,) = (run.info.status for run in runs if PARENT_TAG not in run.data.tags)
    trials = [run for run in runs if PARENT_TAG in run.data.tags]
    return sweep, {run.data.tags[TRIAL_TAG]: (run.info.status, run.data.tags.get(REASON_TAG, "")) for run in trials}


def tags_of(folder: Path, trial: Trial) -> dict[str, str]:
    """The tags of a trial's run."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("recorded")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`{TRIAL_TAG}` = '{trial.trial_id}'")
    return dict(run.data.tags)


def finish(callback: RecordingCallback, trial: Any, pack: Pack) -> None:
    """The pack's one update: its trials have finished."""
    ids = tuple(member.trial_id for member in pack.trials)
    ended = dict.fromkeys(ids, TrialEnd(status="FINISHED"))
    update = PackUpdate(pack_id=pack.pack_id, trial_ids=ids, phase="training", ended=ended, done=True)
    callback.on_trial_result(0, [], trial, {"update": update})


def test_a_run_has_its_trials_label_and_id(callback: RecordingCallback, the_plan: Plan, tmp_path: Path) -> None:
    trial = tune_trial(tmp_path, queue="queue-0")
    callback.on_trial_start(0, [], trial)
    for pack in the_plan.packs:
        finish(callback, trial, pack)
    callback.close()
    names = {member.trial_id: tags_of(tmp_path, member)["mlflow.runName"] for member in the_plan.trials}
    digests = [trial_id.partition("-")[2] for trial_id in names]
    assert list(names.values()) == [*(f"rsLoRA-{digest}" for digest in digests[:2]), *list(names)[2:]]
    assert list(names) == [*(f"lora-{digest}" for digest in digests[:2]), *(f"vera-{digest}" for digest in digests[2:])]


def test_a_queue_without_a_process_fails_with_all_its_packs(
    callback: RecordingCallback, the_plan: Plan, tmp_path: Path
) -> None:
    # Tune reports only the error: it calls `on_trial_start` after the actor's creation.
    callback.on_trial_error(0, [], tune_trial(tmp_path, error=RuntimeError("no process to be had"), queue="queue-0"))
    assert callback.left_by_failed_queues() == [], "another queue would fail too"
    callback.close(trial.trial_id for trial in the_plan.trials)
    sweep, trials = recorded(tmp_path)
    assert sweep == "FAILED"
    assert trials == {trial.trial_id: ("FAILED", "no process to be had") for trial in the_plan.trials}


def test_packs_that_a_failed_queue_had_not_begun_are_left(
    callback: RecordingCallback, the_plan: Plan, tmp_path: Path
) -> None:
    trial = tune_trial(tmp_path, error=RuntimeError("lost"), queue="queue-0")
    callback.on_trial_start(0, [], trial)
    callback.on_trial_error(0, [], trial)
    assert callback.left_by_failed_queues() == [the_plan.packs[1]]
    callback.close(trial.trial_id for trial in the_plan.trials)
    sweep, trials = recorded(tmp_path)
    assert set(trials) == {trial.trial_id for trial in the_plan.packs[0].trials}
    assert sweep == "KILLED", "not all of its trials have ended"


def test_packs_that_exhaust_memory_are_halved_to_single_trials(
    callback: RecordingCallback, the_plan: Plan, tmp_path: Path
) -> None:
    # Ray's own message, from a machine on which it happened.
    full = (
        "4 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2, ID: 93aa) "
        "was 22.52GB used / 23.54GB limit (0.956706)\nOOM kill reason: Memory usage exceeded threshold\n"
        "Refer to the documentation on how to address the out of memory issue: https://docs.ray.io/"
    )
    failure = describe_failure(ControllerError(OutOfMemoryError(full)))  # type: ignore[no-untyped-call]
    reason = "out_of_memory: Ray ended the workers, because their machine had 22.52GB of 23.54GB in use"
    first, second = the_plan.packs
    whole = tune_trial(tmp_path, queue="queue-0")
    callback.on_trial_start(0, [], whole)
    callback.on_trial_result(0, [], whole, {"failure": failure})
    callback.on_trial_complete(0, [], whole)  # the Tune trial that reported it returns
    *halves, unbegun = callback.left_by_failed_queues()
    assert [half.trials for half in halves] == [(trial,) for trial in first.trials]
    assert unbegun == second
    assert callback.left_by_failed_queues() == []
    assert callback.outcome.statuses == {}
    callback.queue_of = lambda config, tune_id: PackQueue(queue_id="queue-1", packs=(halves[0],))
    alone = tune_trial(tmp_path, "b", queue="queue-1")
    callback.on_trial_start(0, [], alone)
    callback.on_trial_result(0, [], alone, {"failure": failure})
    callback.on_trial_complete(0, [], alone)
    assert callback.left_by_failed_queues() == []
    callback.close()
    assert recorded(tmp_path)[1] == {
        first.trials[0].trial_id: ("FAILED", reason),
        first.trials[1].trial_id: ("KILLED", "interrupted"),
    }
    assert (
        tags_of(tmp_path, first.trials[0]).items()
        >= {
            "loragrid.out_of_memory": "true",
            "loragrid.pack": "pack-000.0",
            "loragrid.pack.split": f"pack-000 of 2 trials was halved: {reason}",
        }.items()
    )


def update_of(pack: Pack, *trials: Trial, done: bool = False) -> dict[str, PackUpdate]:
    ids = tuple(trial.trial_id for trial in trials or pack.trials)
    return {"update": PackUpdate(pack_id=pack.pack_id, trial_ids=ids, phase="training", done=done)}


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_packs_that_wait_at_a_rung_continue_as_they_are(
    callback: RecordingCallback, the_plan: Plan, tmp_path: Path, out_of_memory: bool
) -> None:
    first, second = (replace(pack, rung_group=0) for pack in the_plan.packs)
    callback.queue_of = lambda config, tune_id: PackQueue(queue_id="queue-0", packs=(first, second))
    failure = QueueFailure(reason="why", traceback="", out_of_memory=out_of_memory)
    trial = tune_trial(tmp_path, queue="queue-0")
    callback.on_trial_start(0, [], trial)
    for reported in (update_of(first), update_of(first, done=True), update_of(second)):
        callback.on_trial_result(0, [], trial, reported)
    callback.on_trial_result(0, [], trial, {"failure": failure})
    left = callback.left_by_failed_queues()
    assert left == ([*second.halves(), first] if out_of_memory else [first])
    assert {pack.rung_group for pack in left} == {0}, "one queue ranks their settings"
    assert list(callback.outcome.statuses) == ([] if out_of_memory else [t.trial_id for t in second.trials])


def test_out_of_memory_fails_only_trials_that_ran_alone(
    callback: RecordingCallback, the_plan: Plan, tmp_path: Path
) -> None:
    first, second = the_plan.packs
    failure = QueueFailure(reason="out_of_memory: full", traceback="", out_of_memory=True)
    best, behind = zip(first.trials, second.trials, strict=True)
    rung = Pack(pack_id="pack-000-rung2.0", trials=best)
    together, apart = tune_trial(tmp_path, queue="queue-0"), tune_trial(tmp_path, "b", queue="queue-0")
    callback.on_trial_start(0, [], together)
    callback.on_trial_result(0, [], together, update_of(first, done=True))
    callback.on_trial_result(0, [], together, update_of(second, done=True))
    for pack, trial in zip((first, second), behind, strict=True):
        ended = {trial.trial_id: TrialEnd(status="KILLED", reason="stopped early at rung 1")}
        update = PackUpdate(pack_id=pack.pack_id, trial_ids=(trial.trial_id,), phase="ended", ended=ended, done=True)
        callback.on_trial_result(0, [], together, {"update": update})
    callback.on_trial_result(0, [], together, update_of(rung))
    callback.on_trial_result(0, [], together, {"failure": failure})
    left = callback.left_by_failed_queues()
    assert [pack.trials for pack in left] == [(trial,) for trial in best]
    callback.queue_of = lambda config, tune_id: PackQueue(queue_id="queue-1", packs=tuple(left))
    callback.on_trial_start(0, [], apart)
    callback.on_trial_result(0, [], apart, update_of(left[1]))
    callback.on_trial_result(0, [], apart, {"failure": failure})
    assert callback.left_by_failed_queues() == [left[0]]
    callback.close()
    assert recorded(tmp_path)[1][best[1].trial_id] == ("FAILED", "out_of_memory: full")
    assert tags_of(tmp_path, best[1])["loragrid.out_of_memory"] == "true"


def test_halving_ends_even_if_no_trial_is_known_at_work(
    callback: RecordingCallback, the_plan: Plan, tmp_path: Path
) -> None:
    failure = QueueFailure(reason="out_of_memory: full", traceback="", out_of_memory=True)
    left, num_rounds = list(the_plan.packs), 0
    while left:
        callback.queue_of = lambda config, tune_id, packs=tuple(left): PackQueue(queue_id="queue", packs=packs)  # type: ignore[misc]
        trial = tune_trial(tmp_path, str(num_rounds), queue="queue")
        callback.on_trial_start(0, [], trial)
        for pack in left:
            callback.on_trial_result(0, [], trial, update_of(pack, done=True))
        callback.on_trial_result(0, [], trial, {"failure": failure})
        left, num_rounds = callback.left_by_failed_queues(), num_rounds + 1
    assert num_rounds == 2
    assert set(callback.outcome.statuses.values()) == {"FAILED"}


@pytest.mark.parametrize("out_of_memory", [False, True])
def test_unbegun_trials_of_a_failed_pack_are_trained(
    callback: RecordingCallback, the_plan: Plan, tmp_path: Path, out_of_memory: bool
) -> None:
    first, second = the_plan.packs
    trial = tune_trial(tmp_path, queue="queue-0")
    callback.on_trial_start(0, [], trial)
    finish(callback, trial, first)
    # In a resumed sweep, trials at another step than the rest of their pack are trained apart from it.
    callback.on_trial_result(0, [], trial, update_of(second, second.trials[0]))
    failure = QueueFailure(reason="why", traceback="", out_of_memory=out_of_memory)
    callback.on_trial_result(0, [], trial, {"failure": failure})
    left = callback.left_by_failed_queues()
    assert [pack.trials for pack in left] == [second.trials[1:]]
    assert callback.outcome.statuses[second.trials[0].trial_id] == "FAILED"


def test_the_rest_of_a_failed_pack_has_a_new_name(callback: RecordingCallback, the_plan: Plan, tmp_path: Path) -> None:
    first, second = the_plan.packs
    trial = tune_trial(tmp_path, queue="queue-0")
    callback.on_trial_start(0, [], trial)
    callback.on_trial_result(0, [], trial, update_of(first, first.trials[0]))
    failure = QueueFailure(reason="why", traceback="", out_of_memory=True)
    callback.on_trial_result(0, [], trial, {"failure": failure})
    assert callback.left_by_failed_queues() == [Pack(pack_id="pack-000.0", trials=first.trials[1:]), second]


def test_a_diverged_trial_marks_its_setting_until_the_end(
    callback: RecordingCallback, the_plan: Plan, tmp_path: Path
) -> None:
    first, _ = the_plan.packs
    bad, store = first.trials[0], TrialStore(str(tmp_path / "trials"))
    trial = tune_trial(tmp_path, queue="queue-0")
    callback.on_trial_start(0, [], trial)
    end = TrialEnd(status="FAILED", reason=f"{DIVERGED} at step 1")
    update = replace(update_of(first)["update"], ended={bad.trial_id: end})
    callback.on_trial_result(0, [], trial, {"update": update})
    assert store.diverged_settings() == {first.trials[1].setting_id}, "that of its other seed"
    callback.close()
    assert store.diverged_settings() == set()
    experiment = the_plan.experiment.model_copy(update={"early_stopping": EarlyStoppingConfig(grace_steps=1)})
    previous = find_previous("recorded", f"sqlite:///{tmp_path / 'mlflow.db'}", None)
    assert previous is not None
    mark_diverged_before(store, the_plan, previous)
    assert store.diverged_settings() == set(), "nothing is ranked without early stopping"
    mark_diverged_before(store, replace(the_plan, experiment=experiment), previous)
    assert store.diverged_settings() == {bad.setting_id}


def test_an_impossible_point_leaves_no_run(callback: RecordingCallback, tmp_path: Path) -> None:
    trial = tune_trial(tmp_path, error=ValueError("no trial"))
    callback.on_trial_start(0, [], trial)
    callback.on_trial_error(0, [], trial)
    callback.close()
    assert recorded(tmp_path) == ("FINISHED", {})


def make_runner(recorder: Recorder, the_plan: Plan, folder: Path) -> TuneRunner:
    placement = Placement(num_workers=1, cpus_per_worker=1.0, use_gpu=False, num_packs=1)
    progress = SweepProgress(len(the_plan.trials), Console(quiet=True))
    store = TrialStore(str(folder / "trials"))
    sweep = Sweep(name="recorded-1", experiment=the_plan.experiment, recorder=recorder, store=store)
    return TuneRunner(sweep, the_plan, {}, placement, progress)


def tune_that(act: Callable[[RecordingCallback], None]) -> Callable[[TuneRunner, Sequence[PackQueue], int], None]:
    """Replaces Tune, for which no way to leave a queue out is known."""

    def tune(runner: TuneRunner, queues: Sequence[PackQueue], number: int) -> None:
        act(runner.callback)

    return tune


def test_a_trial_that_tune_left_out_is_recorded_as_failed(
    recorder: Recorder, the_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = the_plan.packs

    def begin_one(callback: RecordingCallback) -> None:
        trial = tune_trial(tmp_path, queue="queue-0")
        callback.on_trial_start(0, [], trial)
        finish(callback, trial, first)
        callback.on_trial_complete(0, [], trial)

    monkeypatch.setattr(TuneRunner, "_tune", tune_that(begin_one))
    outcome = make_runner(recorder, the_plan, tmp_path).run()
    sweep, trials = recorded(tmp_path)
    assert sweep == "FAILED"
    assert outcome.statuses == {trial_id: status for trial_id, (status, _) in trials.items()}
    assert {trials[trial.trial_id] for trial in first.trials} == {("FINISHED", "")}
    (end,) = {trials[trial.trial_id] for trial in second.trials}
    assert end == ("FAILED", "Ray Tune has ended without starting a process for this trial")


def test_a_sweep_that_breaks_before_its_first_trial_is_killed(
    recorder: Recorder, the_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(callback: RecordingCallback) -> None:
        raise ConnectionError("the cluster is gone")

    monkeypatch.setattr(TuneRunner, "_tune", tune_that(break_down))
    with pytest.raises(ConnectionError, match="the cluster is gone"):
        make_runner(recorder, the_plan, tmp_path).run()
    assert recorded(tmp_path) == ("KILLED", {})


def test_sigterm_to_the_group_while_closing_leaves_the_record_closed(
    recorder: Recorder, the_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begin_and_finish_all(callback: RecordingCallback) -> None:
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Tune's own handler does nothing when Tune is at its end
        for number, pack in enumerate(the_plan.packs):
            trial = tune_trial(tmp_path, queue=f"queue-{number}")
            callback.on_trial_start(0, [], trial)
            finish(callback, trial, pack)
            callback.on_trial_complete(0, [], trial)

    def summarise(writer: SweepWriter, cost: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as of_ray:
        monkeypatch.setattr("loragrid.sweep.tune_runner.own_ray_processes", lambda: [psutil.Process(of_ray.pid)])
        of_ray.kill()
        monkeypatch.setattr(TuneRunner, "_tune", tune_that(begin_and_finish_all))
        monkeypatch.setattr(SweepWriter, "_summarise", summarise)
        with pytest.raises(SweepInterrupted) as interruption:
            make_runner(recorder, the_plan, tmp_path).run()
    assert interruption.value.signal == signal.SIGTERM
    sweep, trials = recorded(tmp_path)
    assert sweep == "FINISHED"
    assert {status for status, _ in trials.values()} == {"FINISHED"}


def test_the_first_signal_stops_tune_and_the_second_ends_it() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    stopped = []
    with ended_by_signals() as came:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM]
    with ended_by_signals() as came:
        signal.signal(signal.SIGUSR1, lambda number, frame: stopped.append(number))  # as Tune does
        signal.raise_signal(signal.SIGINT)
        assert (came, stopped) == ([signal.SIGINT], [signal.SIGUSR1])
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
