"""The end tokens that a base's own files name for its generation."""

from typing import Any

BASE_ENDS = "ends_of_base"
"""The attribute of a loaded tokenizer that holds them, because rows and answers depend on them."""


def base_ends(location: str, revision: str | None) -> tuple[int, ...]:
    """The `eos_token_id` of generation_config.json, else of config.json, sorted; empty if no file names any.

    location: a folder or a hub id. Defaults that a configuration's class adds do not count: nobody has written them.
    """
    from transformers import GenerationConfig, PretrainedConfig

    for kind in (GenerationConfig, PretrainedConfig):
        given: dict[str, Any] = {} if revision is None else {"revision": revision}
        try:
            if kind is GenerationConfig:
                named = GenerationConfig.from_pretrained(location, **given).eos_token_id
            else:
                content, _ = PretrainedConfig.get_config_dict(location, **given)
                named = content.get("eos_token_id", (content.get("text_config") or {}).get("eos_token_id"))
        except Exception:  # a missing or broken file; whoever needs it, says what it lacks
            continue
        ids = named if isinstance(named, list) else [named]
        if found := {number for number in ids if isinstance(number, int) and not isinstance(number, bool)}:
            return tuple(sorted(found))
    return ()
