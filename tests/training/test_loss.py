"""Every member's chunked loss equals PyTorch's cross-entropy on whole logits."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from loragrid.data.labels import IGNORED
from loragrid.training import loss
from loragrid.training.loss import labelled_hidden_states, member_losses
from loragrid.training.meters import count_activation_bytes
from tests.support.small_packs import Setup, make_setup

MEMBERS, ROWS, LABELS, WIDTH, VOCABULARY = 3, 4, 6, 8, 19

Losses = Callable[[Tensor, Tensor, nn.Linear], Tensor]


@pytest.fixture(params=[5, loss.CHUNK_ROWS], ids=["many chunks", "one chunk"])
def chunk_rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """5 divides neither a member's 24 rows of labels nor all 72."""
    monkeypatch.setattr(loss, "CHUNK_ROWS", request.param)
    return int(request.param)


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64")


def problem(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, nn.Linear]:
    """Hidden states that need gradients, targets with a different number of labels in every row, and a frozen head."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(MEMBERS * ROWS, LABELS, WIDTH, generator=generator, dtype=torch.float64)
    targets = torch.randint(VOCABULARY, (MEMBERS * ROWS, LABELS), generator=generator)
    for row in range(len(targets)):
        targets[row, 1 + (row * row) % LABELS :] = IGNORED
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        head = nn.Linear(WIDTH, VOCABULARY, bias=bias).to(dtype).requires_grad_(False)
    return hidden.to(dtype).requires_grad_(), targets, head


def chunked(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    counts = (targets != IGNORED).view(MEMBERS, -1).sum(1).double()
    return member_losses(hidden, targets, counts, head)


def plain(hidden: Tensor, targets: Tensor, head: nn.Linear) -> Tensor:
    """Every member's mean by itself."""
    return torch.stack(
        [
            F.cross_entropy(head(h).flatten(0, 1), t.flatten(), ignore_index=IGNORED)
            for h, t in zip(hidden.view(MEMBERS, ROWS, LABELS, WIDTH), targets.view(MEMBERS, -1), strict=True)
        ]
    )


@pytest.mark.usefixtures("chunk_rows")
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trainable_head", [True, False])
def test_values_and_gradients_are_those_of_plain_cross_entropy(bias: bool, trainable_head: bool) -> None:
    # Unequal factors on the members' losses show that each gradient is scaled by its own.
    factors = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    results = []
    for losses in (chunked, plain):
        hidden, targets, head = problem(bias=bias)
        head.requires_grad_(trainable_head)
        values = losses(hidden, targets, head)
        (values * factors).sum().backward()
        assert (head.weight.grad is not None) == trainable_head
        results.append([values.detach(), hidden.grad, *(parameter.grad for parameter in head.parameters())])
    for ours, theirs in zip(*results, strict=True):
        if theirs is not None:
            assert ours is not None
            assert ours.shape == theirs.shape
            assert (ours - theirs).abs().max().item() <= 1e-12


@pytest.mark.usefixtures("chunk_rows")
def test_the_loss_equals_the_models_own_without_padding(setup: Setup) -> None:
    rows = setup.rows.train.select(torch.arange(6))
    num_members = 2
    assert len(set(rows.num_tokens.tolist())) > 1, "rows of one length are not padded"
    counts = (rows.label_targets != IGNORED).view(num_members, -1).sum(1)
    assert counts[0] != counts[1]

    base = setup.base()
    names = ("transformer.h.0.mlp.c_fc.weight", "transformer.ln_f.weight")
    weights = [base.get_parameter(name).requires_grad_() for name in names]
    head = base.get_submodule("lm_head")
    assert isinstance(head, nn.Linear)
    hidden = base.base_model(input_ids=rows.input_ids, use_cache=False).last_hidden_state
    labelled = labelled_hidden_states(hidden, rows.label_positions)
    ours = member_losses(labelled, rows.label_targets, counts.double(), head)
    our_gradients = torch.autograd.grad(ours.sum(), weights)

    sums = torch.zeros(num_members, dtype=torch.float64)
    for row in range(len(rows)):
        length = int(rows.num_tokens[row])
        ids = rows.input_ids[row : row + 1, :length]
        is_label = torch.zeros(length, dtype=torch.bool)
        is_label[rows.label_positions[row][rows.label_targets[row] != IGNORED] + 1] = True
        labels = ids.masked_fill(~is_label, IGNORED)
        logits = base(input_ids=ids).logits
        row_sum = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=IGNORED, reduction="sum")
        sums = sums + row_sum * F.one_hot(torch.tensor(row // 3), num_members)
    theirs = sums / counts
    their_gradients = torch.autograd.grad(theirs.sum(), weights)

    assert (ours - theirs).abs().max().item() <= 1e-12
    for our, their in zip(our_gradients, their_gradients, strict=True):
        assert their.abs().max() > 1e-4
        assert (our - their).abs().max().item() <= 1e-12


def test_one_members_hidden_states_never_move_another_members_loss() -> None:
    hidden, targets, head = problem()
    before = chunked(hidden, targets, head).detach()
    changed = hidden.detach().clone()
    changed[ROWS : 2 * ROWS] = float("nan")
    changed.requires_grad_()
    after = chunked(changed, targets, head)
    after.sum().backward()
    assert after.isnan().tolist() == [False, True, False]
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert changed.grad is not None
    assert changed.grad.isfinite().flatten(1).all(1).tolist() == [True] * 4 + [False] * 4 + [True] * 4


def test_workers_shares_add_up_to_the_mean_over_all_labels() -> None:
    hidden, targets, head = problem()
    whole = chunked(hidden, targets, head)
    counts = (targets != IGNORED).view(MEMBERS, -1).sum(1).double()
    by_member, targets_by_member = hidden.view(MEMBERS, ROWS, LABELS, WIDTH), targets.view(MEMBERS, ROWS, LABELS)
    shares = [
        member_losses(by_member[:, part].flatten(0, 1), targets_by_member[:, part].flatten(0, 1), counts, head)
        for part in (slice(0, 1), slice(1, 4))
    ]
    assert (sum(shares) - whole).abs().max().item() <= 1e-12


@pytest.mark.parametrize("trainable_head", [True, False])
def test_a_member_without_labels_has_zero_loss_and_gradient(trainable_head: bool) -> None:
    hidden, targets, head = problem()
    head.requires_grad_(trainable_head)
    targets[:ROWS] = IGNORED
    losses = chunked(hidden, targets, head)
    losses.sum().backward()
    assert losses[0].item() == 0.0
    assert losses[1:].gt(0).all()
    assert hidden.grad is not None
    assert not hidden.grad[:ROWS].any()


def test_labels_count_and_padding_does_not() -> None:
    hidden, targets, head = problem()
    chunked(hidden, targets, head).sum().backward()
    assert hidden.grad is not None
    assert torch.equal(hidden.grad.abs().sum(-1) > 0, targets != IGNORED)


def test_from_a_bfloat16_head_the_loss_is_computed_in_float32() -> None:
    hidden, targets, head = problem(dtype=torch.bfloat16)
    losses = chunked(hidden, targets, head)
    assert losses.dtype == torch.float32
    logits = F.linear(hidden, head.weight, head.bias).detach().float().view(MEMBERS, -1, VOCABULARY)
    for member in range(MEMBERS):
        expected = F.cross_entropy(logits[member], targets.view(MEMBERS, -1)[member], ignore_index=IGNORED)
        assert losses[member].item() == pytest.approx(expected.item(), rel=1e-6)
    losses.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.bfloat16


def test_a_frozen_head_keeps_one_gradient_and_no_logits() -> None:
    hidden, targets, head = problem()
    with count_activation_bytes(head) as saved:
        losses = chunked(hidden, targets, head)
    assert saved == [hidden.numel() * hidden.element_size()]
    losses.sum().backward()
    with torch.no_grad(), count_activation_bytes(head) as saved:
        chunked(hidden, targets, head)
    assert saved == [0]


class Operations(TorchDispatchMode):
    """Within, notes the names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(func.overloadpacket._qualified_op_name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def test_backward_sums_repeated_positions_without_atomic_operations() -> None:
    hidden = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([[4, 0, 0], [2, 2, 3]])
    weights = torch.randn(2, 3, 3, dtype=torch.float64)
    with Operations() as operations:
        (labelled_hidden_states(hidden, positions) * weights).sum().backward()
    expected = torch.zeros_like(hidden)
    for row, of_row in enumerate(positions.tolist()):
        for place, position in enumerate(of_row):
            expected[row, position] += weights[row, place]
    assert hidden.grad is not None
    assert torch.equal(hidden.grad, expected)
    # On a GPU a scattered sum is one of atomic operations; an indexed one sorts the positions first.
    assert not [name for name in operations.seen if "scatter" in name or "index_add" in name]
    assert [name for name in operations.seen if "index_put" in name]


def test_the_labelled_states_are_those_at_the_labels_positions() -> None:
    hidden = torch.arange(2 * 5 * 3, dtype=torch.float32).view(2, 5, 3)
    positions = torch.tensor([[4, 0], [2, 2]])
    chosen = labelled_hidden_states(hidden, positions)
    assert torch.equal(chosen, torch.stack([hidden[0, [4, 0]], hidden[1, [2, 2]]]))
