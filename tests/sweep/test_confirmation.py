"""A sweep trains each method's chosen setting again with fresh seeds; the record alone decides which one that is."""

import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from rich.console import Console

import loragrid as lg
from loragrid.cli import main as cli
from loragrid.comparison.experiment_file import experiment_to_yaml
from loragrid.comparison.table import Comparison
from loragrid.planning.placement import Placement
from loragrid.planning.plan import Plan, plan
from loragrid.sweep import confirmation as module
from loragrid.sweep.confirmation import NOTHING_TO_CONFIRM, Confirmation, open_part, plan_from_record
from loragrid.sweep.progress import SweepProgress
from loragrid.sweep.record import Sweep
from loragrid.sweep.run import SweepResult
from loragrid.sweep.signals import SweepInterrupted, ended_by_signals, stop_handler_kept
from loragrid.sweep.tune_runner import TuneRunner
from loragrid.tracking.previous_run import PreviousSweep, find_previous
from loragrid.tracking.recorder import Recorder
from loragrid.trials.confirm import Chosen
from loragrid.trials.load import experiment_from_mapping
from loragrid.trials.outcome import SweepOutcome, TrialEnd
from loragrid.trials.packing import PackQueue
from loragrid.trials.tags import CONFIRM_CHOICE_TAG, PARENT_TAG, PHASE_TAG, TRIAL_TAG
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import PackUpdate
from tests.support.comparisons import made_up_comparison

AXES = {"lr": "training.lr", "max_length": "data.max_length", "seed": "seed"}
PLACEMENT = Placement(num_workers=1, cpus_per_worker=1.0, use_gpu=False, num_packs=1)
DIVERGED = {"status": "FAILED", "reason": "diverged: loss or gradient not finite at step 1", "eval/final_loss": None}
LOST = {"status": "FAILED", "reason": "the worker died", "eval/final_loss": None}
METHODS: list[Any] = [
    {"name": "lora", "label": "LoRA", "grid": {"lr": [1e-3, 1e-2]}},
    {"name": "vera", "grid": {"lr": [1e-2, 1e-1]}},
    "frozen",
]


@pytest.fixture(scope="module")
def make_plan(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Callable[..., Plan]:
    def make(**changes: Any) -> Plan:
        mapping: dict[str, Any] = {
            "name": "confirmed",
            "model": {"name": str(tiny_gpt2_dir), "dtype": "float32"},
            "data": {"name": str(chat_jsonl), "max_length": 96, "num_eval": 8},
            "training": {"steps": 4, "batch_size": 4},
            "methods": METHODS,
            "grid": {"seed": [0, 1]},
            "early_stopping": {"grace_steps": 2},
            "confirm": {"seeds": 3},
        }
        return plan(experiment_from_mapping(mapping | changes, "confirmed.yaml"))

    return make


@pytest.fixture(scope="module")
def the_plan(make_plan: Callable[..., Plan]) -> Plan:
    """Two methods with two learning rates and two seeds, and the bare base."""
    return make_plan()


def loss_of(trial: Trial) -> float:
    """The lower learning rate is better, and the lower seed."""
    return {"lora": 2.0, "vera": 3.0, "frozen": 4.0}[trial.method.name] + 10 * trial.training.lr + trial.seed / 100


def comparison_of(
    trials: Sequence[Trial], changes: Callable[[Trial], Mapping[str, Any]] = lambda trial: {}
) -> Comparison:
    """The trials as finished rows of a comparison."""
    rows = [
        {
            "trial_id": trial.trial_id,
            "method": trial.label or trial.method.name,
            "lr": trial.training.lr,
            "max_length": trial.data.max_length,
            "seed": trial.seed,
            "eval/final_loss": loss_of(trial),
            "parameters/trainable": 0 if trial.method.name == "frozen" else 10,
            **changes(trial),
        }
        for trial in trials
    ]
    varying = {name: path for name, path in AXES.items() if len({row[name] for row in rows}) > 1}
    return made_up_comparison(rows, varying, tags={trial.trial_id: {PHASE_TAG: trial.phase} for trial in trials})


def points(trials: Sequence[Trial]) -> list[tuple[str, float, int]]:
    return [(trial.method.name, trial.training.lr, trial.seed) for trial in trials]


def test_each_chosen_setting_gets_every_fresh_seed(the_plan: Plan) -> None:
    found = plan_from_record(comparison_of(the_plan.trials), the_plan, Chosen())
    assert points(found.plan.trials) == [
        (method, lr, seed) for method, lr in (("lora", 1e-3), ("vera", 1e-2)) for seed in (2, 3, 4)
    ]
    assert {trial.phase for trial in found.plan.trials} == {"confirm"}
    assert found.sentences == ()
    assert found.chosen.seeds == (2, 3, 4)
    assert [pack.pack_id for pack in found.plan.packs] == ["confirm-000"], "methods share a base here too"


def test_trials_that_confirm_have_no_part_in_the_choice(the_plan: Plan) -> None:
    first = plan_from_record(comparison_of(the_plan.trials), the_plan, Chosen())
    worse = [trial.with_seed(seed, "confirm") for trial in the_plan.trials[2:3] for seed in (2, 3, 4)]
    with_fresh = comparison_of([*the_plan.trials, *worse])
    assert plan_from_record(with_fresh, the_plan, first.chosen) == first


def test_a_method_without_a_choice_is_named_and_left_out(the_plan: Plan) -> None:
    record = comparison_of(the_plan.trials, lambda trial: DIVERGED if trial.method.name == "lora" else {})
    found = plan_from_record(record, the_plan, Chosen())
    assert {trial.method.name for trial in found.plan.trials} == {"vera"}
    assert found.sentences == ("LoRA: none of its settings can be chosen, so none is confirmed",)


def test_settings_are_chosen_on_each_task_apart(make_plan: Callable[..., Plan]) -> None:
    whole_plan = make_plan(grid={"seed": [0], "data.max_length": [64, 96]})
    record = comparison_of(
        whole_plan.trials,
        lambda t: {"eval/final_loss": -loss_of(t) if t.data.max_length == 96 else loss_of(t)},
    )
    found = plan_from_record(record, whole_plan, Chosen())
    assert {(t.method.name, t.data.max_length, t.training.lr) for t in found.plan.trials} == {
        ("lora", 64, 1e-3),
        ("lora", 96, 1e-2),
        ("vera", 64, 1e-2),
        ("vera", 96, 1e-1),
    }


def test_a_choice_that_changes_is_said_and_confirmed_too(the_plan: Plan) -> None:
    """A trial was lost, so its setting could not win; a resumed sweep has trained it since."""
    best = the_plan.trials[1]
    before = plan_from_record(
        comparison_of(the_plan.trials, lambda trial: LOST if trial == best else {}), the_plan, Chosen()
    )
    assert points(before.plan.trials[:1]) == [("lora", 1e-2, 2)]
    after = plan_from_record(comparison_of(the_plan.trials), the_plan, before.chosen)
    assert points(after.plan.trials[:1]) == [("lora", 1e-3, 2)]
    (sentence,) = after.sentences
    assert sentence.startswith("LoRA: lr 0.001 is the choice now, another setting was it in earlier runs")
    assert after.chosen != before.chosen
    again = plan_from_record(comparison_of(the_plan.trials), the_plan, after.chosen)
    assert (again.chosen, again.sentences) == (after.chosen, ())


def test_the_same_setting_is_recognised_whichever_seeds_finished(the_plan: Plan) -> None:
    lr = the_plan.trials[0].training.lr
    lost = comparison_of(
        the_plan.trials,
        lambda t: LOST if t.method.name == "lora" and (t.seed == 0 or t.training.lr != lr) else {},
    )
    before = plan_from_record(lost, the_plan, Chosen())
    after = plan_from_record(comparison_of(the_plan.trials), the_plan, before.chosen)
    assert (after.chosen, after.sentences) == (before.chosen, ())


def test_a_best_setting_that_the_experiment_lost_is_named(the_plan: Plan, make_plan: Callable[..., Plan]) -> None:
    smaller = make_plan(methods=[{"name": "lora", "label": "LoRA", "lr": 1e-2}, *METHODS[1:]])
    found = plan_from_record(comparison_of(the_plan.trials), smaller, Chosen())
    assert {trial.method.name for trial in found.plan.trials} == {"vera"}
    (sentence,) = found.sentences
    assert sentence == "LoRA: lr 0.001 is best in the record, but the experiment no longer has it: " + (
        "the method is not confirmed"
    )


def test_a_grid_cannot_take_over_a_seed_that_confirmed(make_plan: Callable[..., Plan]) -> None:
    grown = make_plan(grid={"seed": [0, 1, 2]})
    with pytest.raises(ValueError, match=r"grid\.seed: 2: this sweep has confirmed settings with the seeds 2, 3, 4"):
        plan_from_record(comparison_of(grown.trials), grown, Chosen(settings=("x",), seeds=(2, 3, 4)))


def test_ended_trials_leave_their_packs(the_plan: Plan) -> None:
    confirm = plan_from_record(comparison_of(the_plan.trials), the_plan, Chosen()).plan
    ended = [trial.trial_id for trial in confirm.trials[:4]]

    def previous(trial_ids: Sequence[str]) -> PreviousSweep:
        outcome = SweepOutcome(statuses=dict.fromkeys(trial_ids, "FINISHED"))
        return PreviousSweep(name="x", trials="", num_resumed=0, is_finished=False, outcome=outcome, begun={})

    left = open_part(confirm, previous(ended))
    assert left is not None
    assert left.trials == confirm.trials[4:]
    assert {trial for pack in left.packs for trial in pack.trials} == set(confirm.trials[4:])
    assert open_part(confirm, None) == confirm
    assert open_part(confirm, previous([trial.trial_id for trial in confirm.trials])) is None


class Sweeps:
    """Runs a sweep with the real record; Tune is replaced by a function that ends every trial at once."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.uri = folder, f"sqlite:///{folder / 'mlflow.db'}"
        self.output: list[str] = []
        self.trained: list[tuple[int, Plan, list[PackQueue]]] = []
        self.ends: Callable[[Trial], TrialEnd] = lambda trial: TrialEnd(status="FINISHED")
        self.after: Callable[[int], None] = lambda number: None
        monkeypatch.setattr(TuneRunner, "_tune", lambda *arguments: self._tune(*arguments))

    def run(
        self, whole_plan: Plan, the_plan: Plan | None = None, previous: PreviousSweep | None = None
    ) -> Confirmation:
        recorder = Recorder("confirmed", self.uri)
        if previous is None:
            recorder.start_sweep("confirmed-1", {}, {})
        else:
            recorder.resume_sweep("confirmed-1", {})
        sweep = Sweep(
            name="confirmed-1",
            experiment=whole_plan.experiment,
            recorder=recorder,
            store=TrialStore(str(self.folder / "trials")),
            previous=previous,
        )
        terminal = Console(width=200, record=True, quiet=False, file=(self.folder / "out.txt").open("a"))
        progress = SweepProgress(len(whole_plan.trials), terminal)
        confirmation = Confirmation(sweep, whole_plan, PLACEMENT, progress, self.output.append)
        self.runner = TuneRunner(sweep, the_plan or whole_plan, {}, PLACEMENT, progress)
        try:
            self.runner.run(confirmation)
        finally:
            self.screen = terminal.export_text()
        self.progress = progress
        return confirmation

    def _tune(self, runner: TuneRunner, queues: Sequence[PackQueue], number: int) -> None:
        self.trained.append((number, runner.plan, list(queues)))
        for queue in queues:
            tune_trial: Any = SimpleNamespace(trial_id=queue.queue_id, config={"queue": queue.queue_id})
            runner.callback.on_trial_start(0, [], tune_trial)
            for pack in queue.packs:
                ids = tuple(trial.trial_id for trial in pack.trials)
                update = PackUpdate(
                    pack_id=pack.pack_id,
                    trial_ids=ids,
                    phase="training",
                    records={t.trial_id: [{"step": 4, "eval/loss": loss_of(t)}] for t in pack.trials},
                    ended={trial.trial_id: self.ends(trial) for trial in pack.trials},
                    done=True,
                )
                runner.callback.on_trial_result(0, [], tune_trial, {"update": update})
            runner.callback.on_trial_complete(0, [], tune_trial)
        self.after(number)

    def recorded(self) -> tuple[str, dict[str, str], dict[str, str]]:
        """(The sweep's status, its tags, trial id -> phase) as MLflow holds them."""
        client = MlflowClient(self.uri)
        experiment = client.get_experiment_by_name("confirmed")
        assert experiment is not None
        runs = client.search_runs([experiment.experiment_id])
        (sweep,) = (run for run in runs if PARENT_TAG not in run.data.tags)
        phases = {run.data.tags[TRIAL_TAG]: run.data.tags[PHASE_TAG] for run in runs if PARENT_TAG in run.data.tags}
        return sweep.info.status, dict(sweep.data.tags), phases

    def previous(self) -> PreviousSweep:
        found = find_previous("confirmed", self.uri, None)
        assert found is not None
        return found


@pytest.fixture
def sweeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweeps:
    return Sweeps(tmp_path, monkeypatch)


@pytest.mark.heavy
def test_the_grid_is_trained_first_then_what_it_chose(sweeps: Sweeps, the_plan: Plan) -> None:
    confirmation = sweeps.run(the_plan)
    (first, grid, _), (second, fresh, queues) = sweeps.trained
    assert (first, second) == (0, 1), "Tune's runs have names of their own"
    assert grid.experiment.early_stopping is not None
    assert fresh.experiment.early_stopping is None
    assert [pack.pack_id for queue in queues for pack in queue.packs] == ["confirm-000"]
    assert points(fresh.trials)[0] == ("lora", 1e-3, 2)
    assert confirmation.problem == ""
    assert confirmation.whole_plan.trials == (*the_plan.trials, *fresh.trials)
    assert len(sweeps.runner.callback.outcome.statuses) == len(the_plan.trials) + 6
    status, tags, phases = sweeps.recorded()
    assert status == "FINISHED"
    assert phases == {trial.trial_id: trial.phase for trial in confirmation.whole_plan.trials}
    assert Chosen.from_text(tags[CONFIRM_CHOICE_TAG]) == sweeps.previous().chosen
    assert sweeps.previous().chosen.seeds == (2, 3, 4)
    assert "confirming 2 settings with 3 fresh seeds" in sweeps.screen
    assert "(16 of 16 trials)" in sweeps.screen


@pytest.mark.heavy
def test_a_signal_between_the_phases_confirms_nothing_yet(sweeps: Sweeps, the_plan: Plan) -> None:
    def interrupt(number: int) -> None:
        if number == 0:
            signal.raise_signal(signal.SIGTERM)

    sweeps.after = interrupt
    with pytest.raises(SweepInterrupted):
        sweeps.run(the_plan)
    status, tags, phases = sweeps.recorded()
    assert status == "KILLED"
    assert CONFIRM_CHOICE_TAG not in tags
    assert set(phases.values()) == {"tune"}
    assert len(phases) == len(the_plan.trials)


@pytest.mark.heavy
def test_without_the_record_nothing_is_confirmed_until_it_is_resumed(
    sweeps: Sweeps, the_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*arguments: object, **keywords: object) -> Comparison:
        raise MlflowException("no connection")

    with monkeypatch.context() as patch:
        patch.setattr(module, "load_comparison", unreachable)
        confirmation = sweeps.run(the_plan)
    assert confirmation.problem.endswith("the choice needs the record and MLflow does not answer (MlflowException)")
    assert sweeps.recorded()[0] == "KILLED", "it does not look finished"
    assert len(sweeps.trained) == 1
    none_left = the_plan.__class__(
        experiment=the_plan.experiment, trials=(), counts=the_plan.counts, packs=(), confirm=the_plan.confirm
    )
    confirmation = sweeps.run(the_plan, none_left, sweeps.previous())
    assert confirmation.problem == ""
    assert points(sweeps.trained[-1][1].trials)[0] == ("lora", 1e-3, 2)
    assert sweeps.recorded()[0] == "FINISHED"


@pytest.mark.heavy
def test_a_sweep_whose_settings_all_diverged_says_so(sweeps: Sweeps, the_plan: Plan) -> None:
    sweeps.ends = lambda trial: TrialEnd(status="FAILED", reason=str(DIVERGED["reason"]))
    confirmation = sweeps.run(the_plan)
    assert confirmation.problem == NOTHING_TO_CONFIRM
    assert len(sweeps.output) == 3
    assert sweeps.recorded()[0] == "FAILED", "nothing is outstanding"


@pytest.mark.heavy
def test_a_resumed_sweep_confirms_only_what_is_open(sweeps: Sweeps, the_plan: Plan) -> None:
    sweeps.ends = lambda t: TrialEnd(status="FAILED", reason="lost") if t.seed == 4 else TrialEnd(status="FINISHED")
    sweeps.run(the_plan)
    assert sweeps.recorded()[0] == "FAILED"
    none_left = the_plan.__class__(experiment=the_plan.experiment, trials=(), counts=the_plan.counts, packs=())
    sweeps.ends = lambda trial: TrialEnd(status="FINISHED")
    confirmation = sweeps.run(the_plan, none_left, sweeps.previous())
    assert points(sweeps.trained[-1][1].trials) == [("lora", 1e-3, 4), ("vera", 1e-2, 4)]
    assert sweeps.output == [], "the choice is the same"
    assert len(confirmation.whole_plan.trials) == len(the_plan.trials) + 6
    assert sweeps.recorded()[0] == "FINISHED"


def test_a_tuner_of_ones_own_refuses_to_confirm(the_plan: Plan) -> None:
    with pytest.raises(ValueError, match="confirm: your Tuner decides which trials there are; allowed here: null"):
        lg.trainable(the_plan.experiment)


def test_an_unconfirmed_sweep_has_not_succeeded_and_says_how_to(
    the_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome = SweepOutcome(statuses={trial.trial_id: "FINISHED" for trial in the_plan.trials})
    places: dict[str, Any] = {"tracking_uri": "sqlite:///x.db", "waiting_record": tmp_path / "spool"}
    result = SweepResult(plan=the_plan, name="confirmed-1", outcome=outcome, unconfirmed="MLflow is away", **places)
    assert not result.succeeded
    assert replace(result, unconfirmed="").succeeded
    file = tmp_path / "confirmed.yaml"
    file.write_text(experiment_to_yaml(the_plan.experiment))
    monkeypatch.setattr("loragrid.sweep.run.run", lambda experiment, **options: result)
    monkeypatch.setattr("sys.argv", ["loragrid", "run", str(file)])
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    again = f"MLflow is away; to try it again: loragrid run {file} --name confirmed-1 --resume"
    assert again in capsys.readouterr().out


def test_tunes_signal_handler_is_gone_when_tune_has_ended() -> None:
    with ended_by_signals() as came:
        with stop_handler_kept():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # as Tune leaves it: it stops nothing any more
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
        assert came == [signal.SIGTERM]
