"""A written model folder has the base's own config and files, whatever the family."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPTNeoXConfig,
    MambaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    Qwen3Config,
)

from loragrid.config.experiment import ModelConfig
from loragrid.models.attention import use_causal_attention
from loragrid.models.base_files import (
    base_config,
    companion_files,
    copy_companions,
    file_digests,
    read_json,
    set_chat_template,
)
from loragrid.models.loading import load_base
from loragrid.worker.export import complete_model_folder

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TEXT_PART = SIZES | {"head_dim": 8, "max_position_embeddings": 128}
IMAGE_PART = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
FAMILIES: dict[str, Any] = {
    "gpt2": lambda: GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "neox": lambda: GPTNeoXConfig(**SIZES),
    "opt": lambda: OPTConfig(**SIZES, ffn_dim=64, word_embed_proj_dim=32),
    "qwen2 tied": lambda: Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3 untied": lambda: Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=False),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),
    "mamba": lambda: MambaConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, state_size=8),
    "gemma3 with images": lambda: Gemma3Config(
        text_config=TEXT_PART,
        vision_config=IMAGE_PART | {"image_size": 28, "patch_size": 14},
        mm_tokens_per_image=4,
    ),
}


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_slice(name).get_shape() for name in list(file.keys())}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_configs_differ_from_the_bases_in_their_type_only(family: str, dtype: Any, tmp_path: Path) -> None:
    config = FAMILIES[family]()
    with torch.random.fork_rng(devices=[]):
        build: Any = Gemma3ForConditionalGeneration if "images" in family else AutoModelForCausalLM.from_config
        build(config).save_pretrained(tmp_path / "base")
    own = read_json(tmp_path / "base" / "config.json") | {"an_own_key": {"x": 1}}
    own["torch_dtype"] = own.pop("dtype")  # as older versions write it
    (tmp_path / "base" / "config.json").write_text(json.dumps(own))
    base = load_base(ModelConfig(name=str(tmp_path / "base"), dtype=dtype))
    base.save_pretrained(tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json").get("use_cache") is False
    complete_model_folder(tmp_path / "out", tmp_path / "base", own)
    written = read_json(tmp_path / "out" / "config.json")
    expected = json.loads(json.dumps(own).replace('"float32"', f'"{dtype}"'))
    assert written == expected
    assert tensor_shapes(tmp_path / "out") == tensor_shapes(tmp_path / "base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert str(loaded.dtype) == f"torch.{dtype}"
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, base(input_ids=ids).logits)


def test_nothing_of_the_training_attention_is_written(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base = load_base(ModelConfig(name=str(tiny_llama_dir), dtype="float32"))
    assert use_causal_attention(base, torch.arange(8).unsqueeze(0)) == ""
    base.save_pretrained(tmp_path)
    complete_model_folder(tmp_path, None, None)
    text = "".join(path.read_text() for path in tmp_path.glob("*.json"))
    assert "attn_implementation" not in text
    assert "loragrid" not in text
    assert "use_cache" not in (tmp_path / "config.json").read_text()


def test_a_config_of_another_model_is_not_taken() -> None:
    """The base's folder was overwritten while a full fine-tuning ran."""
    written = {"hidden_size": 32, "dtype": "bfloat16", "use_cache": False, "part": {"size": 3}}
    assert base_config(written, {"hidden_size": 64, "dtype": "float32", "use_cache": True}) == {
        "hidden_size": 32,
        "dtype": "bfloat16",
        "use_cache": True,
        "part": {"size": 3},
    }
    assert "use_cache" not in base_config(written, {"part": {"size": 4}})
    assert "use_cache" not in base_config(written, None)


def test_parts_of_a_config_get_the_written_type() -> None:
    own = {"dtype": "float16", "text_config": {"dtype": "float16", "use_cache": True}, "vision_config": {}}
    assert base_config({"dtype": "float32"}, own) == {
        "dtype": "float32",
        "text_config": {"dtype": "float32", "use_cache": True},
        "vision_config": {},
    }


KEPT = [
    "LICENSE.txt",
    "added_tokens.json",
    "additional_chat_templates/rag.jinja",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "tokenization_own.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
]
LEFT = [
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "checkpoint-5/tokenizer.json",
    "config.json",
    "model.safetensors.index.json",
    "optimizer.pt",
    "pytorch_model.bin",
    "train.jsonl",
    "trainer_state.json",
    "training_args.bin",
]


def test_everything_but_weights_and_leftovers_is_copied(tmp_path: Path) -> None:
    for name in (*KEPT, *LEFT):
        path = tmp_path / "base" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"name": name}))
    assert [path.as_posix() for path in companion_files(tmp_path / "base")] == sorted(KEPT)
    copy_companions(tmp_path / "base", tmp_path / "whole")
    for name in KEPT:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    copy_companions(tmp_path / "base", tmp_path / "tokenizer", tokenizer_only=True)
    left_out = {path.name for path in (tmp_path / "whole").iterdir()} - {
        path.name for path in (tmp_path / "tokenizer").iterdir()
    }
    assert left_out == {
        "LICENSE.txt",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    }


@pytest.mark.parametrize("name", [name for name in KEPT if name != "LICENSE.txt"])
def test_a_change_of_any_file_changes_its_digest(tmp_path: Path, name: str) -> None:
    for file in (*KEPT, "config.json", "model.safetensors"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    before = file_digests(tmp_path)
    (tmp_path / name).write_text('{"a": 1}')
    after = file_digests(tmp_path)
    assert [key for key in before if before[key] != after[key]] == [name]


def test_the_given_template_wins_over_every_other(tiny_llama_dir: Path, tmp_path: Path) -> None:
    copy_companions(tiny_llama_dir, tmp_path)
    settings = read_json(tmp_path / "tokenizer_config.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "in the config"}))
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "of a processor"}))
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "default.jinja").write_text("a default beside it")
    set_chat_template(tmp_path, "mine")
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == "mine"
