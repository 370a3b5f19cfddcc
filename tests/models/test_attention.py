"""A base takes the plain causal attention only if it asks for nothing else; otherwise the reason is returned."""

from typing import Any

import pytest
import torch

from loragrid.models.attention import NAME, fixed_attention, use_causal_attention
from tests.support.model_families import FAMILIES, VOCABULARY, tiny_model

WINDOW = "its window of 8 tokens is shorter than the rows (24)"
OWN: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", {"sliding_window": 4096, "attn_logit_softcapping": 50.0}, "it caps attention scores at 50"),
    ("gemma2", {"sliding_window": 8, "attn_logit_softcapping": None}, WINDOW),
    ("gpt_oss", {"sliding_window": 4096}, "it has attention sinks"),
    ("mistral", {"sliding_window": 8}, WINDOW),
    ("cohere2", {"sliding_window": 8}, WINDOW),
    ("gemma3_text", {"sliding_window": 4096, "use_bidirectional_attention": True}, "it is not causal"),
]


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randint(VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(0))


# A cap of 50 changes the states of a small random model by far less than bfloat16 rounds.
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("model_type", "settings", "reason"), OWN, ids=[f"{row[0]} {row[2][:12]}" for row in OWN])
def test_a_base_that_asks_for_more_keeps_its_attention_with_the_reason(
    model_type: str, settings: dict[str, Any], reason: str, dtype: torch.dtype, rows: torch.Tensor
) -> None:
    base = tiny_model(model_type, dtype, **settings)
    before = base.config._attn_implementation
    own = base.base_model(input_ids=rows, use_cache=False).last_hidden_state
    assert use_causal_attention(base, rows) == f"{type(base).__name__}'s attention is not plain causal: {reason}"
    assert base.config._attn_implementation == before
    assert torch.equal(base.base_model(input_ids=rows, use_cache=False).last_hidden_state, own)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_takes_it_or_says_why_not(model_type: str, rows: torch.Tensor) -> None:
    base = tiny_model(model_type)
    own = base.base_model(input_ids=rows, use_cache=False).last_hidden_state
    reason = use_causal_attention(base, rows)
    assert (base.config._attn_implementation == NAME) == (reason == "")
    assert reason == "" or reason.startswith(type(base).__name__)
    found = base.base_model(input_ids=rows, use_cache=False).last_hidden_state
    torch.testing.assert_close(found, own, rtol=1e-4, atol=1e-4)
    if "sliding_window" in FAMILIES[model_type]:
        assert reason, "a window is no plain causal attention"


def test_a_window_that_no_row_fills_is_plain(rows: torch.Tensor) -> None:
    assert use_causal_attention(tiny_model("mistral", sliding_window=24), rows) == ""


@pytest.mark.parametrize("model_type", ["bloom", "gptj", "mpt", "falcon"])
def test_attention_that_cannot_be_replaced_is_said(model_type: str, rows: torch.Tensor) -> None:
    base = tiny_model(model_type)
    assert use_causal_attention(base, rows) == fixed_attention(base) != ""
    assert fixed_attention(tiny_model("llama")) == ""
