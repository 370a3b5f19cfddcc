"""`--set KEY=VALUE` reads the value as the file does, and loses nothing of it; refusals say how to write it."""

from typing import Any

import pytest

from loragrid.config.experiment import Experiment
from loragrid.schema.errors import ExperimentError
from loragrid.trials.load import experiment_from_mapping

BASE: dict[str, Any] = {
    "name": "valid",
    "model": {"name": "smollm2-135m-instruct"},
    "data": {"name": "chitchat"},
    "training": {"steps": 3, "batch_size": 4},
    "methods": ["lora"],
}


def overridden(*overrides: str) -> Experiment:
    return experiment_from_mapping(BASE, "file.yaml", overrides)


def test_an_override_reads_numbers_as_the_file_does() -> None:
    experiment = overridden("training.lr=1e-3", "training.steps=010", "grid.seed=[007,010]", "data.subset=no")
    assert (experiment.training.lr, experiment.training.steps) == (1e-3, 10)
    assert (experiment.grid["seed"], experiment.data.subset) == ((7, 10), "no")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=1_000", 'training.steps: "1_000": is text, because such numbers exist only in YAML 1.1'),
        ("training.steps=1_000", "write 1000; allowed: a whole number"),
        ("training.steps=1:30", "exist only in YAML 1.1"),
        ("training.steps=0b11", "exist only in YAML 1.1"),
        ("training.steps=1e3", "1000.0: is not a whole number: write 1000"),
        ("training.steps=8.0", "8.0: is not a whole number: write 8"),
        ("training.steps=8.5", "8.5: is not a whole number; allowed"),
        ("training.steps=true", "true: is true or false, not a number"),
        ("training.steps='8'", "is text, not a number: leave out the quotes"),
        ("training.lr=0,001", "is text, because a number has no comma"),
        ("training.lr='1e-3'", "is text, not a number: leave out the quotes"),
        ("model.trust_remote_code=yes", "is text, and YAML 1.2 has only true and false: write true"),
        ("model.trust_remote_code=Off", "write false, without quotes"),
        ("workers.use_gpu=on", "write true, without quotes"),
        ("methods.lora.rslora=yes", "methods.0.rslora"),
        ("methods.lora.rank=4.0", "4.0: is not a whole number: write 4"),
        ("grid.seed={ladder: [1_0, 20], points: 2}", '"1_0" is text, because such numbers exist only in YAML 1.1'),
        ("grid.training.lr=[1e-3, '1e-3']", "leave out the quotes"),
        ("data.subset=010", "10: is not text: put it in quotes"),
        ("question=Why #1?", "question: '#1?' would be dropped as a comment: put the value in quotes"),
        ("question=# why", "'# why' would be dropped as a comment"),
        ("training.clip_norm=", "training.clip_norm: has no value; allowed: a value, or null"),
        ("training.clip_norm= ", "has no value"),
        ("grid.seed=[1,000]", "1,000 is not one number"),
    ],
)
def test_an_override_that_would_be_changed_is_refused(override: str, message: str) -> None:
    with pytest.raises(ExperimentError) as refused:
        overridden(override)
    assert message in str(refused.value)


def test_null_must_be_written_out() -> None:
    assert overridden("training.clip_norm=null").training.clip_norm is None
    assert overridden("training.clip_norm= ~").training.clip_norm is None


@pytest.mark.parametrize("value", ["1:30", "1_000", True, 8.0, "8"])
def test_python_refuses_what_a_file_may_not_hold(value: object) -> None:
    with pytest.raises(ValueError, match=r"training\.steps|steps"):
        Experiment(**BASE | {"training": {"steps": value, "batch_size": 4}})
