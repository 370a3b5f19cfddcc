"""Keys of transformers, PEFT and others are refused with the key that replaces them, and how the value converts."""

import dataclasses
from typing import Any

import pytest
from peft import LoraConfig

from loragrid.config.experiment import Experiment, ExperimentError
from loragrid.schema.foreign_names import FOREIGN_NAMES
from loragrid.trials.load import experiment_from_mapping
from loragrid_methods import get_method, method_names


def refused(section: str, key: str, value: object) -> str:
    mapping: dict[str, Any] = {
        "name": "foreign",
        "model": {"name": "a-model"},
        "data": {"name": "rows.jsonl"},
        "training": {"steps": 3},
        "methods": [{"name": "lora"}],
        "grid": {},
    }
    node = mapping["methods"][0] if section == "methods" else mapping[section] if section else mapping
    node[key] = value
    with pytest.raises(ExperimentError) as error:
        experiment_from_mapping(mapping, "foreign.yaml")
    return str(error.value)


@pytest.mark.parametrize(
    ("section", "key", "value", "advice"),
    [
        ("training", "num_train_epochs", 3, "unknown key, here training.epochs (the same value)"),
        ("training", "learning_rate", 1e-4, "unknown key, here training.lr (the same value)"),
        ("training", "max_steps", 100, "here training.steps (the same value; for -1 leave it out"),
        ("training", "per_device_train_batch_size", 2, "here training.micro_batch_size (the same value"),
        ("training", "gradient_accumulation_steps", 4, "here training.micro_batch_size (batch_size / (gradient_acc"),
        ("training", "gradient-accumulation-steps", 4, "here training.micro_batch_size (batch_size / (gradient_acc"),
        ("training", "lr_scheduler_type", "cosine", "here training.schedule (constant, linear or cosine"),
        ("training", "max_seq_length", 512, "here data.max_length (the same value; longer rows are skipped"),
        ("training", "seed", 3, "here grid.seed (a list, such as [0, 1, 2])"),
        ("training", "optim", "adamw_torch", "unknown key; leave it out: every method is trained with AdamW"),
        ("methods", "lora_alpha", 16, "unknown setting of lora, here a method's key alpha (the same value)"),
        ("methods", "r", 8, "unknown setting of lora, here a method's key rank (the same value)"),
        ("methods", "lora_dropout", 0.1, "here a method's key dropout (the same value)"),
        ("methods", "learning_rate", 1e-4, "unknown setting of lora, here training.lr (the same value)"),
        ("", "learning_rate", 1e-4, "unknown key, here training.lr (the same value)"),
        ("", "epochs", 3, "unknown key, here training.epochs (the same value)"),
        ("", "base_model", "x", "unknown key, here model.name (the same value)"),
        ("grid", "learning_rate", [1e-4], "unknown axis, here training.lr (the same value)"),
        ("grid", "training.num_train_epochs", [1, 2], "unknown axis, here training.epochs (the same value)"),
        ("grid", "method.r", [4], "here a method's key rank (the same value)"),
        ("methods", "bias", "none", "unknown setting of lora; for none leave it out: adapters leave all biases frozen"),
        ("methods", "inference_mode", False, "unknown setting of lora; leave it out: LoraGrid trains"),
        ("methods", "rank_pattern", {"q_proj": 4}, "leave it out: all layers of a trial have one rank and alpha"),
        ("methods", "alpha_pattern", {"q_proj": 4}, "leave it out: all layers of a trial have one rank and alpha"),
        ("methods", "use_qalora", False, "here methods (a method of its own"),
        ("training", "group_by_length", True, "unknown key; leave it out: the seed shuffles the rows"),
        ("training", "neftune_noise_alpha", 5, "unknown key; leave it out: there is no such change of the loss"),
        ("training", "load_best_model_at_end", True, "leave it out: every trial is measured at its last step"),
        ("training", "tf32", True, "leave it out: the engine chooses kernels"),
        ("", "adapter", "lora", "unknown key, here methods (the method's name, such as [lora]"),
        ("", "finetuning_type", "lora", "unknown key, here methods (the method's name: [lora] or [full])"),
        ("", "sample_packing", True, "unknown key; leave it out: rows are padded and never joined"),
        ("", "template", "llama3", "unknown key, here data.chat_template ("),
        ("", "lora_target_linear", True, "here a method's key target_modules (for true all-linear"),
        ("", "lora_modules_to_save", ["lm_head"], "leave it out: LoraGrid adapts linear layers"),
        ("model", "torch_dtype", "float16", "here model.dtype (bfloat16, float32 or float64)"),
    ],
)
def test_a_foreign_key_is_refused_with_ours(section: str, key: str, value: object, advice: str) -> None:
    assert advice in refused(section, key, value)


@pytest.mark.parametrize(
    ("section", "key", "value", "advice"),
    [
        ("training", "learning_rat", 1e-4, "unknown key; allowed: "),
        ("training", "stepps", 3, "did you mean 'steps'?"),
        ("grid", "rank", [4], "did you mean 'method.rank'?"),
        ("grid", "lr", [1e-4], "did you mean 'training.lr'?"),
    ],
)
def test_our_own_names_are_still_suggested(section: str, key: str, value: object, advice: str) -> None:
    assert advice in refused(section, key, value)


def test_every_key_of_pefts_lora_is_known() -> None:
    keys = {field.name for field in dataclasses.fields(LoraConfig)} - {"auto_mapping", "peft_version"}
    advised = {key for key in keys if key in FOREIGN_NAMES or key in get_method("lora")().hyperparameters()}
    assert keys - advised == set()


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_every_replacement_is_a_key_that_exists(name: str) -> None:
    section, _, key = FOREIGN_NAMES[name].key.partition(".")
    if section == "methods" and key:
        assert any(key in get_method(method)().hyperparameters() for method in method_names())
    elif key and section != "grid":
        assert key in Experiment.model_fields[section].annotation.model_fields  # type: ignore[union-attr]
    else:
        assert section in {"", "grid", "methods"}


@pytest.mark.parametrize("name", FOREIGN_NAMES)
def test_no_replacement_hides_a_key_of_the_same_section(name: str) -> None:
    """A word of ours is in the table only for the sections that do not have it."""
    key = FOREIGN_NAMES[name].key
    assert key.rpartition(".")[2] == name or name not in Experiment.model_fields
