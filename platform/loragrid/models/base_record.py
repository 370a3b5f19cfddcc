"""What is recorded about a base, so that a later program knows whether it has the same one, or what differs."""

import importlib.metadata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from loragrid.config.experiment import ModelConfig
from loragrid.models.base_files import CONFIG, OTHER_FILES, TENSORS, VOLATILE_KEYS, WEIGHTS, file_digests, read_json
from loragrid.models.embedded import EMBEDDED_MODELS
from loragrid.models.loading import model_digest, model_folder

SHA256 = "sha256:"
ANY_PART = ""
"""The part of a difference in a base whose record has one digest for everything."""


@dataclass(frozen=True, kw_only=True)
class BaseRecord:
    """One base at one time.

    weights: see `model_digest`; "" if it is not recorded. location: the absolute folder, the hub id, or the package of
    an embedded model. files: see `file_digests`. config: the contents of `config.json`. Files and config are empty
    unless the base is a folder: a commit and a package do not change.
    """

    weights: str
    location: str = ""
    files: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def commit(self) -> str | None:
        """The commit of a base on the hub; None for every other base."""
        return None if self.weights.startswith(SHA256) or "@" not in self.weights else self.weights.rpartition("@")[2]


@dataclass(frozen=True, kw_only=True)
class BaseDifference:
    """One difference between a recorded base and the one that is there now.

    text: completes the sentence "... differ". part: `WEIGHTS`, a file's name, or `ANY_PART`. matters: False for files
    that no training depends on (generation config, processors of images).
    """

    part: str
    text: str
    matters: bool = True

    @property
    def concerns_tokenizer(self) -> bool:
        """Whether the tokenizer may be another one."""
        return self.part not in (WEIGHTS, CONFIG)

    @property
    def concerns_tokenizer_only(self) -> bool:
        """Whether weights and config are the same."""
        return self.part not in (WEIGHTS, CONFIG, ANY_PART)


def record_base(model: ModelConfig) -> BaseRecord:
    """The record of a base as it is now. The first call for a folder reads its files completely.

    Raises:
        ValueError: the base is not found, or is not a saved model.
    """
    weights = model_digest(model)
    if (embedded := EMBEDDED_MODELS.get(model.name)) is not None:
        version = importlib.metadata.version(embedded.distribution)
        return BaseRecord(weights=weights, location=f"{embedded.distribution}=={version}")
    if not weights.startswith(SHA256):
        return BaseRecord(weights=weights, location=model.name)
    folder = model_folder(model)
    return BaseRecord(
        weights=weights, location=str(folder), files=file_digests(folder), config=read_json(folder / CONFIG)
    )


def compare(recorded: BaseRecord, now: BaseRecord) -> list[BaseDifference]:
    """How a base differs from the recorded one; empty if it is the same, as far as that is recorded."""
    if not recorded.weights:
        return []
    if not (recorded.files and now.files):
        if recorded.weights == now.weights:
            return []
        what = "weights or config.json" if recorded.weights.startswith(SHA256) else "the commit"
        return [BaseDifference(part=ANY_PART, text=f"{what} ({recorded.weights} recorded, {now.weights} now)")]
    return list(_file_differences(recorded, now))


def _file_differences(recorded: BaseRecord, now: BaseRecord) -> Iterator[BaseDifference]:
    for name in sorted({**recorded.files, **now.files}, key=lambda name: (name != WEIGHTS, name != CONFIG, name)):
        then, present = recorded.files.get(name), now.files.get(name)
        if then == present or name == TENSORS:
            continue
        if name == WEIGHTS:
            tensors = recorded.files.get(TENSORS)
            if tensors is not None and tensors == now.files.get(TENSORS):
                continue  # the same tensors in other files
            text = f"the weights ({recorded.weights} recorded, {now.weights} now)"
            if tensors is None:
                text = (
                    f"the weight files ({recorded.weights} recorded, {now.weights} now; this older record does "
                    "not tell whether their tensors differ or only the shards: compare them with a copy of the base)"
                )
        elif name == CONFIG and recorded.config:
            text = f"config.json ({'; '.join(_keys(recorded.config, now.config)) or f'{then} recorded, {present} now'})"
        else:
            text = f"{name} ({then or 'absent when'} recorded, {present or 'absent'} now)"
        yield BaseDifference(part=name, text=text, matters=not any(fnmatch(name, pattern) for pattern in OTHER_FILES))


def _keys(then: Mapping[str, Any], now: Mapping[str, Any], within: str = "") -> Iterator[str]:
    for key in sorted({**then, **now}.keys() - VOLATILE_KEYS):
        before, after = then.get(key), now.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            yield from _keys(before, after, f"{within}{key}.")
        elif before != after:
            yield f"{within}{key} {before} recorded, {after} now"
