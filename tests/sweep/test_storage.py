"""The places of an experiment's files, for every way to write `storage.path`."""

from pathlib import Path
from typing import Any

import pytest

import loragrid as lg
from loragrid.sweep.storage import below, storage_uri, trial_store


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a folder/100%?", "/a folder/100%?/ray/sweep-1"),
        ("s3://bucket/path", "s3://bucket/path/ray/sweep-1"),
        ("s3://bucket/path/?scheme=http&endpoint_override=host:9000", None),
    ],
)
def test_a_uris_options_stay_behind_the_folders_below_it(uri: str, expected: str | None) -> None:
    expected = expected or "s3://bucket/path/ray/sweep-1?scheme=http&endpoint_override=host:9000"
    assert below(below(uri, "ray"), "sweep-1") == expected


def test_sweeps_in_a_uri_with_options_have_own_folders(valid_experiment: dict[str, Any], tmp_path: Path) -> None:
    experiment = lg.Experiment(**valid_experiment | {"storage": {"path": f"file://{tmp_path}/b?option=1"}})
    trial_store(experiment, "sweep-1").mark_ended("lora-1")
    assert (tmp_path / "b" / "trials" / "sweep-1" / ".ended" / "lora-1").exists()
    assert trial_store(experiment, "sweep-2").ended() == set()


def test_a_uri_with_a_fragment_is_refused(valid_experiment: dict[str, Any], tmp_path: Path) -> None:
    experiment = lg.Experiment(**valid_experiment | {"storage": {"path": f"file://{tmp_path}/a#b"}})
    with pytest.raises(ValueError, match=r"storage\.path: .* allowed: %23"):
        storage_uri(experiment)
