"""Full fine-tuning through the pack is `torch.optim.AdamW` on the base, and loses no small update to bfloat16."""

import pytest
import torch
from torch import nn

from loragrid_methods import LayerShape, get_method
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


def train_with_torch(model: TinyModel, member: Member, num_steps: int) -> list[float]:
    """`torch.optim.AdamW` straight on the model's own parameters."""
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=member.lr, weight_decay=member.weight_decay, foreach=False)
    losses = []
    for step in range(num_steps):
        ids = token_ids(model, member.seed, step)
        loss = next_token_losses(model(ids).logits, ids, 1).sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, member.clip_norm, foreach=False)
        optimizer.param_groups[0]["lr"] = member.lr * decay_slowly(step)
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


def test_base_parameters_are_views_of_the_one_weights_tensor() -> None:
    base = TinyModel()
    run = PackRun(base, [FULL])
    (stack,) = run.pack.stacks()
    weights = stack.get_parameter("weights")
    assert weights.shape == (1, sum(parameter.numel() for parameter in base.parameters()))
    with torch.no_grad():
        weights.fill_(0.25)
    assert all((parameter == 0.25).all() for parameter in base.parameters())


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
    master = stack.get_parameter("weights").detach()[0]
    assert master.dtype == torch.float32
    assert not torch.equal(master, flat(base).float())
    assert torch.equal(master.bfloat16(), flat(base)), "the base is the master, rounded"
    assert all(parameter.dtype == torch.bfloat16 for parameter in base.parameters())


def test_gradients_in_bfloat16_are_moved_into_the_master_and_freed() -> None:
    base, reference = TinyModel(torch.bfloat16), TinyModel(torch.bfloat16)
    run = PackRun(base, [FULL], dtype=torch.float32)
    run.backward()
    ids = token_ids(reference, 0, 0)
    next_token_losses(reference(ids).logits, ids, 1).sum().backward()
    (block,) = run.pack.blocks
    expected = torch.cat([p.grad.flatten() for p in reference.parameters() if p.grad is not None])
    assert block.gradients.dtype == torch.float32
    assert torch.equal(block.gradients[0], expected.float())
    assert all(parameter.grad is None for parameter in base.parameters())


def test_tied_weights_count_and_train_once() -> None:
    base = TinyModel()
    base.head.weight = base.embedding.weight
    num_parameters = sum(parameter.numel() for parameter in base.parameters())
    run = PackRun(base, [FULL])
    run.train(2)
    assert run.pack.blocks[0].weights.numel() == num_parameters
    assert base.head.weight is base.embedding.weight


def test_full_counts_the_whole_base() -> None:
    count = get_method("full")().num_parameters([LayerShape(name="q", in_features=2, out_features=3)], 1234)
    assert (count.trainable, count.stored, count.shared) == (1234, 1234, 0)
