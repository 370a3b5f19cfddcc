"""A pack that is saved and continued in a fresh process's place ends with the same bits."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from loragrid.assembly import build_model
from loragrid.checkpoint import save_checkpoint
from loragrid.grid import Trial
from loragrid.member_state import put_member, take_member
from loragrid.training import PackModel, Report
from tests.loragrid.small_packs import (
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
    save_checkpoint({trial.trial_id: take_member(model, member) for member, trial in enumerate(trials)}, folder)


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


def test_a_mixed_pack_of_all_packable_methods_goes_on_to_the_bit(setup: Setup, tmp_path: Path) -> None:
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


def test_a_member_that_diverged_before_the_checkpoint_stays_so_and_the_others_go_on(
    exact: Setup, tmp_path: Path
) -> None:
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


def test_a_checkpoint_is_safetensors_and_json_alone(exact: Setup, tmp_path: Path) -> None:
    trials = [exact.trial("lora")]
    save_all(build_model(trials, exact.base()), trials, tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


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
    with pytest.raises(ValueError, match="the saved state is another trial's"):
        put_member(model, 0, state)
