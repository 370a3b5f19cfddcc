"""Decides where MLflow keeps runs, and refuses an address that is none before anything is started."""

import os
import re
from pathlib import Path

from loragrid.config.local_path import local_path, refuse_unexpanded

_NO_FOLDER = (
    "MLflow keeps no store in a plain folder; allowed: an http(s):// server or a database such as "
    "sqlite:////absolute/path/mlflow.db"
)


def default_tracking_uri(storage_path: str, configured: str | None) -> str:
    """The configured URI, else `MLFLOW_TRACKING_URI`, else an SQLite file in the storage folder.

    Raises:
        ValueError: the URI is a plain folder, which MLflow refuses since 3.13, or SQLite without a file; or no URI is
            configured and the storage folder is remote, or its name has characters with a meaning in a URI.
    """
    uri = configured or os.environ.get("MLFLOW_TRACKING_URI")
    if uri:
        origin = tracking_origin(configured)
        check_tracking_uri(origin, uri)
        path = sqlite_path(uri)
        if path is not None and local_path(origin, str(path)).is_dir():
            raise ValueError(_without_file(origin, uri))
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


def check_tracking_uri(origin: str, uri: str) -> None:
    """Refuse a URI that MLflow cannot use, or would take for another place, whatever there is on this machine.

    Raises:
        ValueError: it has a variable that only a shell replaces, is a plain folder, or SQLite without a file; the
            message begins with `origin`, the key or the environment variable that holds it.
    """
    is_folder = uri.startswith("file:") or ("://" not in uri and not uri.startswith("databricks"))
    if is_folder:
        try:
            refuse_unexpanded(origin, uri)
        except ValueError as error:
            raise ValueError(f"{error}; and {_NO_FOLDER}") from None
    elif uri.startswith("sqlite:"):
        refuse_unexpanded(origin, uri)
    else:  # a password may hold a $, so only what is certainly meant as a variable is refused
        for found in re.finditer(r"\$(?:\{[A-Za-z_]\w*\}|([A-Za-z_]\w*))", uri):
            if found[1] is None or found[1] in os.environ:
                refuse_unexpanded(origin, uri, found[0])
    if is_folder:
        raise ValueError(f"{origin}: {uri!r} is a folder, and {_NO_FOLDER}")
    path = sqlite_path(uri)
    if path is not None and (file := uri.removeprefix("sqlite:///").lstrip("/")).startswith("~"):
        home = local_path(origin, file)
        raise ValueError(f"{origin}: {uri}: ~ is not replaced in a URI; allowed: sqlite:///{home}")
    if uri.startswith("sqlite:") and (path is None or path.name == ":memory:" or uri.endswith("/")):
        raise ValueError(_without_file(origin, uri))


def _without_file(origin: str, uri: str) -> str:
    # MLflow would write artifacts to the working directory.
    return f"{origin}: {uri!r} names no file; allowed: such as sqlite:////absolute/path/mlflow.db"


def tracking_origin(configured: str | None) -> str:
    """The key of the experiment file, or the environment variable, that decides the tracking URI."""
    if configured:
        return "tracking.uri"
    return "MLFLOW_TRACKING_URI" if os.environ.get("MLFLOW_TRACKING_URI") else "storage.path"


def sqlite_path(uri: str) -> Path | None:
    """The file of an `sqlite:///` URI; None for every other store."""
    prefix = "sqlite:///"
    return Path(uri.removeprefix(prefix)).resolve() if uri.startswith(prefix) else None
