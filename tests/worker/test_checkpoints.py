"""A pack that is saved and continued as in a new process ends with the same bits."""

import hashlib
import pickle
import struct
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from loragrid.training.assembly import build_model
from loragrid.training.loop import Report
from loragrid.training.member_state import MemberState, put_member, take_member
from loragrid.training.step import PackModel
from loragrid.trials.successive_halving import SettingScore
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import NUM_KEPT, TrialStore
from loragrid.worker.saved_trial import SavedTrial
from tests.support.small_packs import (
    Run,
    Setup,
    bit_equal,
    largest_difference,
    make_setup,
    mixed_trials,
    resume,
    run_pack,
)

HALF, STEPS = 4, 8


@pytest.fixture(scope="module", params=["float64", "bfloat16"])
def setup(request: pytest.FixtureRequest, tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, request.param)


@pytest.fixture(scope="module")
def exact(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


def save_all(model: PackModel, trials: Sequence[Trial], folder: Path) -> None:
    for member, trial in enumerate(trials):
        TrialStore(str(folder)).save(trial.trial_id, SavedTrial(state=take_member(model, member)))


def whole_run(setup: Setup, trials: list[Trial], folder: Path, step: int = HALF) -> Run:
    """Train to the end and save after `step` steps on the way."""

    def save(report: Report, model: PackModel) -> None:
        if report.checkpoint_due and report.completed == step:
            save_all(model, trials, folder)

    return run_pack(setup, trials, on_report=save, checkpoint_every=step)


def assert_continues(whole: Run, continued: Run, step: int = HALF) -> None:
    for member, records in enumerate(whole.records):
        assert continued.records[member] == {at: record for at, record in records.items() if at > step}
        assert bit_equal(continued.weights(member), whole.weights(member))
    for ours, theirs in zip(continued.model.base.parameters(), whole.model.base.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_a_mixed_pack_resumes_to_the_bit(setup: Setup, tmp_path: Path) -> None:
    trials = mixed_trials(setup)
    whole = whole_run(setup, trials, tmp_path)
    continued = resume(setup, trials, tmp_path)
    assert set(continued.records[0]) == set(range(HALF + 1, STEPS + 1))
    assert_continues(whole, continued)


def test_full_fine_tuning_goes_on_to_the_bit(setup: Setup, tmp_path: Path) -> None:
    trials = [setup.trial("full", lr=0.003)]
    assert_continues(whole_run(setup, trials, tmp_path), resume(setup, trials, tmp_path))


@pytest.mark.parametrize("start_step", range(HALF - 2, HALF + 2))
def test_delta_loras_snapshot_survives_on_either_side_of_the_checkpoint(
    exact: Setup, tmp_path: Path, start_step: int
) -> None:
    trials = [exact.trial("delta_lora", {"start_step": start_step})]
    assert_continues(whole_run(exact, trials, tmp_path), resume(exact, trials, tmp_path))


def test_a_member_diverged_before_the_checkpoint_stays_diverged(exact: Setup, tmp_path: Path) -> None:
    trials = [exact.trial("lora", seed=0), exact.trial("lora", seed=1)]

    def poison(model: PackModel) -> None:
        stacks, member = model.pack.member_stacks(0)
        next(iter(stacks.values())).get_parameter("lora_B").data[member, 0, 0] = float("nan")

    def save(report: Report, model: PackModel) -> None:
        if report.completed == HALF:
            save_all(model, trials, tmp_path)

    whole = run_pack(exact, trials, prepare=poison, on_report=save, report_every=HALF)
    continued = resume(exact, trials, tmp_path)
    # Inactive from the very start, and not for a new divergence at the first step after the checkpoint.
    assert [report.diverged_at for report in continued.reports] == [[0, None]] * len(continued.reports)
    assert continued.records[0] == {}
    assert continued.records[1] == {at: record for at, record in whole.records[1].items() if at > HALF}
    assert bit_equal(continued.weights(1), whole.weights(1))


def test_saving_changes_nothing(exact: Setup, tmp_path: Path) -> None:
    trials = mixed_trials(exact)
    saved, plain = whole_run(exact, trials, tmp_path), run_pack(exact, trials, checkpoint_every=HALF)
    assert saved.records == plain.records


def saved_at(completed: int) -> SavedTrial:
    """A state that holds something of every kind."""
    return SavedTrial(
        state=MemberState(completed=completed, active=True, tensors={"weights.a.b": torch.arange(6.0).view(2, 3) / 7}),
        records=[{"step": 0, "eval/loss": 1 / 3}, {"step": completed, "train/loss": 0.1, "train/grad_norm": 2e-300}],
        figures={"time/step_seconds": 0.1},
        seconds={"train": 1.5},
        rankings={1: [SettingScore("a", 1 / 3, 3, False), SettingScore("b", 0.1, 2, True)]},
    )


def files_of(store: TrialStore, trial_id: str) -> list[Path]:
    return sorted(Path(store.uri, trial_id).glob("*.step-*"))


def test_a_saved_trial_reloads_bit_equal_keeping_two_states(tmp_path: Path) -> None:
    store = TrialStore(str(tmp_path))
    for completed in (3, 20, 100):
        store.save("t", saved_at(completed))
    assert len(files_of(store, "t")) == NUM_KEPT == 2
    found, spoiled = pickle.loads(pickle.dumps(store)).load("t")
    assert not spoiled
    expected = saved_at(100)
    assert torch.equal(found.state.tensors["weights.a.b"], expected.state.tensors["weights.a.b"])
    assert (found.state.completed, found.state.active) == (100, True)
    for field in ("records", "figures", "seconds", "rankings"):
        assert getattr(found, field) == getattr(expected, field)


@pytest.mark.parametrize("damage", ["cut", "one bit", "empty", "rubbish with a matching name"])
def test_a_damaged_state_falls_back_and_is_reported(tmp_path: Path, damage: str) -> None:
    store = TrialStore(str(tmp_path))
    for completed in (3, 20):
        store.save("t", saved_at(completed))
    latest = files_of(store, "t")[-1]
    content = bytearray(latest.read_bytes())
    if damage == "cut":
        latest.write_bytes(content[: len(content) // 2])
    elif damage == "one bit":
        content[content.index(struct.pack("<f", 1 / 7))] ^= 1
        latest.write_bytes(content)
    elif damage == "empty":
        latest.write_bytes(b"")
    else:
        rubbish = b"no tensors at all"
        latest.unlink()
        latest.with_name(f"000000001.step-20.{hashlib.sha256(rubbish).hexdigest()[:32]}.safetensors").write_bytes(
            rubbish
        )
    found, spoiled = store.load("t")
    assert found is not None
    assert found.state.completed == 3
    (told,) = spoiled
    assert "step 20" in told
    files_of(store, "t")[0].write_bytes(b"")
    found, spoiled = store.load("t")
    assert found is None
    assert len(spoiled) == 2


def test_a_mark_stays_until_the_trial_is_reopened(tmp_path: Path) -> None:
    store = TrialStore(str(tmp_path))
    assert store.ended() == set()
    store.save("t", saved_at(3))
    store.mark_ended("t")
    store.delete_states("t")
    assert store.ended() == {"t"}
    assert store.load("t") == (None, [])
    store.reopen(["t", "other"])
    assert store.ended() == set()


def test_what_is_saved_is_safetensors_alone(exact: Setup, tmp_path: Path) -> None:
    trials = [exact.trial("lora")]
    save_all(build_model(trials, exact.base()), trials, tmp_path)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors"}


def test_members_go_on_in_packs_of_other_members_and_ranks(exact: Setup, tmp_path: Path) -> None:
    trials = mixed_trials(exact)
    whole = whole_run(exact, trials, tmp_path)
    for part in (trials[::2], trials[1::2][:1]):
        continued = resume(exact, part, tmp_path)
        for member, trial in enumerate(part):
            before = trials.index(trial)
            for key in ("train/loss", "eval/loss"):
                ours, theirs = continued.curve(member, key), whole.curve(before, key)
                assert largest_difference(ours, {at: theirs[at] for at in ours}) <= 1e-10
            assert largest_difference(continued.weights(member), whole.weights(before)) <= 1e-10


@pytest.mark.parametrize("other", [("lora", 5), ("lora_fa", 3), ("vera", 3), ("frozen", 3)])
def test_another_trials_state_is_refused(exact: Setup, other: tuple[str, int]) -> None:
    state = take_member(build_model([exact.trial("lora", {"rank": 3})], exact.base()), 0)
    name, rank = other
    model = build_model([exact.trial(name, {"rank": rank})], exact.base())
    with pytest.raises(ValueError, match="the saved state belongs to another trial"):
        put_member(model, 0, state)
