"""One rule for paths: `~` is the home folder, a relative path starts here, nothing else is replaced or guessed."""

from pathlib import Path

import pytest

from loragrid.config.experiment import ExperimentError, ModelConfig
from loragrid.config.local_path import local_path
from loragrid.models.cache import cache_folder
from loragrid.models.loading import check_weights
from loragrid.tracking.store_uri import default_tracking_uri
from loragrid.tracking.sync import sync_storage
from loragrid.trials.load import experiment_from_mapping


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder and the home folder; DATA_FOLDER is set, UNSET_FOLDER is not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DATA_FOLDER", "/data")
    monkeypatch.delenv("UNSET_FOLDER", raising=False)
    return tmp_path


def test_only_the_home_folder_is_replaced(here: Path) -> None:
    assert local_path("data.name", "~/rows.jsonl") == here / "home" / "rows.jsonl"
    assert local_path("data.name", "rows~1.jsonl") == Path("rows~1.jsonl")
    assert local_path("data.name", "a/../b c/rows.jsonl") == Path("a/../b c/rows.jsonl")


@pytest.mark.parametrize(
    "name",
    ["meta-llama/Llama-3.2-1B", "chitchat", "org/data_set.v2", "100%", "cost$", "a$1.csv", "50%.csv", "~", "/", "ä/ö"],
)
def test_names_without_variables_pass_unchanged(name: str) -> None:
    assert local_path("model.name", name) == Path(name).expanduser()


UNCLEAR = [
    ("$HOME/models", "$HOME, which is '"),
    ("${DATA_FOLDER}/rows.jsonl", "${DATA_FOLDER}, which is '/data' here, is not replaced in a path"),
    ("$UNSET_FOLDER/rows.jsonl", "$UNSET_FOLDER, which is not set here,"),
    ("/no/such/$DATA_FOLDER/x", "$DATA_FOLDER, which is '/data' here"),
    ("${DATA_FOLDER:-/data}/x", "is not replaced in a path"),
    ("$(pwd)/rows.jsonl", "$( is not replaced in a path"),
    ("%DATA_FOLDER%/rows.jsonl", "%DATA_FOLDER%, which is '/data' here"),
    ("%TEMP%\\rows.jsonl", "%TEMP%, which is not set here"),
    ("C:\\data\\rows.jsonl", "is a path of Windows; allowed: a path here, with / between folders"),
    ("C:/data/rows.jsonl", "is a path of Windows"),
    ("data\\rows.jsonl", "is a path of Windows"),
    ("\\\\server\\share", "is a path of Windows"),
    ("rows.jsonl ", "'rows.jsonl ': there are blanks at an end of the path"),
    (" rows.jsonl", "blanks at an end"),
    ("file:///data/my%20rows.jsonl", "is a URI; allowed: the path, /data/my rows.jsonl"),
    ("https://host/rows.jsonl", "is an address, and nothing is downloaded from addresses"),
    ("s3://bucket/rows.jsonl", "is an address"),
    ("~nobody-has-this-name/x", "is not a usable path on this machine"),
]


@pytest.mark.parametrize(("text", "message"), UNCLEAR)
@pytest.mark.parametrize("to_be_written", [False, True])
def test_a_path_that_means_another_file_is_refused(text: str, message: str, to_be_written: bool) -> None:
    with pytest.raises(ValueError, match=r"^data\.name: ") as refused:
        local_path("data.name", text, to_be_written=to_be_written)
    assert message in str(refused.value)


def test_a_file_that_exists_may_have_any_name(here: Path) -> None:
    for name in ("$DATA_FOLDER.jsonl", "a\\b.jsonl", "rows.jsonl "):
        (here / name).touch()
        assert local_path("data.name", name) == Path(name)
        with pytest.raises(ValueError, match=r"^storage\.path: "):
            local_path("storage.path", name, to_be_written=True)


def test_a_new_path_below_an_existing_folder_is_allowed(here: Path) -> None:
    folder = here / "a$DATA_FOLDER"
    folder.mkdir()
    assert local_path("storage.path", str(folder / "store"), to_be_written=True) == folder / "store"


def test_every_place_that_takes_a_path_refuses_a_variable(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("LORAGRID_CACHE", "$DATA_FOLDER/cache")
    places = {
        "model.name": lambda: check_weights(ModelConfig(name="$DATA_FOLDER/model")),
        "storage.path": lambda: default_tracking_uri("$DATA_FOLDER/store", None),
        "tracking.uri": lambda: default_tracking_uri("store", "sqlite:///$DATA_FOLDER/mlflow.db"),
        "--storage": lambda: sync_storage("$DATA_FOLDER/store"),
        "LORAGRID_CACHE": cache_folder,
    }
    for key, use in places.items():
        with pytest.raises(ValueError, match=rf"^{key}: .*\$DATA_FOLDER, which is '/data' here, is not replaced"):
            use()
    assert list(here.iterdir()) == []


def test_the_home_folder_in_a_database_uri_is_refused(here: Path) -> None:
    home = here / "home"
    for uri in ("sqlite:///~/mlflow.db", "sqlite:////~/mlflow.db"):
        with pytest.raises(ValueError, match="~ is not replaced in a URI") as refused:
            default_tracking_uri("store", uri)
        assert f"allowed: sqlite:///{home}/mlflow.db" in str(refused.value)


@pytest.mark.parametrize(
    ("uri", "reason"),
    [
        ("$DATA_FOLDER/mlruns", r"\$DATA_FOLDER, which is '/data' here, is not replaced"),
        ("${DATA_FOLDER}/mlruns", r"\$\{DATA_FOLDER\}, which is '/data' here, is not replaced"),
        ("file:///$NO_SUCH/mlruns", r"\$NO_SUCH, which is not set here, is not replaced"),
        ("sqlite:///${NO_SUCH}/mlflow.db", r"\$\{NO_SUCH\}, which is not set here, is not replaced"),
        ("http://${MLFLOW_HOST}:5000", r"\$\{MLFLOW_HOST\}, which is not set here, is not replaced"),
        ("mysql://user:$DATA_FOLDER@host/db", r"\$DATA_FOLDER, which is '/data' here, is not replaced"),
        ("mlruns", "is a folder, and MLflow keeps no store in a plain folder"),
        ("~/mlruns", "is a folder, and MLflow keeps no store in a plain folder"),
        ("sqlite://", "names no file"),
        ("sqlite:///", "names no file"),
        ("sqlite:///:memory:", "names no file"),
        ("sqlite:///~/mlflow.db", "~ is not replaced in a URI"),
    ],
)
def test_a_tracking_uri_is_checked_when_the_file_is_read(
    here: Path, monkeypatch: pytest.MonkeyPatch, uri: str, reason: str
) -> None:
    with pytest.raises(ExperimentError, match=rf"^tracking\.uri: .*{reason}"):
        experiment_from_mapping(
            {
                "name": "a",
                "model": {"name": "base"},
                "data": {"name": "rows.jsonl"},
                "training": {"steps": 3},
                "methods": ["lora"],
                "tracking": {"uri": uri},
            },
            "",
        )
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)  # the dry run reads it
    with pytest.raises(ValueError, match=rf"^MLFLOW_TRACKING_URI: .*{reason}"):
        default_tracking_uri("store", None)


def test_a_dollar_in_a_password_is_no_variable(here: Path) -> None:
    uri = "postgresql://user:pa$$w0rd$x@host/db"
    assert default_tracking_uri("store", uri) == uri


def test_a_model_that_is_nowhere_shows_the_folder_looked_in(here: Path) -> None:
    with pytest.raises(ValueError, match="not a local folder") as refused:
        check_weights(ModelConfig(name="./models/none"))
    assert f"({here}/models/none)" in str(refused.value)
