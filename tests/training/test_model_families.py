"""The loss on padded rows equals transformers' own loss, row by row, for every family in `FAMILIES`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from loragrid.data.labels import IGNORED
from loragrid.models.architecture import check_architecture
from loragrid.models.base_checks import check_base
from loragrid.models.logits import logit_transform
from loragrid.training.loss import labelled_hidden_states, member_losses
from tests.support.model_families import FAMILIES, PAD, VOCABULARY, tiny_model

LENGTHS = (24, 17, 9, 3)
"""Tokens of the rows; all are padded to the first."""
NUM_PROMPT_TOKENS = 2

TOLERANCE = 2e-6
"""Of the loss, in float32: rows alone and padded are summed in another order."""


def padded_rows() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    rows = torch.randint(3, VOCABULARY, (len(LENGTHS), LENGTHS[0]), generator=generator)
    for row, length in enumerate(LENGTHS):
        rows[row, length:] = PAD
    return rows


def test_the_list_has_at_least_24_families() -> None:
    assert len(FAMILIES) >= 24


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_familys_loss_is_transformers_own_row_by_row(model_type: str) -> None:
    base = tiny_model(model_type)
    check_architecture(model_type, base.config)
    check_base(base, length=LENGTHS[0])
    head = base.get_output_embeddings().requires_grad_(False)

    rows = padded_rows()
    positions = torch.arange(NUM_PROMPT_TOKENS - 1, LENGTHS[0] - 1).repeat(len(LENGTHS), 1)
    targets = rows[:, NUM_PROMPT_TOKENS:].clone()
    for row, length in enumerate(LENGTHS):
        targets[row, length - NUM_PROMPT_TOKENS :] = IGNORED
    counts = (targets != IGNORED).sum(1).double()
    with torch.no_grad():
        hidden = base.base_model(input_ids=rows, use_cache=False).last_hidden_state
        labelled = labelled_hidden_states(hidden, positions)
        ours = member_losses(labelled, targets, counts, head, logits=logit_transform(base))
        for row, length in enumerate(LENGTHS):
            ids = rows[row : row + 1, :length]
            labels = ids.clone()
            labels[:, :NUM_PROMPT_TOKENS] = IGNORED
            own = base(input_ids=ids, labels=labels, use_cache=False).loss
            assert ours[row].item() == pytest.approx(own.item(), rel=TOLERANCE)


def test_the_documented_families_are_those_of_the_list() -> None:
    page = (Path(__file__).parents[2] / "docs" / "how_to" / "models.md").read_text(encoding="utf-8")
    _, _, rest = page.partition("rows of different lengths:\n")
    listed, _, _ = rest.partition(".\n")
    assert listed.replace("\n", " ").split(", ") == sorted(FAMILIES)
