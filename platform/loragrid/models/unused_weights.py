"""Judges the weights of a checkpoint that its architecture does not use: transformers drops them and only warns."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from loragrid.formatting import count_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedModel

MOST_NAMED = 6
"""The most names that a message lists."""
_ADAPTER = re.compile(
    r"(?:^|\.)(?:base_model\.model|base_layer|modules_to_save|original_module|prompt_encoder|trainable_tokens_\w+|"
    r"(?:lora|hada|lokr|oft|boft|ia3|vera|randlora|fourierft|hra|adaption)_\w+)(?:\.|$)"
)
"""Parts of names that PEFT gives to adapters and to the layers that it wraps."""
_SAVED_TABLE = re.compile(r"(?:masked_bias|causal_mask|(?:attn|attention)\.bias|position_ids|inv_freq|_cached)$")
"""Ends of names of masks and tables that older versions of transformers saved (GPT-Neo, GPT-J); models compute them."""


def check_unused(
    name: str, base: "PreTrainedModel", unexpected: Iterable[str], read: Callable[[str], "Tensor | None"]
) -> list[str]:
    """The names of a checkpoint's weights that `base` does not use; short names stand for whole modules.

    unexpected: what transformers reports, without the names that its own lists tell it to ignore. Buffers that the
    model computes itself are left out. read: the tensor of a name, None if it cannot be read here.

    Raises:
        ValueError: some belong to an adapter, or a layer that `base` has would compute without them, so that it is not
            the model that the checkpoint holds. A bias of zeros changes nothing, and is only named.
    """
    buffers = {key for key, _ in base.named_buffers()}
    own = {key: _own_name(base, key) for key in sorted(unexpected)}
    own = {key: where for key, where in own.items() if where not in buffers}
    if adapters := [key for key in own if _ADAPTER.search(key)]:
        raise ValueError(
            f"model.name: {name}: its weights hold those of an adapter beside the base's, and "
            f"{type(base).__name__} uses none of them: {names_in_short(adapters)}; merge the adapter (PEFT: "
            "merge_and_unload) and save the result, or name a copy without these tensors"
        )
    modules = dict(base.named_modules())
    missed = [key for key, where in own.items() if _is_missed(where, modules) and not _is_zero_bias(key, read)]
    if missed:
        raise ValueError(
            f"model.name: {name}: the checkpoint holds {count_of(len(missed), 'weight')} of layers that "
            f"{type(base).__name__} computes without: {names_in_short(missed)}; so the base would not be the saved "
            "model; correct config.json (the architecture, or a key such as attention_bias), or name a copy "
            "without these tensors if they are meant to be left out"
        )
    return list(dict.fromkeys(_topmost(where, modules) for where in own.values()))


def sentence_about(name: str, unused: Sequence[str]) -> str:
    """What a user is told about unused weights; "" if there are none."""
    return f"model {name}: does not use these weights of its checkpoint: {names_in_short(unused)}" if unused else ""


def names_in_short(names: Sequence[str]) -> str:
    """The names with the numbers of layers together, at most `MOST_NAMED`: model.layers.{2, 3}.*, mtp.*"""
    numbers: dict[str, list[str]] = {}
    for name in names:
        match = re.search(r"\.(\d+)(?=\.|$)", name)
        pattern = name if match is None else f"{name[: match.start(1)]}#{name[match.end(1) :]}"
        numbers.setdefault(pattern, []).extend([match[1]] if match else [])
    listed = [pattern.replace("#", _together(found)) for pattern, found in numbers.items()]
    more = f", and {len(listed) - MOST_NAMED} more" if len(listed) > MOST_NAMED else ""
    return ", ".join(listed[:MOST_NAMED]) + more


def _together(numbers: Sequence[str]) -> str:
    found = sorted({int(number) for number in numbers})
    if len(found) < 2:
        return "".join(map(str, found))
    if len(found) > 2 and found == list(range(found[0], found[-1] + 1)):
        return f"{{{found[0]}..{found[-1]}}}"
    return "{" + ", ".join(map(str, found)) + "}"


def _own_name(base: "PreTrainedModel", key: str) -> str:
    """The name as the model would have it: a checkpoint of the bare model lacks the model's prefix."""
    first, prefix = key.partition(".")[0], base.base_model_prefix
    body = getattr(base, prefix, None) if prefix else None
    return f"{prefix}.{key}" if not hasattr(base, first) and hasattr(body, first) else key


def _is_missed(name: str, modules: "Mapping[str, nn.Module]") -> bool:
    """Whether the name belongs to a layer that the model has, such as a bias of one of its linear maps."""
    parent = name.rpartition(".")[0]
    while parent and parent not in modules:
        parent = parent.rpartition(".")[0]
    if not parent:
        return False
    if _SAVED_TABLE.search(name):
        return False
    is_in_layer = any(part.isdigit() for part in parent.split("."))
    return is_in_layer or any(True for _ in modules[parent].parameters(recurse=False))


def _is_zero_bias(key: str, read: Callable[[str], "Tensor | None"]) -> bool:
    tensor = read(key) if key.endswith("bias") else None
    return tensor is not None and not bool(tensor.any())


def _topmost(name: str, modules: "Mapping[str, nn.Module]") -> str:
    """The largest module of the checkpoint that the model lacks, as `NAME.*`; the name itself if only it is lacking."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        if (start := ".".join(parts[:length])) not in modules:
            return f"{start}.*"
    return name
