"""Bases that would train wrongly are refused with the true reason: causality, padding, weights, vocabulary."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from loragrid.config.experiment import ModelConfig
from loragrid.models import base_checks
from loragrid.models.base_checks import check_base, check_before_training, check_finite_weights, check_rows
from loragrid.models.few_layers import few_layers
from loragrid.models.vocabulary import check_vocabulary
from tests.support.model_families import tiny_model

BIDIRECTIONAL: dict[str, dict[str, Any]] = {
    "gemma3_text": {"use_bidirectional_attention": True, "head_dim": 8},
    "gemma": {"use_bidirectional_attention": True, "head_dim": 8},
    "bert": {},
    "roberta": {},
    "electra": {},
    "xlm-roberta": {},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 4},
    "cpmant": {},
}


def xlnet(attn_type: str) -> PreTrainedModel:
    from transformers import XLNetConfig, XLNetLMHeadModel

    config = XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=64, attn_type=attn_type)
    torch.manual_seed(0)
    base: PreTrainedModel = XLNetLMHeadModel(config)
    base.requires_grad_(False).train(False)
    return base


def saved(base: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> ModelConfig:
    base.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(name=str(folder), dtype="float32")


@pytest.mark.parametrize("model_type", BIDIRECTIONAL)
def test_a_model_that_sees_later_tokens_is_refused(model_type: str) -> None:
    base = tiny_model(model_type, **BIDIRECTIONAL[model_type])
    with pytest.raises(ValueError, match=r"model\.name: .*is not causal: other later tokens change the states before"):
        check_base(base)


def test_the_refusal_names_the_key_that_makes_it_bidirectional() -> None:
    base = tiny_model("gemma3_text", **BIDIRECTIONAL["gemma3_text"])
    with pytest.raises(ValueError, match="use_bidirectional_attention: True"):
        check_base(base)


def test_xlnet_is_refused_whichever_its_attention() -> None:
    with pytest.raises(ValueError, match="is not causal"):
        check_base(xlnet("bi"))


def test_a_causal_code_made_bidirectional_is_refused() -> None:
    base = tiny_model("llama")

    def mix(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + 0.01 * output.last_hidden_state.mean(1, keepdim=True)
        return output

    check_base(base)
    base.base_model.register_forward_hook(mix)
    with pytest.raises(ValueError, match="is not causal"):
        check_base(base)


def test_a_leak_below_bfloat16s_rounding_is_found_in_float32() -> None:
    # initializer_range 0.02: the leak is 2e-3, and bfloat16 rounds to 8e-3.
    base = tiny_model("bert", torch.bfloat16, initializer_range=0.02)
    with pytest.raises(ValueError, match="is not causal"):
        check_rows(base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gemma3_text", "gpt2"])
def test_a_causal_model_passes_in_every_dtype(model_type: str, dtype: torch.dtype) -> None:
    check_base(tiny_model(model_type, dtype), length=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_mixture_of_experts_passes(dtype: torch.dtype) -> None:
    for model_type in ("mixtral", "qwen3_moe"):
        check_base(tiny_model(model_type, dtype))


def test_a_dtype_in_which_a_base_cannot_run_is_named() -> None:
    base = tiny_model("llama")
    base.get_submodule("model.layers.0.mlp").double()
    with pytest.raises(ValueError, match=r"rows of tokens alone in torch\.float32: .*another model\.dtype"):
        check_base(base)


def test_a_recurrent_model_passes_with_padding_on_the_right() -> None:
    for model_type in ("mamba", "falcon_mamba", "recurrent_gemma"):
        check_base(tiny_model(model_type), length=40)
    check_base(tiny_model("rwkv", attention_hidden_size=32), length=40)


def test_rotary_frequencies_that_follow_the_longest_row_are_refused() -> None:
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    rope = factors | {"original_max_position_embeddings": 32}
    base = tiny_model("phi3", rope_parameters=rope, original_max_position_embeddings=32)
    check_base(base, length=32)
    with pytest.raises(ValueError, match="padding a row of 10 tokens to 64 changes its states"):
        check_base(base, length=64)


def test_a_padding_dependent_model_is_refused() -> None:
    base = tiny_model("llama")

    def by_length(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * output.last_hidden_state.shape[1]
        return output

    base.base_model.register_forward_hook(by_length)
    with pytest.raises(ValueError, match="padding a row of 10 tokens to 24 changes its states"):
        check_base(base)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_weight_that_is_not_finite_is_named(value: float, dtype: torch.dtype) -> None:
    base = tiny_model("llama", dtype)
    base.get_parameter("model.embed_tokens.weight")[77, 3] = value  # no row of the other checks holds every id
    with pytest.raises(ValueError, match=r"damaged: its tensor 'model\.embed_tokens\.weight' holds 1 values"):
        check_base(base)


def test_a_large_weight_is_looked_at_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_checks, "LARGEST_PIECE", 7)
    weight = torch.zeros(5, 5)
    check_finite_weights("m", [("w", weight), ("ids", torch.arange(3)), ("none", torch.zeros(0))])
    weight[4, 4] = float("nan")
    for tensor in (weight, weight.t()):
        with pytest.raises(ValueError, match="'w' holds 1 values"):
            check_finite_weights("m", [("w", tensor)])


def test_states_that_overflow_are_refused_in_their_own_words() -> None:
    base = tiny_model("llama")
    base.get_parameter("model.norm.weight").fill_(3e38)
    base.get_parameter("model.embed_tokens.weight").mul_(1e3)
    with pytest.raises(ValueError, match=r"hidden states are NaN or infinite in torch\.float32, although all weights"):
        check_base(base)


def test_a_model_that_needs_other_inputs_is_refused() -> None:
    base = tiny_model("llama")

    def fail(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("pixel_values is missing")

    base.base_model.forward = fail
    with pytest.raises(ValueError, match=r"rows of tokens alone in torch\.float32: pixel_values is missing"):
        check_base(base)


@pytest.mark.parametrize("kind", ["pad", "bos", "eos"])
def test_a_special_token_beyond_the_embedding_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    size = len(tokenizer)
    check_vocabulary(size, tokenizer, [0, size - 1])
    tokenizer.add_special_tokens({f"{kind}_token": "[NEW]"})
    with pytest.raises(ValueError, match=rf"{kind} token '\[NEW\]' has the id {size}, .*resize_token_embeddings"):
        check_vocabulary(size, tokenizer, name="m")
    base = tiny_model("llama", vocab_size=size)
    with pytest.raises(ValueError, match=rf"has {size} rows \(ids 0 to {size - 1}\)"):
        check_base(base, tokenizer)
    check_vocabulary(tiny_model("llama", vocab_size=size + 1).config, tokenizer)


def test_only_ids_that_rows_hold_are_refused(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    import copy

    tokenizer = copy.deepcopy(tiny_tokenizer)
    size = len(tokenizer)
    tokenizer.add_tokens(["<think>"])
    check_vocabulary(size, tokenizer, [5, 7])
    with pytest.raises(ValueError, match=rf"model\.name: m: a row holds the token id {size} \('<think>'\)"):
        check_vocabulary(size, tokenizer, [5, size, 7], name="m")
    with pytest.raises(ValueError, match="holds the token id -1"):
        check_vocabulary(size, None, [-1, 3])


def test_before_training_a_good_base_passes(tiny_llama_dir: Path, tiny_gpt2_dir: Path) -> None:
    for folder in (tiny_llama_dir, tiny_gpt2_dir):
        check_before_training(ModelConfig(name=str(folder), dtype="bfloat16"))


def test_before_training_a_bidirectional_base_is_refused(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    base = tiny_model("gemma3_text", vocab_size=300, num_hidden_layers=8, **BIDIRECTIONAL["gemma3_text"])
    model = saved(base, tiny_tokenizer, tmp_path)
    with pytest.raises(ValueError, match=rf"model\.name: '{tmp_path}' .*is not causal"):
        check_before_training(model)


def test_before_training_a_damaged_file_is_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = saved(tiny_model("llama", vocab_size=300), tiny_tokenizer, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor 'model\.layers\.1\.mlp\.up_proj\.weight' holds 1 values"):
        check_before_training(model)


def test_before_training_foreign_tokens_are_refused(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = saved(tiny_model("llama", vocab_size=300), tiny_tokenizer, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"pad token '\[PAD\]' has the id 300"):
        check_before_training(model)


def test_the_small_copy_has_one_layer_of_each_kind() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    config = tiny_model("gemma3_text", num_hidden_layers=7, layer_types=kinds, vocab_size=2000).config
    copy = few_layers(config, "m")
    assert copy is not None
    assert copy.config.layer_types == ["sliding_attention", "sliding_attention", "full_attention"]
    assert copy.config.hidden_size == config.hidden_size
    assert (copy.config.vocab_size, config.vocab_size, config.num_hidden_layers) == (512, 2000, 7)


def test_no_small_copy_is_built_beyond_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loragrid.models.few_layers.MAX_NUMBERS", 100)
    assert few_layers(tiny_model("llama").config, "m") is None
