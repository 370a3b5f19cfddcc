"""A storage path or tracking URI that is unusable or ambiguous is refused before anything starts."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loragrid.planning.dry_run import prepare
from loragrid.sweep.run import run, teller
from loragrid.trials.load import experiment_from_mapping
from tests.support.refusals import Refuses, Write, everything_in


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("~nobody-has-this-name/x", "is not a usable path on this machine"),
        ("x" * 300, "is not a usable path on this machine: File name too long"),
        ("../experiment.yaml", "cannot be written: File exists"),
        ("../experiment.yaml/x", "cannot be written: Not a directory"),
        ("/proc/no/such", "cannot be written"),
        ("s3://bucket/x", "is remote"),
        ("file:///tmp/x", "is remote"),
        ("$HOME/store", "$HOME, which is '"),
        ("store ", "there are blanks at an end of the path"),
        ("C:\\store", "is a path of Windows"),
        ("s3://$BUCKET/store", "is remote"),
        ("a?b", "would land elsewhere"),
        ("a%20b", "would land elsewhere"),
    ],
)
def test_a_storage_that_cannot_be_written_is_refused(refuses: Refuses, write: Write, path: str, part: str) -> None:
    refuses(write("storage.path", path), "error: storage.path: ", part)


@pytest.mark.parametrize(
    "uri",
    [
        "runs",
        "file:///tmp/runs",
        "no-such-scheme://x",
        "://",
        "databricks-nonsense",
        "sqlite://",
        "sqlite:///",
        "sqlite:////",
        "sqlite:////proc/no/such/mlflow.db",
        "sqlite:///:memory:",
        "sqlite:///../experiment.yaml",
        "sqlite:///$HOME/mlflow.db",
        "sqlite:///~/mlflow.db",
        "sqlite:///" + "x" * 300,
        "no-such-database+no_such_driver://user@host/x",
    ],
)
def test_a_store_that_mlflow_cannot_open_is_refused(refuses: Refuses, write: Write, tmp_path: Path, uri: str) -> None:
    refuses(write("tracking.uri", uri), "tracking.uri: ", may_write=tmp_path / "store")


@pytest.mark.parametrize("uri", ["no-such-scheme://bucket/x", "file://elsewhere/x", "://"])
def test_a_uri_that_is_no_storage_is_refused(
    refuses: Refuses, write: Write, valid_experiment: dict[str, Any], tmp_path: Path, uri: str
) -> None:
    valid_experiment["tracking"] = {"uri": f"sqlite:///{tmp_path}/record.db"}
    refuses(write("storage.path", uri), f"error: storage.path: {uri}: ", "allowed: a folder, or a URI such as s3://")


@pytest.mark.parametrize("name", ["../../x", "/etc/x", "a/b", "..", "", "a\n", "a\0", "x" * 121])
def test_a_sweeps_name_that_is_no_folders_is_refused(
    refuses: Refuses, valid_experiment: dict[str, Any], tmp_path: Path, name: str
) -> None:
    before = everything_in(tmp_path)
    with pytest.raises(ValueError, match=r"^--name: .*letters, digits"):
        run(experiment_from_mapping(valid_experiment, "x"), name=name)
    assert everything_in(tmp_path) == before


def test_brackets_in_a_name_are_printed_as_they_are(valid_experiment: dict[str, Any], tmp_path: Path) -> None:
    rows = tmp_path / "[bold]rows[" / "red].jsonl"
    rows.parent.mkdir()
    rows.write_bytes(Path(valid_experiment["data"]["name"]).read_bytes())
    valid_experiment["data"]["name"] = str(rows)
    printed = io.StringIO()
    prepare(experiment_from_mapping(valid_experiment, "x"), teller(Console(file=printed, width=1000)))
    assert f"data {rows}: " in printed.getvalue()
