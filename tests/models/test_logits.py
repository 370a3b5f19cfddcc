"""A scale and a cap are read from the config and proven on the model; whatever else changes logits is refused."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, PreTrainedModel

from loragrid.models.logits import IDENTITY, LogitTransform, check_logits, declared_transform
from tests.support.model_families import tiny_model

FALCON_H1 = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 16}
DECLARED: list[tuple[str, dict[str, Any], LogitTransform]] = [
    ("llama", {}, IDENTITY),
    ("gemma2", {"final_logit_softcapping": 30.0}, LogitTransform(cap=30.0)),
    ("gemma2", {"final_logit_softcapping": None}, IDENTITY),
    ("gemma3_text", {"final_logit_softcapping": 5.0}, LogitTransform(cap=5.0)),
    ("vaultgemma", {"final_logit_softcapping": 7.0}, LogitTransform(cap=7.0)),
    ("nanochat", {"final_logit_softcapping": 15.0}, LogitTransform(cap=15.0)),
    ("recurrent_gemma", {"logits_soft_cap": 20.0}, LogitTransform(cap=20.0)),
    ("cohere", {"logit_scale": 0.0625}, LogitTransform(scale=0.0625)),
    ("cohere2", {"logit_scale": 2.0}, LogitTransform(scale=2.0)),
    ("granite", {"logits_scaling": 8.0}, LogitTransform(scale=0.125)),
    ("granitemoe", {"logits_scaling": 3.0, "num_local_experts": 4}, LogitTransform(scale=1 / 3)),
    ("falcon_h1", {"lm_head_multiplier": 0.5, **FALCON_H1}, LogitTransform(scale=0.5)),
    ("xlstm", {"output_logit_soft_cap": 2.0, "num_heads": 4}, LogitTransform(cap=2.0)),
    ("hyperclovax", {"logits_scaling": 0.5}, LogitTransform(scale=0.5)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("model_type", "settings", "expected"), DECLARED, ids=lambda value: str(value)[:30])
def test_the_declared_scale_and_cap_are_the_models(
    model_type: str, settings: dict[str, Any], expected: LogitTransform, dtype: torch.dtype
) -> None:
    base = tiny_model(model_type, dtype, **settings)
    assert declared_transform(base.config) == expected
    check_logits(base)


def changed(base: PreTrainedModel, change: Any) -> PreTrainedModel:
    """The base with a changed output."""
    base.register_forward_hook(lambda module, arguments, output: output.__setitem__("logits", change(output.logits)))
    return base


@pytest.mark.parametrize(
    "change",
    [torch.tanh, lambda logits: logits * 1.001, lambda logits: logits + 1.0, lambda logits: logits.clamp(-100, 100)],
    ids=["tanh", "scale", "offset", "clamp beyond its own logits"],
)
def test_an_undeclared_change_is_refused(change: Any) -> None:
    with pytest.raises(ValueError, match=r"model\.name: .*changes its logits after the head in an unknown way"):
        check_logits(changed(tiny_model("llama"), change))


@pytest.mark.parametrize(
    "settings", [{"final_logit_softcapping": 30.0}, {"logits_scaling": 8.0}, {"logit_scale": 0.5}], ids=str
)
def test_what_is_declared_and_not_applied_is_refused(settings: dict[str, Any]) -> None:
    # The logits of a small random model hardly feel a cap of 30; the check chooses larger ones.
    llama = tiny_model("llama")
    for key, value in settings.items():
        setattr(llama.config, key, value)
    with pytest.raises(ValueError, match=r"its config declares a scale of .*the model computes something else"):
        check_logits(llama)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), True, "8"])
def test_an_impossible_scale_is_refused_by_its_key(value: Any) -> None:
    config = AutoConfig.for_model("llama")
    config.logits_scaling = value
    with pytest.raises(ValueError, match=r"its config says logits_scaling: .*allowed: above 0"):
        declared_transform(config)


def test_layers_before_the_head_are_refused_as_such() -> None:
    for base in (tiny_model("bert", is_decoder=True), tiny_model("modernbert-decoder")):
        with pytest.raises(ValueError, match="changes its last hidden states before its head"):
            check_logits(base)


def test_a_head_that_scales_its_input_passes_without_a_bias() -> None:
    base = tiny_model("llama")
    head = base.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, arguments: (arguments[0] / 4.0,))
    with pytest.raises(ValueError, match="before its head"):
        check_logits(base)
    base.config.logits_scaling = 4.0
    check_logits(base)
    head.bias = nn.Parameter(torch.ones(head.out_features))
    with pytest.raises(ValueError, match="before its head"):
        check_logits(base)


def test_logits_that_leave_out_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="keeps 90 of its head's 96 logits"):
        check_logits(changed(tiny_model("llama"), lambda logits: logits[..., :90]))


def test_a_head_that_is_not_called_is_refused() -> None:
    base = tiny_model("llama")
    unused = nn.Linear(32, 96, bias=False)
    base.get_output_embeddings = lambda: unused  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="computes its logits without its head"):
        check_logits(base)


def test_checking_leaves_the_model_as_it_was() -> None:
    base = tiny_model("gemma2")
    ids = torch.tensor([[3, 4, 5]])
    before = base(input_ids=ids).logits
    check_logits(base)
    assert torch.equal(base(input_ids=ids).logits, before)
    assert not base.get_output_embeddings()._forward_hooks
