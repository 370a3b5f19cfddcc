"""Full fine-tuning through the pack is `torch.optim.AdamW` on the base, and loses no small update to bfloat16."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from loragrid_methods import LayerShape, get_method
from loragrid_methods.full import BaseStack, decayed_names
from tests.support import odd_bases
from tests.support.odd_bases import OddBase
from tests.support.pack_training import (
    Member,
    PackRun,
    TinyModel,
    decay_slowly,
    next_token_losses,
    small_method,
    token_ids,
)

FULL = Member(method=small_method("full"), lr=0.01, weight_decay=0.1, clip_norm=0.5)


def trainers_decayed_names(model: nn.Module) -> list[str]:
    """The parameters that transformers' Trainer decays; the method uses no state of the Trainer."""
    names: list[str] = transformers.Trainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    return names


def train_with_torch(model: TinyModel, member: Member, num_steps: int) -> list[float]:
    """`torch.optim.AdamW` straight on the model's own parameters, in the groups of transformers' Trainer."""
    parameters, decayed = list(model.parameters()), trainers_decayed_names(model)
    optimizer = torch.optim.AdamW(
        [
            {
                "params": [
                    parameter for name, parameter in model.named_parameters() if (name in decayed) == is_decayed
                ],
                "weight_decay": member.weight_decay if is_decayed else 0.0,
            }
            for is_decayed in (True, False)
        ],
        lr=member.lr,
        foreach=False,
    )
    losses = []
    for step in range(num_steps):
        ids = token_ids(model, member.seed, step)
        loss = next_token_losses(model(ids).logits, ids, 1).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, member.clip_norm, foreach=False)
        for group in optimizer.param_groups:
            group["lr"] = member.lr * decay_slowly(step)
        optimizer.step()
        losses.append(loss.item())
    return losses


# Adam divides by the root of the gradients' squares: where those are near epsilon, float32 rounding is enlarged.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)], ids=str)
def test_full_on_a_base_of_adapter_type_is_torchs_adamw(dtype: torch.dtype, tolerance: float) -> None:
    base, reference, start = TinyModel(dtype), TinyModel(dtype), TinyModel(dtype)
    run = PackRun(base, [FULL], dtype=dtype)
    losses = run.train(20)[:, 0].tolist()
    expected = train_with_torch(reference, FULL, 20)
    assert losses == pytest.approx(expected, rel=tolerance)
    for (name, ours), theirs, before in zip(
        base.named_parameters(), reference.parameters(), start.parameters(), strict=True
    ):
        assert (ours - theirs).abs().max().item() <= tolerance, name
        assert (ours - before).abs().max().item() > 0.01, name


@pytest.mark.parametrize("folder", ["tiny_llama_dir", "tiny_gpt2_dir"])
def test_decay_leaves_out_what_transformers_trainer_leaves_out(folder: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(folder)
    base = transformers.AutoModelForCausalLM.from_pretrained(path)
    expected = set(trainers_decayed_names(base))
    decayed = decayed_names(base)
    # The head's tied weight has two names in the Trainer's list.
    assert set(decayed) == {name for name, _ in base.named_parameters()} & expected
    undecayed = {name for name, _ in base.named_parameters()} - expected
    assert undecayed
    assert not any("embed" in name or "wte" in name for name in undecayed)
    assert all("norm" in name or "ln_" in name or name.endswith("bias") for name in undecayed)


def test_decay_moves_no_norm_and_no_bias() -> None:
    """With a gradient of zero only decay moves a weight."""
    base, start = TinyModel(), TinyModel()
    run = PackRun(base, [FULL])
    run.optimizer.zero_gradients()
    run.update()
    for (name, ours), before in zip(base.named_parameters(), start.parameters(), strict=True):
        is_left_out = ".norms." in name or name.endswith(".bias")
        assert torch.equal(ours, before) == is_left_out, name


def test_base_parameters_are_views_of_the_trained_tensors() -> None:
    base = TinyModel()
    run = PackRun(base, [FULL])
    (stack,) = run.pack.stacks()
    tensors = dict(stack.named_parameters())
    assert tensors.keys() == {"weights", "norms_and_biases"}
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in base.parameters())
    with torch.no_grad():
        tensors["weights"].fill_(0.25)
        tensors["norms_and_biases"].fill_(0.5)
    decayed = trainers_decayed_names(base)
    for name, parameter in base.named_parameters():
        assert (parameter == (0.25 if name in decayed else 0.5)).all(), name


def test_a_float32_master_keeps_small_updates_of_a_bfloat16_base() -> None:
    """An update of 5e-5 is below half a unit in the last place of a weight above 0.1 (2.4e-4); 60 of them are not."""
    member = Member(method=small_method("full"), lr=5e-5)
    base, start, lossy = TinyModel(torch.bfloat16), TinyModel(torch.bfloat16), TinyModel(torch.bfloat16)
    run = PackRun(base, [member], dtype=torch.float32, schedule=lambda step: 1.0)
    run.train(60)
    train_with_torch(lossy, member, 60)

    def flat(model: TinyModel) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    large = flat(start).abs() > 0.1
    moved, moved_without_master = (flat(model)[large] != flat(start)[large] for model in (base, lossy))
    assert moved_without_master.count_nonzero() == 0
    assert moved.float().mean().item() > 0.3
    (stack,) = run.pack.stacks()
    assert isinstance(stack, BaseStack)
    for name, tensor in stack.named_parameters():
        master = tensor.detach()[0]
        rounded = torch.cat([parameter.detach().flatten() for parameter in stack.base_parameters[name]])
        assert master.dtype == torch.float32
        assert not torch.equal(master, rounded.float())
        assert torch.equal(master.bfloat16(), rounded), "the base is the master, rounded"
    assert all(parameter.dtype == torch.bfloat16 for parameter in base.parameters())


def test_gradients_in_bfloat16_are_moved_into_the_master_and_freed() -> None:
    base, reference = TinyModel(torch.bfloat16), TinyModel(torch.bfloat16)
    run = PackRun(base, [FULL], dtype=torch.float32)
    run.backward()
    ids = token_ids(reference, 0, 0)
    next_token_losses(reference(ids).logits, ids, 1).sum().backward()
    decayed = trainers_decayed_names(reference)
    for block in run.pack.blocks:
        expected = torch.cat(
            [
                parameter.grad.flatten()
                for name, parameter in reference.named_parameters()
                if parameter.grad is not None and (name in decayed) == (block.name == "weights")
            ]
        )
        assert block.gradients.dtype == torch.float32
        assert torch.equal(block.gradients[0], expected.float())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_tied_weights_count_and_train_once() -> None:
    base = TinyModel()
    base.head.weight = base.embedding.weight
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    run = PackRun(base, [FULL])
    run.train(2)
    assert sum(block.weights.numel() for block in run.pack.blocks) == num_parameters
    assert base.head.weight is base.embedding.weight


def test_full_counts_the_whole_base() -> None:
    count = get_method("full")().num_parameters([LayerShape(name="q", in_features=2, out_features=3)], 1234)
    assert (count.trainable, count.stored, count.shared) == (1234, 1234, 0)


def test_weights_that_text_never_reaches_stay_and_do_not_count() -> None:
    """Weight decay alone would shrink them."""
    base = OddBase(odd_bases.NoGradient).double()
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    run = PackRun(base, [Member(method=small_method("full"), weight_decay=0.5, lr=0.1)])
    run.train(3)
    still = {name for name, tensor in base.state_dict().items() if torch.equal(tensor, before[name])}
    assert still == {name for name in before if name.startswith("vision.") or "chooser" in name}
    num_all = sum(tensor.numel() for tensor in before.values())
    count = run.members[0].method.num_parameters(run.pack.layers, num_all)
    assert count.stored == num_all
    assert count.trainable == num_all - sum(before[name].numel() for name in still)
    assert sum(parameter.numel() for parameter in run.pack.trainable_parameters()) == count.trainable
