"""Refuses a base that its config declares to be something else than a causal language model, in its own words."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KINDS = {
    "ForMaskedLM": "a masked language model, which sees the tokens that it would have to predict",
    "ForPreTraining": "an encoder with its pretraining heads",
    "ForSequenceClassification": "a sequence classifier: its head gives classes, not tokens",
    "ForTokenClassification": "a token classifier: its head gives classes, not tokens",
    "ForMultipleChoice": "a multiple-choice classifier: its head gives one score per choice",
    "ForQuestionAnswering": "a question-answering model: its head marks a span",
    "ForNextSentencePrediction": "a next-sentence classifier",
    "RewardModel": "a reward model: its head gives a score, not tokens",
    "EncoderModel": "an encoder, which sees the tokens that it would have to predict",
    "Model": "a model without a language-model head",
}
"""The end of a class name -> what such a class is. The first that fits counts."""
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")
"""The ends of a causal language model's class name; transformers' own list has the others."""
ENCODER_DECODER = "an encoder-decoder: its encoder reads the prompt, which LoraGrid would give to the decoder"
ALLOWED = "allowed: causal language models (such as LlamaForCausalLM)"


def check_architecture(name: str, config: "PretrainedConfig", *, trust_remote_code: bool = False) -> None:
    """Refuse a config whose model is no causal language model; `name`: the value of model.name.

    `AutoModelForCausalLM` loads many of them: it leaves out an encoder, gives a classifier a random head, or lets a
    masked language model see the next token.

    Raises:
        ValueError: with what the model is.
    """
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    declared = [*(getattr(config, "architectures", None) or [])]
    start = f"model.name: {name}: "
    is_decoder_only = declared and all(each.endswith("ForCausalLM") for each in declared)
    if getattr(config, "is_encoder_decoder", False) is True and not is_decoder_only:
        raise ValueError(f"{start}its config declares {_named(declared)}{ENCODER_DECODER}; {ALLOWED}")
    if remote:
        return
    known = _known_language_models()
    if declared and not any(each in known or each.endswith(LANGUAGE_MODELS) for each in declared):
        raise ValueError(f"{start}its config declares {declared[0]}, {_kind_of(declared[0], config)}; {ALLOWED}")
    if not _has_language_model(config):
        raise ValueError(
            f"{start}its config declares {_named(declared)}a model of type {config.model_type!r}, of which "
            f"transformers has no causal language model; {ALLOWED}"
        )


def _kind_of(class_name: str, config: "PretrainedConfig") -> str:
    kind = next(
        (words for end, words in KINDS.items() if class_name.endswith(end)), "which is no causal language model"
    )
    if kind is not KINDS["Model"] or not _has_language_model(config):
        return kind
    return (
        f"{kind} (if its head is its embedding, load it with AutoModelForCausalLM, check its answers and save it: then "
        "its config declares a head)"
    )


def _named(declared: list[str]) -> str:
    return f"{declared[0]}, " if declared else ""


def _known_language_models() -> set[str]:
    """The classes that AutoModelForCausalLM loads, and those of text and images, whose decoder is one."""
    from transformers.models.auto import modeling_auto

    names: set[str] = set()
    for mapping in (
        modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    ):
        for value in mapping.values():
            names.update([value] if isinstance(value, str) else value)
    return names


def _has_language_model(config: "PretrainedConfig") -> bool:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    return type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
