"""Writes an experiment as the YAML file that repeats it, from the experiment itself or from recorded parameters."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from loragrid.config.experiment import Experiment
from loragrid.config.method_settings import AXIS_SECTIONS
from loragrid.config.yaml_core import CoreDumper
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import MAX_PARAMETER_LENGTH
from loragrid.trials.lengths import LENGTHS

EXPERIMENT_FILE = "experiment.yaml"
"""The artifact of the sweep's run that holds the experiment, with all overrides applied."""


def experiment_to_yaml(experiment: Experiment) -> str:
    """The experiment with all defaults written out, so that a later version with other defaults repeats it exactly."""
    return _to_yaml(experiment.model_dump(mode="json"))


def keep_experiment(recorder: Recorder, experiment: Experiment) -> None:
    """Keep the experiment's file with the sweep's run. The sweep must be open."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / EXPERIMENT_FILE
        path.write_text(experiment_to_yaml(experiment), encoding="utf-8")
        recorder.log_sweep_artifact(path)


def rebuild_experiment(parameters: Mapping[str, str]) -> str | None:
    """The experiment file, rebuilt from a sweep's recorded parameters (`sweep_parameters`).

    It is needed for sweeps that were recorded before sweeps kept the file. None if a parameter was cut because it was
    too long for MLflow.
    """
    if not parameters or any(len(text) >= MAX_PARAMETER_LENGTH for text in parameters.values()):
        return None
    mapping: dict[str, Any] = {}
    for path, text in parameters.items():
        section, _, key = path.partition(".")
        # `grid` holds dotted keys of its own; every other section is one level deep.
        inner = mapping.setdefault(section, {}) if key else mapping
        inner[key or section] = _parse(text)
    training = mapping.get("training", {})
    for written, found in LENGTHS.items():
        if training.get(written) is not None:
            training.pop(found, None)  # computed from the written key; a file with both is refused
    return _to_yaml(mapping)


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _required_keys() -> set[str]:
    """The keys of a trial's sections that every file must have."""
    return {
        f"{section}.{key}"
        for section, config in AXIS_SECTIONS.items()
        for key, field in config.model_fields.items()
        if field.is_required()
    }


def _to_yaml(mapping: Mapping[str, Any]) -> str:
    axes = (mapping.get("grid") or {}).keys() - _required_keys()
    written = {
        # An axis of the grid is left out of its section: a default there need not be among the values of the axis, and
        # is then refused. A required key stays, because the file had it, and so it is among them.
        section: {key: item for key, item in value.items() if f"{section}.{key}" not in axes}
        if isinstance(value, dict)
        else value
        for section, value in mapping.items()
    }
    return yaml.dump(written, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=100)
