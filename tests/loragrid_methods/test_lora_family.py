"""How LoRA's relatives relate to LoRA: LoRA+ at ratio 1, rsLoRA's scaling, LoRA-FA's frozen A, dropout per member."""

import math

import pytest
import torch
from torch import Tensor

from loragrid_methods.lora import LoRA
from loragrid_methods.stacks.adapter_stack import DrawClock
from loragrid_methods.stacks.draws import member_dropout, stable_seed
from tests.support.pack_training import Member, PackRun, TinyModel, largest_difference, small_method


def test_lora_plus_at_ratio_one_is_lora_to_the_bit() -> None:
    methods = [small_method("lora_plus", lr_ratio=1.0, alpha=5.0), small_method("lora", alpha=5.0)]
    plus, lora = (PackRun(TinyModel(), [Member(method=m, weight_decay=0.1, clip_norm=0.2)]) for m in methods)
    assert torch.equal(plus.train(12), lora.train(12))
    assert largest_difference(plus.member_tensors(0), lora.member_tensors(0)) == 0


def test_lora_plus_moves_and_decays_B_ratio_times_as_much() -> None:
    """The first step of AdamW is lr x (sign(g) + decay x weight): linear in the learning rate."""
    moved = []
    for name, fields in (("lora", {}), ("lora_plus", {"lr_ratio": 7.0})):
        run = PackRun(TinyModel(), [Member(method=small_method(name, **fields), weight_decay=0.1)])
        for stack in run.pack.stacks():
            stack.get_parameter("lora_B").data.fill_(0.3)
        before = run.member_tensors(0)
        run.step()
        moved.append({key: tensor - before[key] for key, tensor in run.member_tensors(0).items()})
    for key, tensor in moved[0].items():
        factor = 7.0 if key.endswith("lora_B") else 1.0
        assert (moved[1][key] - factor * tensor).abs().max().item() <= 1e-14, key


@pytest.mark.parametrize("name", ["lora", "lora_plus", "lora_fa", "lora_fa_projected"])
def test_the_scaling_is_alpha_over_rank_or_over_its_root(name: str) -> None:
    def scaling(**fields: float) -> float:
        method = small_method(name, **fields)
        assert isinstance(method, LoRA)
        return method.scaling

    assert scaling(rank=16, alpha=8.0) == 0.5
    assert scaling(rank=16, alpha=8.0, rslora=True) == 2.0


@pytest.mark.parametrize("name", ["lora_fa", "lora_fa_projected"])
def test_nothing_can_make_lora_fas_A_train(name: str) -> None:
    """PEFT's freeze is undone by disabling or reloading an adapter; a buffer has nothing to undo."""
    run = PackRun(TinyModel(), [Member(method=small_method(name)), Member(method=small_method(name), seed=1)])
    start = run.pack.state_tensors()
    drawn = {key: tensor.clone() for key, tensor in start.items() if key.endswith("lora_A")}
    assert drawn

    def trainable() -> set[str]:
        return {key for key, parameter in run.base.named_parameters() if parameter.requires_grad}

    expected = trainable()
    assert expected
    assert all(key.endswith("lora_B") for key in expected)
    run.step()
    with run.pack.disabled():
        run.base(input_ids=torch.zeros(2, 3, dtype=torch.long))
        assert trainable() == expected
    run.step()
    for mode in (False, True):
        run.pack.train(mode)
        run.base.train(mode)
        assert trainable() == expected
    run.base.eval()
    run.pack.after_load()
    run.step()
    for stack in run.pack.stacks():
        stack.requires_grad_(True)
        assert not stack.get_buffer("lora_A").requires_grad
        assert stack.get_buffer("lora_A").grad is None
    assert trainable() == expected
    run.step()
    run.pack.detach()
    assert not trainable()
    again = PackRun(run.base, run.members)
    again.step()
    assert trainable() == expected
    again.pack.detach()
    assert all(torch.equal(tensor, drawn[key]) for key, tensor in start.items() if key.endswith("lora_A"))


def masks(seeds: list[int], clock: DrawClock, layer: str = "q", probability: float = 0.4) -> Tensor:
    return member_dropout(torch.ones(len(seeds), 500, 8, dtype=torch.float64), probability, seeds, layer, clock)


def test_dropout_drops_its_share_and_keeps_the_mean() -> None:
    dropped = masks([0, 1], DrawClock())
    assert set(dropped.unique().tolist()) == {0.0, 1 / 0.6}
    # 4000 draws: five standard deviations are 0.04.
    assert (dropped == 0).double().mean((1, 2)).tolist() == pytest.approx([0.4, 0.4], abs=0.04)


def test_only_seed_layer_step_worker_and_micro_batch_change_masks() -> None:
    mask = masks([5], DrawClock(step=3, worker=1))[0]
    assert torch.equal(mask, masks([2, 5, 5], DrawClock(step=3, worker=1))[1])
    assert torch.equal(mask, masks([2, 5, 5], DrawClock(step=3, worker=1))[2])
    assert not torch.equal(mask, masks([6], DrawClock(step=3, worker=1))[0])
    assert not torch.equal(mask, masks([5], DrawClock(step=4, worker=1))[0])
    assert not torch.equal(mask, masks([5], DrawClock(step=3, worker=0))[0])
    assert not torch.equal(mask, masks([5], DrawClock(step=3, worker=1), layer="k")[0])
    micro_batches = [masks([5], DrawClock(step=3, worker=1, micro_batch=index))[0] for index in range(3)]
    assert torch.equal(mask, micro_batches[0])
    assert len({tuple(drawn.flatten().tolist()) for drawn in micro_batches}) == 3


def test_a_single_pass_draws_from_seed_layer_step_and_worker() -> None:
    generator = torch.Generator().manual_seed(stable_seed(5, "q", "dropout", 3, 1))
    kept = torch.rand(500, 8, generator=generator) >= 0.4
    assert torch.equal(masks([5], DrawClock(step=3, worker=1))[0], kept.double() / 0.6)


@pytest.mark.parametrize("name", ["lora", "lora_plus", "lora_fa", "lora_fa_projected"])
def test_dropout_acts_while_training_only(name: str) -> None:
    run = PackRun(TinyModel(), [Member(method=small_method(name, dropout=0.5), lr=0.05)])
    run.train(3)
    ids = torch.arange(6).view(1, 6)
    noisy = run.base(input_ids=ids).logits
    run.pack.clock.step += 1
    assert not torch.equal(noisy, run.base(input_ids=ids).logits)
    run.pack.train(False)
    quiet = run.base(input_ids=ids).logits
    run.pack.clock.step += 1
    assert torch.equal(quiet, run.base(input_ids=ids).logits)


def test_seeds_follow_from_their_parts_and_are_the_same_everywhere() -> None:
    assert stable_seed(0, "q", "lora_A") == 8403686422880423182
    assert 0 <= stable_seed("x") < 2**63
    assert len({stable_seed(*parts) for parts in ((0, 1), (1, 0), (0, 1, 0), (1,))}) == 4


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("lora", "rank", 0),
        ("lora", "alpha", 0.0),
        ("lora", "alpha", math.inf),
        ("lora_fa", "alpha", math.nan),
        ("lora", "dropout", 1.0),
        ("lora_fa_projected", "dropout", -0.1),
        ("lora_plus", "lr_ratio", 0.0),
        ("lora_plus", "lr_ratio", math.nan),
        ("lora_plus", "rank", -3),
        ("vera", "rank", 0),
        ("vera", "d_initial", math.inf),
        ("vera", "projection_seed", -1),
    ],
)
def test_impossible_hyperparameters_are_refused_by_name(name: str, field: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"{name}\.{field}: {value!r} is not allowed; allowed: "):
        small_method(name, **{field: value})
