"""Folders whose config declares something else than a causal language model are refused in their own words."""

import json
from pathlib import Path

import pytest
import transformers
from transformers import AutoConfig, PreTrainedTokenizerFast

from loragrid.config.experiment import ModelConfig
from loragrid.models.architecture import check_architecture
from loragrid.models.base_checks import check_before_training
from loragrid.models.loading import load_base, load_meta_model, max_context
from tests.support.model_families import SIZES

T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "vocab_size": 96}
BART = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}

REFUSED = [
    ("bert", "BertForMaskedLM", {}, "a masked language model, which sees the tokens that it would have to predict"),
    ("bert", "BertModel", {}, "a model without a language-model head"),
    ("bert", "BertForPreTraining", {}, "an encoder with its pretraining heads"),
    ("roberta", "RobertaForMaskedLM", {}, "a masked language model"),
    ("distilbert", "DistilBertForMaskedLM", {"dim": 32, "n_heads": 4}, "a masked language model"),
    ("modernbert", "ModernBertForMaskedLM", {}, "a masked language model"),
    ("roberta", "RobertaForSequenceClassification", {}, "a sequence classifier: its head gives classes, not tokens"),
    ("llama", "LlamaForSequenceClassification", {}, "a sequence classifier: its head gives classes, not tokens"),
    ("qwen2", "Qwen2ForTokenClassification", {}, "a token classifier: its head gives classes, not tokens"),
    ("gpt2", "GPT2ForQuestionAnswering", {}, "a question-answering model"),
    ("llama", "LlamaModel", {}, "a model without a language-model head (if its head is its embedding"),
    ("t5", "T5ForConditionalGeneration", T5, "an encoder-decoder: its encoder reads the prompt"),
    ("t5", "T5EncoderModel", {**T5, "is_encoder_decoder": False}, "an encoder, which sees the tokens"),
    ("bart", "BartForConditionalGeneration", BART, "an encoder-decoder: its encoder reads the prompt"),
]


def folder_with_config(folder: Path, model_type: str, architecture: str | None, settings: dict[str, object]) -> Path:
    sizes = {} if model_type in ("t5", "bart") else dict(SIZES)
    config = AutoConfig.for_model(model_type, **{**sizes, **settings})
    config.save_pretrained(folder)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    written.pop("architectures", None)
    path.write_text(json.dumps(written | ({} if architecture is None else {"architectures": [architecture]})))
    return folder


@pytest.mark.parametrize(
    ("model_type", "architecture", "settings", "words"), REFUSED, ids=lambda value: str(value)[:24]
)
def test_what_is_no_causal_model_is_refused_before_its_weights_are_read(
    tmp_path: Path, model_type: str, architecture: str, settings: dict[str, object], words: str
) -> None:
    model = ModelConfig(name=str(folder_with_config(tmp_path, model_type, architecture, settings)), dtype="float32")
    for refused in (load_meta_model, load_base, check_before_training):
        with pytest.raises(ValueError) as caught:  # noqa: PT011
            refused(model)
        message = str(caught.value)
        assert message.startswith(f"model.name: {tmp_path}: its config declares {architecture}, {words}")
        assert "allowed: causal language models" in message
        assert "soft-cap" not in message


def test_a_type_without_a_causal_model_is_refused_even_undeclared(tmp_path: Path) -> None:
    folder_with_config(tmp_path, "distilbert", None, {"dim": 32, "n_heads": 4})
    with pytest.raises(ValueError, match="type 'distilbert', of which transformers has no causal language model"):
        load_meta_model(ModelConfig(name=str(tmp_path)))


def test_a_classifier_that_was_really_saved_is_refused(tmp_path: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    config = AutoConfig.for_model("llama", **{**SIZES, "vocab_size": len(tiny_tokenizer), "num_labels": 3})
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification, a sequence classifier"):
        check_before_training(ModelConfig(name=str(tmp_path)))


@pytest.mark.parametrize(
    ("model_type", "architectures"),
    [
        ("llama", ["LlamaForCausalLM"]),
        ("llama", ["LLaMAForCausalLM"]),
        ("gpt2", ["GPT2LMHeadModel"]),
        ("xlm", ["XLMWithLMHeadModel"]),
        ("gemma3", ["Gemma3ForConditionalGeneration"]),
        ("bart", ["BartForCausalLM"]),
        ("llama", None),
    ],
)
def test_causal_models_and_what_they_are_called_pass(model_type: str, architectures: list[str] | None) -> None:
    config = AutoConfig.for_model(model_type)
    config.architectures = architectures
    check_architecture("m", config)


def test_code_that_comes_with_the_model_may_call_it_as_it_likes() -> None:
    config = AutoConfig.for_model("llama")
    config.architectures, config.auto_map = ["ChatModel"], {"AutoModelForCausalLM": "modeling.ChatModel"}
    check_architecture("m", config, trust_remote_code=True)
    with pytest.raises(ValueError, match="declares ChatModel, a model without a language-model head"):
        check_architecture("m", config)


@pytest.mark.parametrize("limit", [-1, 0, 10**30])
def test_a_limit_that_is_none_is_no_context(tiny_llama_dir: Path, tmp_path: Path, limit: int) -> None:
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"max_position_embeddings": limit}))
    assert max_context(ModelConfig(name=str(tmp_path))) is None


def test_xlnet_and_bloom_have_no_limit_and_mpt_has_its_own(tmp_path: Path) -> None:
    xlnet, bloom, mpt = (tmp_path / name for name in ("xlnet", "bloom", "mpt"))
    transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4).save_pretrained(bloom)
    transformers.XLNetConfig(d_model=32, n_layer=2, n_head=4, d_inner=64).save_pretrained(xlnet)
    transformers.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=77).save_pretrained(mpt)
    assert max_context(ModelConfig(name=str(xlnet))) is None
    assert max_context(ModelConfig(name=str(bloom))) is None
    assert max_context(ModelConfig(name=str(mpt))) == 77
