"""Decides where MLflow keeps runs and artifacts, and writes parameter values and tags as text."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

from loragrid.config.local_path import local_path, refuse_unexpanded

Scalar = str | int | float | bool | None
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow refuses longer values (in characters).
MAX_PARAMETER_LENGTH = 6000
MAX_TAG_LENGTH = 8000


def default_tracking_uri(storage_path: str, configured: str | None) -> str:
    """The configured URI, else `MLFLOW_TRACKING_URI`, else an SQLite file in the storage folder.

    Raises:
        ValueError: the URI is a plain folder, which MLflow refuses since 3.13, or SQLite without a file; or no URI is
            configured and the storage folder is remote, or its name has characters with a meaning in a URI.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        origin = tracking_origin(configured)
        if uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks")):
            raise ValueError(
                f"{origin}: {uri!r} is a folder, and MLflow keeps no store in a plain folder; "
                "allowed: an http(s):// server or a database such as sqlite:////absolute/path/mlflow.db"
            )
        path = sqlite_path(uri)
        if path is not None:
            _refuse_shell_path(origin, uri)
        if uri.startswith("sqlite:") and (
            path is None or path.name == ":memory:" or local_path(origin, str(path)).is_dir()
        ):
            # Without a file MLflow would write artifacts to the working directory.
            raise ValueError(f"{origin}: {uri!r} names no file; allowed: such as sqlite:////absolute/path/mlflow.db")
        return uri
    if "://" in storage_path:
        raise ValueError(
            f"storage.path: {storage_path!r} is remote and cannot hold MLflow's SQLite file; "
            "set tracking.uri to a server (http://...) or to a local sqlite:////absolute/path/mlflow.db"
        )
    folder = local_path("storage.path", storage_path, to_be_written=True).resolve()
    if {"?", "%"} & set(str(folder)):
        raise ValueError(
            f"storage.path: {str(folder)!r}: MLflow's SQLite file would land elsewhere, because ? and % have a meaning "
            "of their own in its URI; allowed: a folder without them, or tracking.uri set"
        )
    return f"sqlite:///{folder / 'mlflow.db'}"


def _refuse_shell_path(origin: str, uri: str) -> None:
    """Refuse what MLflow would take for the name of a folder: a variable, or `~`."""
    refuse_unexpanded(origin, uri)
    file = uri.removeprefix("sqlite:///")
    if file.lstrip("/").startswith("~"):
        home = local_path(origin, file.lstrip("/"))
        raise ValueError(f"{origin}: {uri}: ~ is not replaced in a URI; allowed: sqlite:///{home}")


def tracking_origin(configured: str | None) -> str:
    """The key of the experiment file, or the environment variable, that decides the tracking URI."""
    if configured:
        return "tracking.uri"
    return "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "storage.path"


def sqlite_path(uri: str) -> Path | None:
    """The file of an `sqlite:///` URI; None for every other store."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None


def card_tags(card: Any) -> dict[str, str]:
    """A method's card (a dataclass of plain fields) as tags `loragrid.card.<field>`; empty fields are left out."""
    fields = ((field.name, getattr(card, field.name)) for field in dataclasses.fields(card))
    return {f"loragrid.card.{name}": str(value) for name, value in fields if value not in (None, "")}


def format_parameter(value: object) -> str:
    """A parameter value as JSON text (`null`, `true`, `0.001`); text is not quoted."""
    return value if isinstance(value, str) else json.dumps(value, default=str)


def parse_parameter(text: str) -> Scalar:
    """The inverse of `format_parameter` for scalars; a list is returned as its text."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if value is None or isinstance(value, (str, int, float, bool)) else text


def artifact_location(artifact_root: str | None, store: Path | None) -> str | None:
    """The folder for the artifacts of a new experiment, as a URI.

    It is `artifact_root` if given, else the folder `artifacts` beside an SQLite file (`store`). None: MLflow decides.
    """
    if artifact_root is not None:
        if "://" in artifact_root:
            return artifact_root
        return local_path("artifact_root", artifact_root, to_be_written=True).resolve().as_uri()
    # MLflow's default is `./mlruns`, which depends on the working directory.
    return (store.parent / "artifacts").as_uri() if store is not None else None


def cut(text: str, length: int) -> str:
    """The text, shortened to at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"
