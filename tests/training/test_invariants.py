"""Training invariants: every violation, injected for real, fails exactly the trials that it concerns."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from loragrid.training.assembly import build_model
from loragrid.training.invariants import InvariantChecks, InvariantError, base_sums, bit_sums
from loragrid.training.step import PackModel
from loragrid.trials.trial import Trial
from loragrid_methods import get_method, method_names
from tests.support.broken_invariants import FLIPPED_AFTER, first_stack, queue_with
from tests.support.queue_runs import assert_as_alone
from tests.support.small_packs import Setup, bit_equal, make_setup, mixed_trials, run_pack

STEPS = 8


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


@pytest.fixture(scope="module")
def llama(tiny_llama_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_llama_dir, chat_jsonl, "bfloat16")


@pytest.fixture(autouse=True)
def stores_that_pytest_cleans_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def flip_bit(tensor: Any, element: int, bit: int) -> None:
    """Flip one bit of one element (bit 0 is the lowest of its first byte)."""
    raw = tensor.detach().view(-1)[element : element + 1].view(torch.uint8)
    raw[bit // 8] ^= 1 << (bit % 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8])
@pytest.mark.parametrize("shape", [(1,), (3,), (7, 5), (16, 9)])
def test_a_checksum_changes_with_every_bit_and_reverts(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.arange(torch.Size(shape).numel()) % 13).to(dtype).view(shape)
    before, copy = bit_sums(tensor), tensor.clone()
    for element in range(tensor.numel()):
        for bit in range(8 * tensor.itemsize):
            flip_bit(tensor, element, bit)
            assert bit_sums(tensor) != before
            flip_bit(tensor, element, bit)
    assert bit_sums(tensor) == before
    assert torch.equal(tensor, copy)


@pytest.mark.parametrize("width", [1, 3, 4, 8])
def test_every_member_has_a_checksum_of_its_own(width: int) -> None:
    tensor = torch.linspace(-1, 1, 5 * 3 * width).view(5, 3, width)
    together = bit_sums(tensor, 5)
    assert torch.equal(together, torch.cat([bit_sums(member) for member in tensor]))
    flip_bit(tensor[2], 1, 9)
    assert (bit_sums(tensor, 5) != together).tolist() == [False, False, True, False, False]


def test_an_unaligned_tensor_has_the_checksum_of_its_values() -> None:
    whole = torch.arange(101, dtype=torch.bfloat16)
    for view in (whole[1:], whole[3:90], whole[::2], whole[:100].view(10, 10).mT):
        before = bit_sums(view)
        assert torch.equal(before, bit_sums(view.clone(memory_format=torch.contiguous_format)))
        flip_bit(whole, 6, 3)
        assert not torch.equal(before, bit_sums(view))
        flip_bit(whole, 6, 3)


def checks_of(setup: Setup, trials: list[Trial]) -> tuple[PackModel, InvariantChecks]:
    model = build_model(trials, setup.base())
    return model, InvariantChecks(model)


@pytest.mark.parametrize("name", method_names())
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_checks_pass_and_change_nothing_in_an_undisturbed_run(setup: Setup, llama: Setup, name: str, kind: str) -> None:
    chosen = setup if kind == "gpt2" else llama
    made: list[InvariantChecks] = []
    found: list[dict[int, str]] = []

    def checked(model: PackModel) -> Callable[[], object]:
        made.append(InvariantChecks(model))
        return lambda: found.append(made[0].check())

    with_checks = run_pack(chosen, [chosen.trial(name)], check=checked, check_every=1)
    without = run_pack(chosen, [chosen.trial(name)])
    assert found == [{}] * STEPS
    assert with_checks.records == without.records
    assert bit_equal(with_checks.weights(0), without.weights(0))


def test_a_mixed_pack_of_padded_ranks_passes(setup: Setup) -> None:
    found: list[dict[int, str]] = []

    def checked(model: PackModel) -> Callable[[], object]:
        checks = InvariantChecks(model)
        return lambda: found.append(checks.check())

    run_pack(setup, mixed_trials(setup), check=checked, check_every=3)
    assert found == [{}] * 4


def test_checks_run_first_last_and_at_their_interval(setup: Setup) -> None:
    for every, expected in ((None, [1, 8]), (3, [1, 3, 6, 8]), (100, [1, 8])):
        seen: list[int] = []
        run_pack(
            setup,
            [setup.trial("lora")],
            check=lambda model, seen=seen: lambda: seen.append(model.completed),  # type: ignore[misc]
            check_every=every,
        )
        assert seen == expected


WRONG_SETS: dict[str, tuple[str, Callable[[PackModel], object], str]] = {
    "a frozen A requires a gradient": (
        "lora_fa",
        lambda model: first_stack(model).lora_A.requires_grad_(True),
        "lora_A' requires a gradient",
    ),
    "VeRA's projections ask for a gradient": (
        "vera",
        lambda model: first_stack(model).get_buffer("projections.vera_A").requires_grad_(True),
        "projections.vera_A' requires a gradient",
    ),
    "a weight of the base requires a gradient": (
        "lora",
        lambda model: model.base.get_input_embeddings().weight.requires_grad_(True),
        "the base's weight 'transformer.wte.weight' requires a gradient",
    ),
    "a trained tensor is switched off": (
        "lora",
        lambda model: first_stack(model).get_parameter("lora_B").requires_grad_(False),
        "lora_B' should train but requires no gradient",
    ),
    "a weight of a base that trains is switched off": (
        "full",
        lambda model: model.base.get_input_embeddings().weight.requires_grad_(False),
        "the base's weight 'transformer.wte.weight' requires no gradient",
    ),
    "the optimizer loses a block": (
        "lora",
        lambda model: model.optimizer.blocks.pop(),
        "the optimizer does not hold",
    ),
    "a parameter is moved away from the optimizer": (
        "lora",
        lambda model: setattr(first_stack(model).lora_A, "data", first_stack(model).lora_A.detach().clone()),
        "the optimizer does not hold",
    ),
    "a gradient is moved away from the optimizer": (
        "lora",
        lambda model: setattr(first_stack(model).lora_A, "grad", torch.zeros_like(first_stack(model).lora_A)),
        "is not the one that the optimizer reads",
    ),
}


@pytest.mark.parametrize("what", WRONG_SETS)
def test_an_undeclared_trainable_set_is_found(setup: Setup, what: str) -> None:
    name, spoil, reason = WRONG_SETS[what]
    model, checks = checks_of(setup, [setup.trial(name)])
    assert checks.check() == {}
    spoil(model)
    with pytest.raises(InvariantError, match=rf"^invariant violated: .*{reason}"):
        checks.check()


def test_a_method_that_trains_more_than_it_declares_is_found(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    from loragrid_methods.lora import LoRA
    from loragrid_methods.lora_fa import LoRAFA

    monkeypatch.setattr(LoRAFA, "build_stacks", LoRA.__dict__["build_stacks"])
    _, checks = checks_of(setup, [setup.trial("lora_fa")])
    with pytest.raises(InvariantError, match=r"lora_fa trains \d+ numbers and declares \d+"):
        checks.check()


@pytest.mark.parametrize("name", [name for name in method_names() if get_method(name).packable])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_a_flipped_bit_in_any_base_weight_is_named(setup: Setup, llama: Setup, name: str, dtype: str) -> None:
    chosen = setup if dtype == "float64" else llama
    model, checks = checks_of(chosen, [chosen.trial(name)])
    in_stacks = {id(p) for stack in model.pack.stacks() for p in stack.parameters()}
    weights = {n: p for n, p in model.base.named_parameters() if id(p) not in in_stacks}
    assert len(weights) > 10
    for name_of_weight, weight in weights.items():
        flip_bit(weight.data, weight.numel() - 1, 0)
        with pytest.raises(InvariantError, match=rf"frozen weight '{name_of_weight.replace('.base_layer.', '.')}'"):
            checks.check()
        flip_bit(weight.data, weight.numel() - 1, 0)
    assert checks.check() == {}


def test_a_members_flipped_frozen_bit_concerns_it_alone(setup: Setup) -> None:
    model, checks = checks_of(setup, [setup.trial("lora_fa", seed=seed) for seed in range(3)])
    stack = first_stack(model)
    flip_bit(stack.lora_A.data[1], 5, 17)
    found = checks.check()
    assert found.keys() == {1}
    assert found[1].startswith("invariant violated: the frozen tensor 'transformer.h.0.")
    assert found[1].endswith("lora_A' has changed")
    assert checks.check() == {}


def test_a_bit_in_veras_projections_is_every_members_violation(setup: Setup) -> None:
    model, checks = checks_of(setup, [setup.trial("vera", seed=seed) for seed in range(2)])
    flip_bit(first_stack(model).get_buffer("projections.vera_B"), 3, 3)
    with pytest.raises(InvariantError, match=r"frozen tensor '.*vera_B' has changed"):
        checks.check()


def test_delta_loras_reference_may_change_and_its_scaling_may_not(setup: Setup) -> None:
    model, checks = checks_of(setup, [setup.trial("delta_lora")])
    flip_bit(first_stack(model).get_buffer("reference_A"), 3, 3)
    assert checks.check() == {}
    flip_bit(first_stack(model).get_buffer("delta_scale"), 0, 3)
    assert "delta_scale" in checks.check()[0]


def test_a_base_changed_before_the_pack_is_found(setup: Setup) -> None:
    base = setup.base()
    loaded = base_sums(base)
    flip_bit(base.get_input_embeddings().weight.data, 11, 2)
    with pytest.raises(InvariantError, match=r"frozen weight 'transformer\.wte\.weight' has changed"):
        InvariantChecks(build_model([setup.trial("vera")], base), loaded).check()


def test_a_tensor_without_gradient_is_found_from_step_two(setup: Setup) -> None:
    found: list[dict[int, str]] = []

    def starve(model: PackModel) -> None:
        for stack in list(model.pack.stacks()):
            stack.get_parameter("lora_A").register_hook(lambda gradient: _without_member(gradient, 1))

    def checked(model: PackModel) -> Callable[[], object]:
        checks = InvariantChecks(model)
        return lambda: found.append(checks.check())

    run_pack(setup, [setup.trial("lora", seed=s) for s in range(3)], prepare=starve, check=checked, check_every=1)
    assert found[0] == {}
    assert found[1] == {1: "invariant violated: 'lora_A' should train but never had a gradient"}
    assert found[2:] == [{}] * (STEPS - 2)


@pytest.mark.parametrize("tensor", ["lora_A", "lora_B"])
def test_a_single_layer_without_gradient_is_found_and_named(setup: Setup, tensor: str) -> None:
    found: list[dict[int, str]] = []

    def starve(model: PackModel) -> None:
        layer = model.pack.member_stacks(0)[0]["transformer.h.1.mlp.c_fc"]
        layer.get_parameter(tensor).register_hook(lambda gradient: _without_member(gradient, 1))

    def checked(model: PackModel) -> Callable[[], object]:
        checks = InvariantChecks(model)
        return lambda: found.append(checks.check())

    run_pack(setup, [setup.trial("lora", seed=s) for s in range(2)], prepare=starve, check=checked, check_every=1)
    assert found[:2] == [{}, {}]
    what = f"'transformer.h.1.mlp.c_fc.{tensor}' should train but never had a gradient"
    if tensor == "lora_B":  # without B, the layer's A has no gradient either; the first in the order of blocks is named
        assert "transformer.h.1.mlp.c_fc.lora_" in found[2][1]
    else:
        assert found[2] == {1: f"invariant violated: {what}"}
    assert found[2].keys() == {1}


def _without_member(gradient: Tensor, member: int) -> Tensor:
    gradient = gradient.clone()
    gradient[member] = 0
    return gradient


@pytest.mark.parametrize("isolate_failures", [True, False])
@pytest.mark.parametrize("check_every", [1, None])
def test_a_flipped_base_bit_fails_the_pack_and_reloads(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, isolate_failures: bool, check_every: int | None
) -> None:
    settings: dict[str, Any] = {"measure_steps": 0, "check_every": check_every, "report_every": 1}
    first = [setup.trial(name, **settings) for name in ("lora", "lora_fa", "vera")]
    second = [setup.trial("lora", seed=1, **settings)]
    seen = queue_with(
        setup,
        monkeypatch,
        [first, second],
        lambda model: flip_bit(model.base.get_input_embeddings().weight.data, 7, 1),
        isolate_failures=isolate_failures,
    )
    for trial in first:
        end = seen.ended[trial.trial_id]
        assert (end.status, end.reason) == (
            "FAILED",
            "invariant violated: the frozen weight 'transformer.wte.weight' has changed",
        )
        assert max(seen.records(trial)) == (FLIPPED_AFTER - 1 if check_every else STEPS - 1)
    assert seen.ended[second[0].trial_id].status == "FINISHED"
    assert seen.num_loaded() == 2
    assert_as_alone(setup, seen, second[0])
    assert seen.exported == {second[0].trial_id}


def test_a_spoiled_member_fails_without_affecting_others(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [setup.trial("lora_fa", seed=seed, measure_steps=0, check_every=1) for seed in range(3)]
    seen = queue_with(
        setup,
        monkeypatch,
        [trials],
        lambda model: flip_bit(first_stack(model).lora_A.data[1], 0, 5),
    )
    assert seen.ended[trials[1].trial_id].status == "FAILED"
    assert seen.ended[trials[1].trial_id].reason.startswith("invariant violated: the frozen tensor")
    for trial in (trials[0], trials[2]):
        assert seen.ended[trial.trial_id].status == "FINISHED"
        assert_as_alone(setup, seen, trial)
    assert seen.num_loaded() == 1


def test_no_checks_at_zero_and_none_of_trained_bases(setup: Setup, monkeypatch: pytest.MonkeyPatch) -> None:
    def flip(model: PackModel) -> None:
        flip_bit(model.base.get_input_embeddings().weight.data, 7, 1)

    unchecked = setup.trial("lora", measure_steps=0, check_every=0)
    assert queue_with(setup, monkeypatch, [[unchecked]], flip).ended[unchecked.trial_id].status == "FINISHED"
    full = setup.trial("full", lr=1e-3, measure_steps=0, check_every=1)
    assert queue_with(setup, monkeypatch, [[full]], flip).ended[full.trial_id].status == "FINISHED"
