"""Generates answers with all members of a pack at once, with a key-value cache and left padding."""

import hashlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from loragrid.models.attention import TOLERANCES, masked_attention
from loragrid.models.logits import IDENTITY, LogitTransform, logit_transform
from loragrid.models.sharding import whole_head
from loragrid.training.step import PackModel, SumOverWorkers

NUM_PADDING_TO_CHECK = 5
NUM_TOKENS_TO_CHECK = 16
"""The tokens of a row with which `check_generation` is called: few enough for a large base on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """Everything that decides the next token; a model's own generation settings are ignored.

    temperature: None takes the likeliest token (greedy). end_token_ids: each of them ends an answer as its last token.
    pad_token_id: fills a finished row.
    """

    max_new_tokens: int
    end_token_ids: tuple[int, ...]
    pad_token_id: int
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0


@torch.no_grad()
def generate(
    model: PackModel,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[str],
    decoding: Decoding,
    sum_over_workers: SumOverWorkers,
    *,
    frozen: bool = False,
) -> list[list[list[int]]]:
    """Every member's answers to the same R prompts: [member][row] -> tokens, without the end token.

    frozen: answers of the bare base, as one member. keys: identify the rows; a row's random draws depend only on its
    key, the seed and the position, so they are the same for all members and in every pack. All workers of
    `sum_over_workers` must call this with the same number of rows, and continue until the last row of all workers ends.

    Prompts are padded on the left. The padding is masked and has no positions, so a row's tokens do not depend on the
    rows beside it. Rows that have ended are padded until the last row ends, to keep one shape. Members that are no
    longer active count as ended.
    """
    device, num_members = model.active.device, 1 if frozen else model.pack.num_members
    input_ids, mask = _left_padded(prompts, decoding.pad_token_id, device)
    input_ids, mask = input_ids.repeat(num_members, 1), mask.repeat(num_members, 1)
    draws = None if decoding.temperature is None else _draws(keys, decoding).repeat(num_members, 1).to(device)
    ends = torch.tensor(decoding.end_token_ids, dtype=torch.int64, device=device)
    ended = torch.zeros(len(input_ids), dtype=torch.bool, device=device)
    if not frozen:
        ended |= ~model.active.repeat_interleave(len(prompts))
    cache = DynamicCache(config=model.base.config.get_text_config())
    tokens: list[Tensor] = []
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whose = model.pack.disabled() if frozen else nullcontext()
    with model.evaluating(), masked_attention(model.base), whose:
        for index in range(decoding.max_new_tokens):
            chosen = next_tokens(
                model.base, input_ids, mask, positions, cache, decoding, None if draws is None else draws[:, index]
            )
            chosen = chosen.masked_fill(ended, decoding.pad_token_id)
            tokens.append(chosen)
            ended |= torch.isin(chosen, ends)
            num_open = (~ended).sum().double().view(1)
            sum_over_workers(num_open)
            if not num_open.item():
                break
            input_ids, positions = chosen.unsqueeze(1), positions[:, -1:] + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
    return _answers(torch.stack(tokens, dim=1), num_members, set(decoding.end_token_ids))


def next_tokens(
    base: PreTrainedModel,
    input_ids: Tensor,
    mask: Tensor | None,
    positions: Tensor,
    cache: DynamicCache,
    decoding: Decoding,
    draws: Tensor | None,
) -> Tensor:
    """The next token of each row: input_ids and positions (B, L), which follow the cached tokens -> (B,).

    mask (B, cached tokens + L): 0 for padding. draws (B,): random numbers from 0 to 1; None if `decoding` is greedy.
    """
    hidden = base.base_model(
        input_ids=input_ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state[:, -1]
    with whole_head(base) as head:
        outputs = torch.nn.functional.linear(hidden, head.weight, head.bias)
    return _choose(outputs, decoding, draws, logit_transform(base))


@torch.no_grad()
def check_generation(base: PreTrainedModel, tokens: Tensor, key: str) -> None:
    """Check that a row of tokens (L,) has the same hidden states behind padding, and in two parts with a cache.

    key: the key that asks for answers, for the message.

    Raises:
        ValueError: the hidden states differ. Answers would depend on the rows beside them (the model has no mask, such
            as RWKV, or applies it inexactly in its dtype, such as BLOOM in float64), or on their last token only (the
            model has no such cache, such as Mamba).
    """
    if len(tokens) == 1:
        tokens = tokens.repeat(2)
    padding = tokens[:1].repeat(NUM_PADDING_TO_CHECK)
    seen = torch.ones_like(tokens)
    cache = DynamicCache(config=base.config.get_text_config())
    with masked_attention(base):
        alone = _hidden_states(base, tokens, seen)
        padded = _hidden_states(base, torch.cat([padding, tokens]), torch.cat([torch.zeros_like(padding), seen]))
        _hidden_states(base, tokens[:-1], seen[:-1], cache)
        last = _hidden_states(base, tokens[-1:], seen, cache)
    for what, ours, expected in (
        ("padding in front of a prompt changes its hidden states", padded[-len(tokens) :], alone),
        ("a cache of the prompt changes the hidden states that follow", last, alone[-1:]),
    ):
        difference = float((ours - expected).norm() / expected.norm())
        if not difference <= TOLERANCES[base.dtype]:
            raise ValueError(
                f"model.name: {base.name_or_path!r} ({type(base).__name__}): {what} (by {difference:.1e}) in "
                f"{base.dtype}; allowed with {key}: models that mask padding and keep a cache (some only in another "
                "model.dtype)"
            )


def _hidden_states(base: PreTrainedModel, tokens: Tensor, seen: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """The last hidden states (L, d) float64 of tokens (L,), which follow the cached ones.

    seen (cached + L,): 0 for padding.
    """
    positions = (seen.cumsum(0) - 1).clamp(min=0)[-len(tokens) :]
    hidden: Tensor = base.base_model(
        input_ids=tokens.unsqueeze(0),
        attention_mask=seen.unsqueeze(0),
        position_ids=positions.unsqueeze(0),
        past_key_values=cache,
        use_cache=cache is not None,
    ).last_hidden_state
    return hidden[0].double()


def _left_padded(prompts: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """R prompts as input_ids (R, P) and mask (R, P) int64, which is 0 for padding."""
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), length), pad, dtype=torch.int64)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        assert prompt, "a prompt has a token"
        input_ids[row, length - len(prompt) :] = torch.tensor(prompt)
        mask[row, length - len(prompt) :] = 1
    return input_ids.to(device), mask.to(device)


def _choose(outputs: Tensor, decoding: Decoding, draws: Tensor | None, transform: LogitTransform = IDENTITY) -> Tensor:
    """The next token of each row: the head's outputs (B, V), draws (B,) from 0 to 1 -> (B,)."""
    if draws is None or decoding.temperature is None:
        return outputs.argmax(-1)  # a scale above 0 and a cap keep the order, and large logits never tie at the cap
    logits = transform.apply(outputs.double()) / decoding.temperature
    probabilities, tokens = logits.softmax(-1).sort(stable=True, dim=-1, descending=True)
    below = probabilities.cumsum(-1) - probabilities
    kept = probabilities.masked_fill(below >= decoding.top_p, 0.0)
    total = kept.cumsum(-1)
    place = (total <= draws.unsqueeze(1) * total[:, -1:]).sum(-1, keepdim=True)
    chosen: Tensor = tokens.gather(1, place.clamp(max=outputs.shape[-1] - 1)).squeeze(1)
    return chosen


def _draws(keys: Sequence[str], decoding: Decoding) -> Tensor:
    """Random numbers from 0 up to 1 for every row and position, (R, max_new_tokens) float64."""
    rows = []
    for key in keys:
        digest = hashlib.sha256(f"answer {decoding.seed} {key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        rows.append(torch.rand(decoding.max_new_tokens, dtype=torch.float64, generator=generator))
    return torch.stack(rows)


def _answers(tokens: Tensor, num_members: int, ends: set[int]) -> list[list[list[int]]]:
    """tokens (M * R, T) -> [member][row] -> the tokens before the first end token."""
    rows = []
    for row in tokens.tolist():
        end = next((index for index, token in enumerate(row) if token in ends), len(row))
        rows.append(row[:end])
    size = len(rows) // num_members
    return [rows[start : start + size] for start in range(0, len(rows), size)]
