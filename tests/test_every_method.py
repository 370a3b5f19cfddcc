"""The contract of a method, tested for every discovered method; a new file is included automatically."""

import ast
import bisect
import copy
import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from loragrid_methods import Card, get_method, method_names
from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.low_rank_stack import LowRankStack
from loragrid_methods.stacks.pack import AdapterPack
from loragrid_methods.stacks.peft_format import layer_tensors, peft_adapter
from tests.support.pack_training import Member, PackRun, TinyModel, in_order, largest_difference, small_method

pytestmark = pytest.mark.parametrize("name", method_names())


def members_of(name: str, count: int = 3) -> list[Member]:
    """Members of one method with their own seeds, ranks and settings; one only where the method takes no other."""
    ranks = [{"rank": rank} if "rank" in get_method(name).field_names() else {} for rank in (3, 5, 2)]
    members = [
        Member(
            method=small_method(name, **fields), seed=seed, lr=0.01 * (1 + seed), weight_decay=0.1 * seed, clip_norm=1.0
        )
        for seed, fields in enumerate(ranks)
    ]
    return in_order(members[: count if get_method(name).packable else 1])


def logits_of(base: TinyModel, num_members: int) -> torch.Tensor:
    ids = torch.arange(12).view(2, 6) % 20
    with torch.no_grad():
        logits: torch.Tensor = base(ids.repeat(num_members, 1)).logits
    return logits


def test_the_file_has_the_methods_name_and_cites_its_source(name: str) -> None:
    method = get_method(name)
    assert method.name == name
    source = Path(inspect.getfile(method))
    assert source.stem == name
    docstring = ast.get_docstring(ast.parse(source.read_text(encoding="utf-8"))) or ""
    assert re.match(r"[A-Z].*[.:]", docstring)
    assert method.card.arxiv in docstring


def test_the_card_is_complete(name: str) -> None:
    card = get_method(name).card
    assert isinstance(card, Card)
    may_be_empty = {"authors", "arxiv"}
    for field in dataclasses.fields(card):
        assert getattr(card, field.name) or field.name in may_be_empty, field.name
    assert bool(card.arxiv) == bool(card.authors)
    assert re.fullmatch(r"(\d{4}\.\d{5})?", card.arxiv)
    markdown = card.to_markdown()
    for field in dataclasses.fields(card):
        assert str(getattr(card, field.name)) in markdown
    assert markdown.startswith(f"## {card.title}\n")
    assert f"({card.authors}, {card.year}, arXiv {card.arxiv})" in markdown or f"({card.year})" in markdown


def test_hyperparameters_have_defaults_are_frozen_and_make_equal_methods_equal(name: str) -> None:
    method = get_method(name)()
    assert method == get_method(name)()
    assert hash(method) == hash(get_method(name)())
    assert method.hyperparameters() == {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    assert method.hyperparameters() == get_method(name).defaults()
    assert json.loads(json.dumps(method.hyperparameters())) == method.hyperparameters()
    for field in method.field_names():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method, field, getattr(method, field))
    with pytest.raises(TypeError):
        small_method(name, no_such_hyperparameter=1)
    hash(method.stack_key())


def test_attach_keeps_the_output_and_detach_restores_the_base(name: str) -> None:
    for members in (members_of(name, 1), members_of(name)):
        base = TinyModel()
        before, modules = logits_of(base, len(members)), dict(base.named_modules())
        pack = AdapterPack(base, [(m.method, m.seed) for m in members], output_layer=base.head, dtype=torch.float64)
        pack.train()
        assert torch.equal(logits_of(base, len(members)), before)
        pack.detach()
        assert dict(base.named_modules()) == modules
        assert torch.equal(logits_of(base, len(members)), before)


def test_disabled_gives_the_bases_output_for_any_number_of_rows(name: str) -> None:
    if not get_method(name).packable:
        pytest.skip("writes the base, so there is no other output to give")
    members = members_of(name)
    run = PackRun(TinyModel(), members)
    run.train(3)
    before = logits_of(TinyModel(), 1)
    trained = logits_of(run.base, len(members))
    with run.pack.disabled():
        assert torch.equal(logits_of(run.base, 1), before)
    assert torch.equal(logits_of(run.base, len(members)), trained)


def test_everything_that_trains_changes_and_nothing_else_does(name: str) -> None:
    run = PackRun(TinyModel(), members_of(name))
    base = {key: tensor.clone() for key, tensor in TinyModel().state_dict().items()}
    before = [parameter.detach().clone() for parameter in run.pack.trainable_parameters()]
    assert bool(before) == (run.members[0].method.num_parameters(run.pack.layers, 1).trainable > 0)
    run.train(3)
    for parameter, start in zip(run.pack.trainable_parameters(), before, strict=True):
        assert parameter.isfinite().all()
        for member in range(len(start)):
            assert not torch.equal(parameter[member], start[member])
    run.pack.detach()
    unchanged = [torch.equal(tensor, base[key]) for key, tensor in run.base.state_dict().items()]
    assert all(unchanged) == get_method(name).packable
    if get_method(name).packable:
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in run.base.parameters())


def test_every_trainable_entry_has_exactly_one_block_and_learning_rate(name: str) -> None:
    members = members_of(name)
    pack = PackRun(TinyModel(), members).pack
    first_entries = [0]
    for block in pack.blocks:
        # Every entry of every block gets a number of its own, by which the stacks' entries are told apart.
        numbers = first_entries[-1] + torch.arange(block.weights.numel(), dtype=torch.float64)
        block.weights.copy_(numbers.view_as(block.weights))
        first_entries.append(first_entries[-1] + block.weights.numel())
    seen: list[float] = []
    for start, stacks in pack.groups:
        for stack in stacks.values():
            for key, parameter in stack.named_parameters():
                entries = parameter.detach().flatten().tolist()
                (index,) = {bisect.bisect_right(first_entries, entry) - 1 for entry in entries}
                block = pack.blocks[index]
                assert (block.name, block.start) == (key, start)
                assert block.multiplier.squeeze(1).tolist() == [
                    member.method.learning_rate_multiplier(key) for member in members[block.members]
                ]
                assert parameter.grad is not None
                assert parameter.grad.untyped_storage().data_ptr() == pack.gradient_buffer.untyped_storage().data_ptr()
                seen += entries
    assert sorted(seen) == list(range(pack.gradient_buffer.numel()))


def test_the_counts_are_exact(name: str) -> None:
    (member,) = members_of(name, 1)
    base = TinyModel()
    num_base_parameters = sum(parameter.numel() for parameter in base.parameters())
    pack = PackRun(base, [member]).pack
    count = member.method.num_parameters(pack.layers, num_base_parameters)
    assert count.trainable == sum(parameter.numel() for parameter in pack.trainable_parameters())
    assert count.shared <= count.stored
    if member.method.packable:
        held = [tensor for stack in pack.stacks() for tensor in (*stack.parameters(), *stack.buffers())]
        assert count.stored + count.working == sum({tensor.data_ptr(): tensor.numel() for tensor in held}.values())
    if member.method.peft_config():
        _, tensors = peft_adapter(pack, 0, "base")
        assert count.stored == sum(tensor.numel() for tensor in tensors.values())


def test_members_of_one_method_train_packed_as_they_do_alone(name: str) -> None:
    members = members_of(name)
    packed = PackRun(TinyModel(), members)
    losses = packed.train(8)
    for index, member in enumerate(members):
        alone = PackRun(TinyModel(), [member])
        assert (alone.train(8)[:, 0] - losses[:, index]).abs().max().item() <= 1e-10
        assert largest_difference(packed.member_tensors(index), alone.member_tensors(0)) <= 1e-10


def test_equal_seeds_give_equal_bits_and_other_seeds_other_bits(name: str) -> None:
    (member,) = members_of(name, 1)
    first, second = PackRun(TinyModel(), [member]), PackRun(TinyModel(), [member])
    torch.manual_seed(123)
    assert torch.equal(first.train(3), second.train(3))
    other = PackRun(TinyModel(), [dataclasses.replace(member, seed=member.seed + 1)])
    assert not torch.equal(other.train(3), PackRun(TinyModel(), [member]).train(3))


def test_what_trains_and_what_depends_on_the_seed_is_declared(name: str) -> None:
    (member,) = members_of(name, 1)
    method = get_method(name)
    starts = [PackRun(TinyModel(), [dataclasses.replace(member, seed=seed)]) for seed in (0, 1)]
    for stack in starts[0].pack.stacks():
        assert {key for key, _ in stack.named_parameters()} == set(method.trained)
    assert bool(method.trained) == any(True for _ in starts[0].pack.stacks())
    same = [
        torch.equal(tensor, starts[1].member_tensors(0)[key]) for key, tensor in starts[0].member_tensors(0).items()
    ]
    assert all(same) == (not method.draws_from_seed)


def test_a_stack_declares_its_term_and_what_it_reads(name: str) -> None:
    run = PackRun(TinyModel(), members_of(name))
    for layer in run.pack.adapted.values():
        for stack in layer.stacks:
            assert isinstance(stack, AdapterStack)
            declared = type(stack).forward_with_base is not AdapterStack.forward_with_base
            assert stack.needs_base_output == declared
            # The engine may compute a term in another way; a stack must not compute it at all.
            assert not isinstance(stack, LowRankStack) or type(stack).forward is LowRankStack.forward


def test_building_a_pack_leaves_the_global_random_state_alone(name: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    base = TinyModel()
    torch.manual_seed(5)
    PackRun(base, members_of(name)).train(1)
    assert torch.equal(torch.rand(3), expected)


def test_untrained_tensors_are_buffers_and_survive_requires_grad(name: str) -> None:
    run = PackRun(TinyModel(), members_of(name))
    before = {id(parameter) for parameter in run.pack.trainable_parameters()}
    for stack in run.pack.stacks():
        assert isinstance(stack, AdapterStack)
        assert all(parameter.requires_grad for parameter in stack.parameters())
        stack.requires_grad_(False)
        stack.requires_grad_(True)
        assert not any(buffer.requires_grad for buffer in stack.buffers())
    run.train(2)
    assert {id(parameter) for parameter in run.pack.trainable_parameters()} == before


def test_a_bfloat16_base_trains_with_float32_adapters(name: str) -> None:
    members = [dataclasses.replace(member, lr=1e-3) for member in members_of(name)]
    run = PackRun(TinyModel(torch.bfloat16), members, dtype=torch.float32)
    assert all(parameter.dtype == torch.float32 for parameter in run.pack.trainable_parameters())
    losses = run.train(4)
    exact = PackRun(TinyModel(), members).train(4)
    assert losses.isfinite().all()
    # bfloat16 keeps 8 bits: losses near 3 agree to a few hundredths.
    assert (losses - exact).abs().max().item() < 0.06


def test_the_export_names_only_what_pefts_configuration_knows(name: str) -> None:
    config: dict[str, Any] = copy.deepcopy(get_method(name)().peft_config())
    if not config:
        pytest.skip("no adapter to export")
    known = PEFT_TYPE_TO_CONFIG_MAPPING[config.pop("peft_type")]
    assert config.keys() <= {field.name for field in dataclasses.fields(known)}
    assert {"r", "target_modules"} <= config.keys()


def test_a_method_merges_its_own_adapters_and_refuses_others(name: str) -> None:
    """That the merged weight computes what the member does is in `loragrid_methods/test_export.py`."""
    (member,) = members_of(name, 1)
    method = get_method(name)
    if not method().peft_config():
        with pytest.raises(ValueError, match=f"{name} has no adapter to merge"):
            method.merge(torch.zeros(2, 2), {"peft_type": "LORA"}, {})
        return
    run = PackRun(TinyModel(), [member])
    run.train(3)
    config, tensors = peft_adapter(run.pack, 0, "base")
    weight = run.pack.adapted["blocks.0.q_proj"].base_weight.dense().double()
    own = layer_tensors(tensors)["blocks.0.q_proj"]
    merged = method.merge(weight, config, own)
    assert merged.shape == weight.shape
    assert not torch.equal(merged, weight)
    with pytest.raises(ValueError, match=r"peft_type: 'IA3' cannot be merged by this method"):
        method.merge(weight, config | {"peft_type": "IA3"}, own)
    with pytest.raises(ValueError, match=r"use_nonsense: True cannot be merged by this method"):
        method.merge(weight, config | {"use_nonsense": True}, own)
    with pytest.raises(ValueError, match=r"tensor 'nonsense' cannot be merged by this method"):
        method.merge(weight, config, own | {"nonsense": weight})
