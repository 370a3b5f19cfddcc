"""A sweep is resumed only on the base that its trials had."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import loragrid as lg
from loragrid.data.dataset import load_data
from loragrid.models.loading import load_tokenizer, model_digest
from loragrid.sweep.record import open_recorder
from loragrid.trials.tags import MODEL_CONFIG_TAG, MODEL_FILES_TAG, WEIGHTS_TAG
from loragrid.worker.worker_tags import WorkerEnvironment


@pytest.fixture
def settings(valid_experiment: dict[str, Any], tiny_llama_dir: Path, tmp_path: Path) -> dict[str, Any]:
    """An experiment on a base of its own."""
    base = shutil.copytree(tiny_llama_dir, tmp_path / "base")
    return valid_experiment | {"model": {"name": str(base), "dtype": "float32"}}


def record(settings: dict[str, Any], without: frozenset[str] = frozenset()) -> None:
    """Records all trials as finished, with what a worker reports about their base."""
    experiment = lg.Experiment(**settings)
    recorder = open_recorder(experiment)
    recorder.start_sweep("valid-1", {}, {})
    for trial in lg.plan(experiment).trials:
        rows = load_data(trial.data, trial.model, load_tokenizer(trial.model))
        tags = WorkerEnvironment(torch.device("cpu"), 1)(trial, rows)
        kept = {key: value for key, value in tags.items() if key not in without}
        recorder.start_trial(trial.trial_id, trial.parameters(), kept)
        recorder.end_trial(trial.trial_id, "FINISHED")
    recorder.end_sweep("FINISHED")


def other_weights(base: Path) -> None:
    tensors = {name: tensor + 0.01 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


def change_config(base: Path, **keys: object) -> None:
    path = base / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


OLDER = frozenset({MODEL_FILES_TAG, MODEL_CONFIG_TAG})


@pytest.mark.parametrize("without", [frozenset(), OLDER], ids=["now", "older record"])
def test_a_sweep_on_other_weights_is_not_resumed(settings: dict[str, Any], without: frozenset[str]) -> None:
    record(settings, without)
    experiment = lg.Experiment(**settings)
    before = model_digest(experiment.model)
    other_weights(Path(settings["model"]["name"]))
    with pytest.raises(ValueError, match=r"--resume: valid-1: its trial .* was trained on another base") as refused:
        lg.run(experiment, resume=True)
    assert f"({before} recorded, {model_digest(experiment.model)} now)" in str(refused.value)


def test_a_sweep_on_another_config_is_not_resumed(settings: dict[str, Any]) -> None:
    record(settings)
    change_config(Path(settings["model"]["name"]), rms_norm_eps=0.5)
    with pytest.raises(ValueError, match=r"rms_norm_eps 1e-06 recorded, 0\.5 now.*allowed: a new sweep"):
        lg.run(lg.Experiment(**settings), resume=True)


@pytest.mark.parametrize(
    ("without", "change"),
    [
        (frozenset(), lambda base: change_config(base, transformers_version="9.9")),
        (OLDER | {WEIGHTS_TAG}, other_weights),
        (frozenset(), lambda base: (base / "generation_config.json").write_text("{}")),
    ],
    ids=["written by another version", "not recorded", "generation config"],
)
def test_other_changes_are_no_reason(
    settings: dict[str, Any], without: frozenset[str], change: Callable[[Path], object]
) -> None:
    record(settings, without)
    change(Path(settings["model"]["name"]))
    assert lg.run(lg.Experiment(**settings), resume=True).succeeded
