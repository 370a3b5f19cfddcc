"""A model's scale and cap of its logits are in losses and gradients exactly as in transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from loragrid.config.experiment import DataConfig, ModelConfig, TrainingConfig
from loragrid.data.labels import IGNORED
from loragrid.models.logits import LogitTransform
from loragrid.training import loss
from loragrid.training.assembly import build_model
from loragrid.training.loss import fusible_score_rows, member_losses, score_rows
from loragrid.training.step import Batch, add_up_gradients
from loragrid.trials.trial import Trial
from loragrid_methods import get_method
from tests.support.model_families import VOCABULARY, tiny_model

TRANSFORMS = [
    LogitTransform(scale=0.0625),
    LogitTransform(scale=3.0),
    LogitTransform(cap=0.5),
    LogitTransform(cap=30.0),
    LogitTransform(scale=0.3, cap=2.0),
]
MEMBERS, ROWS, LABELS, WIDTH = 3, 4, 6, 8

Score = Callable[..., tuple[Tensor, Tensor]]


def plain(outputs: Tensor, transform: LogitTransform) -> Tensor:
    """Logits as models write them."""
    logits = outputs * transform.scale
    if transform.cap is not None:
        logits = logits / transform.cap
        logits = torch.tanh(logits)
        logits = logits * transform.cap
    return logits


@pytest.mark.parametrize("score", [score_rows, fusible_score_rows])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_scores_and_gradients_are_autograds(score: Score, transform: LogitTransform) -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(12, 50, dtype=torch.float64, generator=generator).mul(4).requires_grad_()
    targets = torch.randint(50, (12,), generator=generator)
    targets[[2, 7]] = IGNORED
    weights = torch.rand(12, dtype=torch.float64, generator=generator).masked_fill(targets == IGNORED, 0.0)
    expected = F.cross_entropy(plain(outputs, transform), targets, ignore_index=IGNORED, reduction="none") * weights
    (gradient,) = torch.autograd.grad(expected.sum(), outputs)
    losses, ours = score(outputs.detach(), targets, weights, transform.scale, transform.cap)
    torch.testing.assert_close(losses, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, gradient, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("chunk_rows", [5, 2048])
@pytest.mark.parametrize("trainable_head", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_chunked_losses_have_the_scale_and_the_cap(
    transform: LogitTransform, trainable_head: bool, chunk_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "CHUNK_ROWS", chunk_rows)
    generator = torch.Generator().manual_seed(0)
    targets = torch.randint(19, (MEMBERS * ROWS, LABELS), generator=generator)
    targets[1::2, 3:] = IGNORED
    counts = (targets != IGNORED).view(MEMBERS, -1).sum(1).double()
    weight = torch.randn(19, WIDTH, dtype=torch.float64, generator=generator)
    states = torch.randn(MEMBERS * ROWS, LABELS, WIDTH, dtype=torch.float64, generator=generator)
    found = []
    for ours in (True, False):
        head = nn.Linear(WIDTH, 19, dtype=torch.float64)
        head.weight = nn.Parameter(weight.clone())
        nn.init.constant_(head.bias, 0.3)
        head.requires_grad_(trainable_head)
        hidden = states.clone().requires_grad_()
        if ours:
            losses = member_losses(hidden, targets, counts, head, logits=transform)
        else:
            logits = plain(head(hidden), transform).view(MEMBERS, -1, 19)
            losses = torch.stack([
                F.cross_entropy(of_member, own, ignore_index=IGNORED)
                for of_member, own in zip(logits, targets.view(MEMBERS, -1), strict=True)
            ])  # fmt: skip
        (losses * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)).sum().backward()
        trained = [hidden, *(parameter for parameter in head.parameters() if trainable_head)]
        with torch.no_grad():
            untrained = member_losses(states, targets, counts, head, logits=transform)
        found.append([losses.detach(), untrained, *(tensor.grad for tensor in trained)])
    for ours_, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0][0], found[0][1], rtol=1e-12, atol=1e-12)


def trial(name: str) -> Trial:
    method = get_method(name)
    fields: dict[str, Any] = {"rank": 3} if "rank" in method.field_names() else {}
    return Trial(
        trial_id=name,
        method=method(**fields),
        seed=0,
        model=ModelConfig(name="tiny", dtype="float64"),
        data=DataConfig(name="rows.jsonl"),
        training=TrainingConfig(steps=2, batch_size=3),
    )


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("gemma2", {"final_logit_softcapping": 0.5}),
        ("granite", {"logits_scaling": 8.0}),
        ("cohere", {"logit_scale": 0.0625}),
        ("gpt2", {}),
    ],
)
def test_a_step_has_transformers_loss_and_gradients(model_type: str, settings: dict[str, Any], method: str) -> None:
    base = tiny_model(model_type, torch.float64, **settings)
    model = build_model([trial(method)], base)
    with torch.no_grad():  # an update of zero would hide its gradients
        for stack in model.pack.stacks():
            for parameter in stack.parameters():
                if method == "lora":
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(parameter.numel()))
    lengths = (12, 9, 5)
    ids = torch.randint(3, VOCABULARY, (3, lengths[0]), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
        targets[row, length - 1 :] = IGNORED
    count = (targets != IGNORED).sum().double().view(1)
    positions = torch.arange(lengths[0] - 1).repeat(3, 1)
    batch = Batch(input_ids=ids, label_positions=positions, label_targets=targets, num_labels=count)

    ours = add_up_gradients(model, batch)
    gradient = model.pack.gradient_buffer.clone()
    model.optimizer.zero_gradients()
    # One call on the same rows: norms that compute in float32 then round alike. transformers' loss rounds to float32.
    logits = base(input_ids=ids, use_cache=False).logits[:, :-1]
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    total.backward()
    assert total.item() == pytest.approx(ours.item(), rel=1e-10)
    assert gradient.abs().max() > 1e-4
    assert (gradient - model.pack.gradient_buffer).abs().max().item() <= 1e-10


def test_the_fused_scores_are_traced_as_a_whole_with_scale_and_cap() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(12, 50, generator=generator)
    targets, weights = torch.randint(50, (12,), generator=generator), torch.rand(12, generator=generator)
    traced = torch.compile(fusible_score_rows, dynamic=False, fullgraph=True, backend="aot_eager")
    for transform in (LogitTransform(), *TRANSFORMS):
        for ours, theirs in zip(
            traced(outputs, targets, weights, transform.scale, transform.cap),
            score_rows(outputs, targets, weights, transform.scale, transform.cap),
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
