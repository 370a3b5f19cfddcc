"""Members of a pack do not affect each other: each trains as in a pack of one, whatever else the pack holds."""

import math

import pytest
import torch

from loragrid_methods import get_method, method_names
from loragrid_methods.stacks.pack import AdapterPack, member_order
from tests.support.pack_training import Member, PackRun, TinyModel, in_order, largest_difference, small_method

PACKABLE = [name for name in method_names() if get_method(name).packable]
SAME_DRAW = [name for name in PACKABLE if get_method(name).draws_from_seed]
PADDED = [name for name in PACKABLE if {"lora_A", "lora_B"} & set(get_method(name).trained)]


def mixed_members() -> list[Member]:
    """Two members of every packable method, and more of those with settings that could mix; all settings differ."""
    methods = [small_method(name) for name in PACKABLE for _ in range(2)]
    methods += [
        small_method("lora", rank=2, target_modules=("q_proj", "v_proj")),
        small_method("lora", rank=7, rslora=True, alpha=3.0),
        small_method("lora", rank=11),
        small_method("lora", rank=3, dropout=0.3),
        small_method("lora_plus", rank=1, lr_ratio=5.0, target_modules=("q_proj", "v_proj")),
        small_method("lora_plus", rank=6, lr_ratio=2.0),
        small_method("lora_fa", rank=3, target_modules=r".*blocks\.1\.(up|down)_proj"),
        small_method("lora_fa", rank=2),
        small_method("lora_fa_projected", rank=3),
        small_method("vera", rank=9),
        small_method("vera", d_initial=0.3),
        small_method("vera", rank=4, projection_seed=5, d_initial=0.3),
        small_method("vera", rank=4, target_modules=("k_proj",)),
        small_method("delta_lora", rank=2, start_step=4, delta_scale=0.5),
        small_method("delta_lora", rank=5, start_step=0, alpha=2.0),
    ]
    members = [
        Member(
            method=method,
            seed=index % 4,
            lr=0.004 * (1 + index % 5),
            weight_decay=(0.0, 0.1, 0.02)[index % 3],
            clip_norm=(math.inf, 0.05, 0.5, 2.0)[index % 4],
        )
        for index, method in enumerate(methods)
    ]
    return in_order(members)


def test_a_pack_of_all_methods_trains_each_as_if_alone() -> None:
    members = mixed_members()
    packed = PackRun(TinyModel(), members)
    losses = packed.train(10)
    assert {member.method.name for member in members} == set(PACKABLE)
    for index, member in enumerate(members):
        alone = PackRun(TinyModel(), [member])
        assert (alone.train(10)[:, 0] - losses[:, index]).abs().max().item() <= 1e-10, member
        assert largest_difference(packed.member_tensors(index), alone.member_tensors(0)) <= 1e-10, member


def test_members_start_at_the_bases_loss_and_only_frozen_stay() -> None:
    members = mixed_members()
    losses = PackRun(TinyModel(), members).train(3)
    for index, member in enumerate(members):
        frozen = PackRun(TinyModel(), [Member(method=small_method("frozen"), seed=member.seed)]).train(3)
        # Dropout acts on the input of B = 0, so the first loss is the base's there too.
        assert (losses[0, index] - frozen[0, 0]).abs().item() <= 1e-12
        moved = (losses[2, index] - frozen[2, 0]).abs().item() > 1e-6
        assert moved != (member.method.name == "frozen"), member


@pytest.mark.parametrize("poison", ["weights", "gradients"])
def test_a_nan_in_one_member_changes_no_bit_of_others(poison: str) -> None:
    members = mixed_members()
    ill = next(index for index, member in enumerate(members) if member.method.name == "lora" and index > 0)
    healthy, poisoned = PackRun(TinyModel(), members), PackRun(TinyModel(), members)
    for run in (healthy, poisoned):
        run.train(2)
        run.backward()
    stacks, index = poisoned.pack.member_stacks(ill)
    for stack in stacks.values():
        parameter = stack.get_parameter("lora_B")
        spoiled = parameter.data if poison == "weights" else parameter.grad
        assert spoiled is not None
        spoiled[index] = math.nan
    for run in (healthy, poisoned):
        run.update()
        run.train(3)
    assert all(tensor.isnan().any() for name, tensor in poisoned.member_tensors(ill).items() if "lora_B" in name)
    for member in range(len(members)):
        if member != ill:
            theirs = poisoned.member_tensors(member)
            for name, tensor in healthy.member_tensors(member).items():
                assert torch.equal(tensor, theirs[name]), (members[member], name)


def test_an_inactive_member_keeps_its_bits_even_with_nan_gradients() -> None:
    members = mixed_members()
    run = PackRun(TinyModel(), members)
    run.train(2)
    stopped = [index for index in range(len(members)) if index % 3 == 0]
    before = [run.member_tensors(index) for index in range(len(members))]
    active = torch.tensor([index not in stopped for index in range(len(members))])
    for _ in range(2):
        run.backward()
        for block in run.pack.blocks:
            block.gradients[~active[block.members]] = math.nan
        run.update(active)
    for index, member in enumerate(members):
        after = run.member_tensors(index)
        trains = member.method.trained
        stacks, _ = run.pack.member_stacks(index)
        written = {name for stack in stacks.values() for name in stack.written_buffers}
        for name, tensor in after.items():
            if index in stopped and name.rpartition(".")[2] not in written:
                assert torch.equal(tensor, before[index][name]), (member, name)
        if index not in stopped and trains:
            assert largest_difference(before[index], after) > 1e-5
            assert all(tensor.isfinite().all() for tensor in after.values())


def test_padded_entries_stay_exactly_zero_and_get_no_moments() -> None:
    members = [
        Member(method=small_method(name, rank=rank), seed=seed, weight_decay=0.1)
        for name in PADDED
        for seed, rank in enumerate((2, 5, 3))
    ]
    run = PackRun(TinyModel(), in_order(members))
    run.train(6)
    for stack in run.pack.stacks():
        for name, axis in stack.rank_axes.items():
            for member, rank in enumerate(stack.ranks):
                whole = stack.state_dict()[name][member]
                padding = whole.narrow(axis - 1, rank, max(stack.ranks) - rank)
                assert padding.count_nonzero() == 0, name
                assert stack.without_padding(name, whole, member).count_nonzero() > 0, name
    for block, first, second in zip(
        run.pack.blocks, run.optimizer.first_moments, run.optimizer.second_moments, strict=True
    ):
        for moments in (first, second):
            # A zero moment where the weight is zero: nothing that a later step could move the padding with.
            assert moments[block.weights == 0].count_nonzero() == 0


@pytest.mark.parametrize("name", SAME_DRAW)
def test_one_seed_draws_one_A_in_every_method_and_pack(name: str) -> None:
    def draw(members: list[tuple[str, int, int]], wanted: int) -> dict[str, torch.Tensor]:
        pack = AdapterPack(TinyModel(), [(small_method(n, rank=r), seed) for n, r, seed in members])
        stacks, index = pack.member_stacks(wanted)
        return {layer: stack.member_tensors(index)["lora_A"] for layer, stack in stacks.items()}

    reference = draw([("lora", 4, 3)], 0)
    alone, packed = draw([(name, 4, 3)], 0), draw([(name, 6, 8), (name, 4, 3), (name, 2, 3)], 1)
    assert reference.keys() == alone.keys() == packed.keys()
    for layer, a in reference.items():
        assert torch.equal(a, alone[layer])
        assert torch.equal(a, packed[layer])
        bound = 1 / math.sqrt(a.shape[1])
        assert 0.5 * bound < a.abs().max() <= bound
    other_seed = draw([(name, 4, 4)], 0)
    assert not any(torch.equal(a, other_seed[layer]) for layer, a in reference.items())
    layers = list(reference.values())
    assert not torch.equal(layers[0], layers[1]), "every layer has a draw of its own"


@pytest.mark.parametrize("name", SAME_DRAW)
def test_only_ranks_up_to_16_are_padded_fourfold_or_more(name: str) -> None:
    ranks = (1, 2, 8, 16, 17, 64, 65)
    pack = AdapterPack(TinyModel(), [(small_method(name, rank=rank), 0) for rank in ranks])
    stacks = [next(iter(stacks.values())).ranks for _, stacks in pack.groups]
    assert stacks == [(1, 2, 8, 16), (17, 64), (65,)]
    assert all(max(group) < 4 * min(group) for group in stacks[1:])


def test_a_pack_of_two_refuses_methods_that_write_the_base() -> None:
    with pytest.raises(ValueError, match="full writes the base"):
        AdapterPack(TinyModel(), [(small_method("full"), 0), (small_method("lora"), 0)])


def test_member_order_groups_equal_keys_and_keeps_all_else() -> None:
    methods = [small_method(name) for name in ("lora", "vera", "lora_plus", "frozen", "vera", "lora")]
    assert member_order(methods) == [0, 2, 5, 1, 4, 3]
