"""If a worker is killed at any moment, others continue the queue; every curve is the undisturbed one to the bit."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loragrid.config.experiment import EarlyStoppingConfig, SamplesConfig
from loragrid.trials.outcome import DIVERGED, TrialEnd
from loragrid.trials.packing import Pack, PackQueue
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import PackUpdate
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.queue import run_queue
from loragrid.worker.queue_worker import build_worker
from loragrid.worker.recovery import DAMAGED_TAG, left_behind, recover
from tests.support.mounts import can_mount, small_disk
from tests.support.queue_runs import let_diverge
from tests.support.small_packs import Setup, make_setup

HALVING = EarlyStoppingConfig(grace_steps=2, reduction_factor=2)
OVER_ALL = EarlyStoppingConfig(grace_steps=2, reduction_factor=2, within="sweep")


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


class Killed(BaseException):
    """No `except Exception` sees it, as none sees a SIGKILL."""


@dataclass(kw_only=True)
class Driver:
    """Receives what workers send, as the sweep's driver does: steps and ends count once; kills at the k-th update."""

    store: TrialStore
    kill_at: int | None = None
    lose_last: bool = False
    num_updates: int = 0
    records: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)
    ended: dict[str, TrialEnd] = field(default_factory=dict)
    tags: dict[str, dict[str, str]] = field(default_factory=dict)
    phases: list[str] = field(default_factory=list)
    trials: dict[str, Trial] = field(default_factory=dict)

    def __call__(self, update: PackUpdate) -> None:
        self.num_updates += 1
        killed = self.num_updates == self.kill_at
        if not (killed and self.lose_last):
            self._take(update)
        if killed:
            raise Killed

    def _take(self, update: PackUpdate) -> None:
        self.phases.append(update.phase)
        for trial_id, records in update.records.items():
            known = self.records.setdefault(trial_id, {})
            for record in records:
                step = int(record["step"])
                assert known.get(step, record) == record, "a step that comes again is the same to the bit"
                known[step] = record
        for trial_id, tags in update.tags.items():
            self.tags.setdefault(trial_id, {}).update(tags)
        for trial_id, end in update.ended.items():
            if trial_id not in self.ended:
                self.ended[trial_id] = end
                if end.reason.startswith(DIVERGED):
                    self.store.mark_diverged(self.trials[trial_id].setting_id, trial_id)
                self.store.mark_ended(trial_id)


def trials_of(setup: Setup, *, checkpoint_every: int | None = 3) -> list[list[Trial]]:
    """Two packs of mixed methods that go through a rung together."""
    common: dict[str, Any] = {"checkpoint_every": checkpoint_every, "report_every": 2, "measure_steps": 1}
    first = [setup.trial("lora", seed=seed, lr=0.01 * (seed + 1), **common) for seed in range(2)]
    second = [setup.trial("delta_lora", **common), setup.trial("vera", lr=0.001, **common)]
    return [first, second]


def run_workers(
    setup: Setup,
    packs: list[list[Trial]],
    driver: Driver,
    halving: EarlyStoppingConfig | None,
    samples: SamplesConfig | None = None,
) -> None:
    """What one set of workers does, until it is killed or done."""
    named = tuple(Pack(pack_id=f"pack-{index}", trials=tuple(trials)) for index, trials in enumerate(packs))
    queue = PackQueue(queue_id="queue-0", packs=named)
    driver.trials |= {trial.trial_id: trial for trial in queue.trials}
    group = ProcessGroup(device=torch.device("cpu"), isolate_failures=True)
    worker = build_worker(
        lambda model, data: setup.rows, driver, driver.store, group, early_stopping=halving, samples=samples
    )
    recover(worker, queue, left_behind(queue, driver.store))
    run_queue(queue.packs, worker, halving)


def adapters(store: TrialStore) -> dict[str, bytes]:
    return {path.parent.parent.name: path.read_bytes() for path in Path(store.uri).glob("*/adapter/*.safetensors")}


@pytest.mark.parametrize("halving", [None, OVER_ALL], ids=["to the end", "through rungs"])
@pytest.mark.parametrize("lose_last", [False, True], ids=["last update arrives", "last update is lost"])
def test_killed_workers_change_no_curve_end_or_adapter(
    setup: Setup, tmp_path: Path, halving: EarlyStoppingConfig | None, lose_last: bool
) -> None:
    packs = trials_of(setup)
    calm = Driver(store=TrialStore(str(tmp_path / "calm")))
    run_workers(setup, packs, calm, halving)
    statuses = [end.status for end in calm.ended.values()]
    assert statuses.count("FINISHED") == (4 if halving is None else 1)
    for kill_at in range(2, calm.num_updates + 1, 3):
        driver = Driver(store=TrialStore(str(tmp_path / f"killed-{kill_at}")), kill_at=kill_at, lose_last=lose_last)
        with pytest.raises(Killed):
            run_workers(setup, packs, driver, halving)
        run_workers(setup, packs, driver, halving)
        assert driver.records == calm.records, kill_at
        assert {key: (end.status, end.reason) for key, end in driver.ended.items()} == {
            key: (end.status, end.reason) for key, end in calm.ended.items()
        }, kill_at
        assert adapters(driver.store) == adapters(calm.store), kill_at


def test_killed_workers_change_no_ranking_of_settings(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    common: dict[str, Any] = {"checkpoint_every": 2, "report_every": 2, "measure_steps": 0, "steps": 5}
    lora = [setup.trial("lora", seed=seed, lr=rate, **common) for rate in (0.01, 1e-3, 1e-5) for seed in range(2)]
    full = [setup.trial("full", lr=rate, **common) for rate in (1e-5, 1e-3)]
    packs = [lora[:3], [full[0]], lora[3:], [full[1]]]  # a setting of two packs
    let_diverge(monkeypatch, lora[0])
    calm = Driver(store=TrialStore(str(tmp_path / "calm")))
    run_workers(setup, packs, calm, HALVING)
    ends = {key: (end.status, end.reason) for key, end in calm.ended.items()}
    assert [ends[trial.trial_id][0] for trial in lora] == ["FAILED", "KILLED", *["FINISHED"] * 2, *["KILLED"] * 2]
    assert "another seed diverged) is setting number 3 of 3 of lora" in ends[lora[1].trial_id][1]
    at_the_rung = {number for number, phase in enumerate(calm.phases, start=1) if phase == "ended"}
    assert len(at_the_rung) == 3, "one per pack that loses a trial"
    for kill_at in sorted({3, min(at_the_rung) - 1, *at_the_rung, calm.num_updates - 2}):
        driver = Driver(store=TrialStore(str(tmp_path / f"killed-{kill_at}")), kill_at=kill_at)
        with pytest.raises(Killed):
            run_workers(setup, packs, driver, HALVING)
        run_workers(setup, packs, driver, HALVING)
        assert {key: (end.status, end.reason) for key, end in driver.ended.items()} == ends, kill_at
        assert driver.records == calm.records, kill_at
        assert adapters(driver.store) == adapters(calm.store), kill_at


def answers(store: TrialStore) -> dict[str, str]:
    return {path.parts[-3]: path.read_text("utf-8") for path in Path(store.uri).glob("*/samples/answers.json")}


@pytest.mark.parametrize("halving", [None, HALVING], ids=["to the end", "through rungs"])
def test_killed_workers_lose_no_sample_answer_or_held_out_loss(
    tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path, halving: EarlyStoppingConfig | None
) -> None:
    (tmp_path / "plain.txt").write_text("The old bridge stands near the market. " * 3, encoding="utf-8")
    setup = make_setup(tiny_gpt2_dir, chat_jsonl, "float64", forgetting_name=str(tmp_path / "plain.txt"))
    samples = SamplesConfig(num_prompts=2, max_new_tokens=3)
    packs = [
        [replace(trial, training=trial.training.model_copy(update={"eval_every": 3})) for trial in trials]
        for trials in [*trials_of(setup), [setup.trial("full", lr=0.03, checkpoint_every=3, report_every=2)]]
    ]
    calm = Driver(store=TrialStore(str(tmp_path / "calm")))
    run_workers(setup, packs, calm, halving, samples)
    finished = {trial_id for trial_id, end in calm.ended.items() if end.status == "FINISHED"}
    assert answers(calm.store).keys() == finished
    for records in calm.records.values():
        assert len([step for step, record in records.items() if "forgetting/loss" in record]) >= 2
        assert all(("eval/loss" in record) == ("forgetting/loss" in record) for record in records.values())
    for kill_at in (calm.num_updates // 2, calm.num_updates - 1):  # the last pack writes the base
        driver = Driver(store=TrialStore(str(tmp_path / f"killed-{kill_at}")), kill_at=kill_at, lose_last=True)
        with pytest.raises(Killed):
            run_workers(setup, packs, driver, halving, samples)
        run_workers(setup, packs, driver, halving, samples)
        assert driver.records == calm.records, kill_at
        assert answers(driver.store) == answers(calm.store), kill_at


def test_what_was_trained_and_measured_before_is_not_done_again(setup: Setup, tmp_path: Path) -> None:
    packs = trials_of(setup, checkpoint_every=2)
    calm = Driver(store=TrialStore(str(tmp_path / "calm")))
    run_workers(setup, packs, calm, None)
    last_training = max(index for index, phase in enumerate(calm.phases) if phase == "training")
    driver = Driver(store=TrialStore(str(tmp_path / "killed")), kill_at=last_training)
    with pytest.raises(Killed):
        run_workers(setup, packs, driver, None)
    before = len(driver.phases)
    run_workers(setup, packs, driver, None)
    after = driver.phases[before:]
    assert "going on" in after
    assert not [phase for phase in after if phase.startswith("measuring")]
    assert after.count("training") < 4


def test_after_a_damaged_state_the_end_is_the_same(setup: Setup, tmp_path: Path) -> None:
    packs = trials_of(setup, checkpoint_every=1)[:1]
    calm = Driver(store=TrialStore(str(tmp_path / "calm")))
    run_workers(setup, packs, calm, None)
    driver = Driver(store=TrialStore(str(tmp_path / "damaged")), kill_at=calm.num_updates - 1)
    with pytest.raises(Killed):
        run_workers(setup, packs, driver, None)
    victim = packs[0][0].trial_id
    latest = sorted(Path(driver.store.uri, victim).glob("*.step-*"))[-1]
    latest.write_bytes(latest.read_bytes()[:100])
    run_workers(setup, packs, driver, None)
    assert driver.records == calm.records
    assert "its checksum is not the one" in driver.tags[victim][DAMAGED_TAG]
    assert {end.status for end in driver.ended.values()} == {"FINISHED"}
    assert adapters(driver.store) == adapters(calm.store)


class FullDisk(TrialStore):
    """Storage on which no state of one trial can be written any more, from its second on."""

    def save(self, trial_id: str, saved: object) -> None:
        if "lora-" in trial_id and "-1-" in trial_id and list(Path(self.uri, trial_id).glob("*.step-*")):
            raise OSError(28, "No space left on device")
        super().save(trial_id, saved)  # type: ignore[arg-type]


def test_a_trial_with_an_unwritable_state_fails_alone(setup: Setup, tmp_path: Path) -> None:
    packs = trials_of(setup, checkpoint_every=2)
    calm, short = Driver(store=TrialStore(str(tmp_path / "calm"))), Driver(store=FullDisk(str(tmp_path / "full")))
    run_workers(setup, packs, calm, None)
    run_workers(setup, packs, short, None)
    (failed,) = (trial_id for trial_id, end in short.ended.items() if end.status == "FAILED")
    assert "No space left on device" in short.ended[failed].reason
    assert max(short.records[failed]) == 4
    for trial_id in calm.records.keys() - {failed}:
        assert short.records[trial_id] == calm.records[trial_id]
        assert short.ended[trial_id].status == "FINISHED"
    saved, damaged = short.store.load(failed)
    assert saved is not None
    assert (saved.state.completed, damaged) == (2, [])


@pytest.fixture
def four_mebibytes(tmp_path: Path) -> Iterator[Path]:
    with small_disk(tmp_path / "disk", "4m"):
        yield tmp_path / "disk"


@pytest.mark.skipif(not can_mount(), reason="no right to mount: the disk that gets full must be a small one")
def test_a_full_disk_fails_one_trial_until_room(setup: Setup, tmp_path: Path, four_mebibytes: Path) -> None:
    common: dict[str, Any] = {"checkpoint_every": 2, "report_every": 2, "measure_steps": 0}
    large = setup.trial("lora", {"rank": 32}, **common)  # a state of 0.8 MB, where the others' are of 0.03
    packs = [[setup.trial("lora", {"rank": 1}, **common), large], [setup.trial("vera", **common)]]
    calm = Driver(store=TrialStore(str(tmp_path / "calm")))
    run_workers(setup, packs, calm, None)
    ballast = four_mebibytes / "ballast"
    ballast.write_bytes(bytes(3 * 2**20))
    short = Driver(store=TrialStore(str(four_mebibytes / "trials")))
    run_workers(setup, packs, short, None)
    failed = short.ended.pop(large.trial_id)
    assert failed.status == "FAILED"
    assert "No space left on device" in failed.reason
    assert {end.status for end in short.ended.values()} == {"FINISHED"}
    for trial_id in short.ended:
        assert short.records[trial_id] == calm.records[trial_id]
    assert len(list(Path(short.store.uri, large.trial_id).iterdir())) == 1, "the state before, and no half of the next"
    saved, damaged = short.store.load(large.trial_id)
    assert saved is not None
    assert (saved.state.completed, damaged) == (2, [])
    ballast.unlink()
    short.store.reopen([large.trial_id])
    after = Driver(store=short.store)
    run_workers(setup, packs, after, None)
    assert [(trial_id, end.status) for trial_id, end in after.ended.items()] == [(large.trial_id, "FINISHED")]
    assert "going on" in after.phases
    assert after.records == {large.trial_id: calm.records[large.trial_id]}
    assert adapters(after.store) == adapters(calm.store)


def test_joined_queues_keep_their_earlier_decisions(setup: Setup, tmp_path: Path) -> None:
    common: dict[str, Any] = {"checkpoint_every": 1, "report_every": 1, "measure_steps": 0}
    queues = [
        [setup.trial("lora", seed=seed, lr=0.01 * (seed + 1), **common) for seed in range(4)],
        [setup.trial("lora", seed=seed, lr=0.001 * (seed + 1), **common) for seed in range(4)],
    ]
    calm = Driver(store=TrialStore(str(tmp_path / "calm")))
    killed = Driver(store=TrialStore(str(tmp_path / "killed")))
    for trials in queues:
        run_workers(setup, [trials], calm, HALVING)
        killed.kill_at = killed.num_updates + 9
        with pytest.raises(Killed):
            run_workers(setup, [trials], killed, HALVING)
        assert {max(killed.records[trial.trial_id]) for trial in trials} == {2, 3}, "on the way to the second rung"
    left = [[trial for trial in trials if trial.trial_id not in killed.ended] for trials in queues]
    assert [len(trials) for trials in left] == [2, 2]
    run_workers(setup, left, killed, HALVING)
    first_rung = "stopped early at rung 1 "
    assert {key for key, end in killed.ended.items() if end.reason.startswith(first_rung)} == {
        key for key, end in calm.ended.items() if end.reason.startswith(first_rung)
    }


def test_a_diverged_trial_keeps_its_step_after_a_kill(setup: Setup, tmp_path: Path) -> None:
    common: dict[str, Any] = {"checkpoint_every": 3, "report_every": 1, "measure_steps": 0, "clip_norm": None}
    packs = [[setup.trial("lora", lr=1e300, **common), setup.trial("lora", seed=1, **common)]]
    calm = Driver(store=TrialStore(str(tmp_path / "calm")))
    run_workers(setup, packs, calm, None)
    driver = Driver(store=TrialStore(str(tmp_path / "killed")), kill_at=calm.num_updates - 1)
    with pytest.raises(Killed):
        run_workers(setup, packs, driver, None)
    run_workers(setup, packs, driver, None)
    reasons = {key: end.reason for key, end in driver.ended.items()}
    assert reasons == {key: end.reason for key, end in calm.ended.items()}
    assert "not finite at step" in max(reasons.values())


class EndsMeanwhile(TrialStore):
    """Storage in which the driver notes a trial's end while a new worker looks for its states."""

    def _states(self, trial_id: str) -> list[str]:
        names = super()._states(trial_id)
        self.mark_ended(trial_id)
        for name in names:
            Path(self.uri, trial_id, name).unlink()
        return names


def test_a_trial_marked_during_recovery_is_not_trained(setup: Setup, tmp_path: Path) -> None:
    packs = trials_of(setup, checkpoint_every=2)[:1]
    driver = Driver(store=TrialStore(str(tmp_path)), kill_at=6)
    with pytest.raises(Killed):
        run_workers(setup, packs, driver, None)
    pack = Pack(pack_id="pack-0", trials=tuple(packs[0]))
    left = left_behind(PackQueue(queue_id="queue-0", packs=(pack,)), EndsMeanwhile(str(tmp_path)))
    assert left.ended == {trial.trial_id for trial in packs[0]}
    assert (left.saved, left.damaged) == ({}, {})
