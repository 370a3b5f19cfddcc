"""Decides where MLflow keeps artifacts, and writes parameter values and tags as text."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

from loragrid.config.local_path import local_path
from loragrid.config.tracking_uri import default_tracking_uri, sqlite_path, tracking_origin

__all__ = [
    "RunStatus",
    "Scalar",
    "artifact_location",
    "card_tags",
    "cut",
    "default_tracking_uri",
    "format_parameter",
    "parse_parameter",
    "sqlite_path",
    "tracking_origin",
]

Scalar = str | int | float | bool | None
RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

# MLflow refuses longer values (in characters).
MAX_PARAMETER_LENGTH = 6000
MAX_TAG_LENGTH = 8000


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
