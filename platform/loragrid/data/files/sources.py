"""Opens the rows of a data set (an embedded name, a local file or a hub id) and finds the columns to learn from."""

import hashlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loragrid.config.experiment import DataConfig
from loragrid.config.local_path import local_path, reason_of
from loragrid.data.bad_rows import BadRow
from loragrid.data.files.file_rows import FileRows, without_padding
from loragrid.data.files.formats import FORMATS, TEXT_FORMATS, reader_of, remedy_for
from loragrid.models.hub import NotOnHubError, resolve_commit
from loragrid.schema.errors import MAX_SHOWN_CHARACTERS

MAX_SHOWN_COLUMNS = 30


@dataclass(frozen=True, kw_only=True)
class EmbeddedData:
    """A data set in a Python package; `requirement` is the argument of `pip install`."""

    package: str
    file: str
    requirement: str


EMBEDDED_DATA: Mapping[str, EmbeddedData] = MappingProxyType(
    {"chitchat": EmbeddedData(package="chitchat_dataset", file="dataset.json", requirement="chitchat-dataset==0.9.0")}
)


@dataclass(frozen=True, kw_only=True)
class RowSource:
    """Rows that can be read by number.

    key: the experiment's key that names them, such as `data.name`. fingerprint: changes with their content.
    read: row numbers -> those rows, each as column -> value, or what is wrong with it.
    group_by: the column whose equal values are one group if the experiment names none; None: see `group_of`.
    place: row number -> where the row is in the source, for an error message. broken, notes: see `FileRows`.
    """

    key: str
    name: str
    columns: tuple[str, ...]
    num_rows: int
    fingerprint: str
    read: Callable[[Sequence[int]], list[dict[str, Any] | BadRow]]
    group_by: str | None = None
    place: Callable[[int], str] = lambda index: f"row {index + 1}"
    broken: Mapping[int, BadRow] = field(default_factory=dict)
    notes: Mapping[int, str] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The beginning of an error message about these rows."""
        return f"{self.key}: {self.name}"


def open_train_rows(data: DataConfig) -> RowSource:
    """Open the rows that `data.name` names."""
    return _open(data, "data.name", data.name, data.split)


def open_eval_rows(data: DataConfig) -> RowSource | None:
    """Open the source of the evaluation rows; None if they are taken out of the train rows."""
    return _open_own(data, "eval", data.eval_name, data.eval_split)


def open_test_rows(data: DataConfig) -> RowSource | None:
    """Open the source of the test rows; None if they are taken out of the train rows."""
    return _open_own(data, "test", data.test_name, data.test_split)


def open_held_out_text(data: DataConfig) -> RowSource | None:
    """Open the held-out text that `data.forgetting_name` names, as rows with a column `text`; None without one."""
    key, name = "data.forgetting_name", data.forgetting_name
    if name is None:
        return None
    formats = {**TEXT_FORMATS, **FORMATS}
    if reader_of(name, formats) is None:
        raise ValueError(_not_local(key, name, formats))
    source = _read_file(key, name, formats)
    if "text" not in source.columns:
        raise ValueError(f"{source.title}: has no column text; its columns: {shown_columns(source.columns)}")
    return source


def find_group_column(source: RowSource, group_by: str | None) -> str | None:
    """The source's column whose equal values are one group; None if rows with equal prompts are one group.

    Raises:
        ValueError: the source has no column `group_by`.
    """
    if group_by is None:
        return source.group_by
    if group_by not in source.columns:
        raise ValueError(
            f"data.group_by: {shown_columns([group_by])}: {source.title} has no such column; "
            f"allowed: {shown_columns(source.columns)}, or null for equal prompts"
        )
    return group_by


def _open_own(data: DataConfig, purpose: str, name: str | None, split: str | None) -> RowSource | None:
    if name is not None:
        key = f"data.{purpose}_name"
        if reader_of(name, FORMATS) is None:
            raise ValueError(_not_local(key, name, FORMATS))
        return _read_file(key, name, FORMATS)
    return None if split is None else _open(data, f"data.{purpose}_split", data.name, split)


def _open(data: DataConfig, key: str, name: str, split: str) -> RowSource:
    embedded = EMBEDDED_DATA.get(name)
    path = local_path(key, name)
    if embedded is not None or reader_of(name, FORMATS) or path.exists() or name.startswith(("/", ".", "~")):
        set_for_hub = {key: getattr(data, key) for key in ("revision", "subset", "eval_split", "test_split")}
        set_for_hub["split"] = None if data.split == "train" else data.split
        for field, value in set_for_hub.items():
            if value is not None:
                raise ValueError(f"data.{field}: {value}: {name} is not on the hub; only data sets there have it")
        return _read_chitchat(key, name, embedded) if embedded is not None else _read_file(key, name, FORMATS)
    return _read_hub(data, key, name, split)


def _read_file(key: str, name: str, formats: dict[str, Callable[[Path], FileRows]]) -> RowSource:
    path = local_path(key, name)
    read = reader_of(name, formats)
    if read is None:
        raise ValueError(
            f"{key}: {name}: cannot be read; allowed are local files that end in {_one_of(tuple(formats))}"
            f"{remedy_for(path)}"
        )
    if path.is_dir():
        raise ValueError(f"{key}: {name}: cannot be read{remedy_for(path)}")
    if not path.is_file():
        raise ValueError(f"{key}: {name}: there is no such file in {path.absolute().parent}")
    try:
        return _named(key, name, read(path), _fingerprint(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {name}: {error}") from error


def _not_local(key: str, name: str, formats: Mapping[str, object]) -> str:
    return f"{key}: {name}: not a local {_one_of(tuple(formats))} file{remedy_for(local_path(key, name))}"


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(key: str, name: str, rows: FileRows, fingerprint: str, group_by: str | None = None) -> RowSource:
    def read(indices: Sequence[int]) -> list[dict[str, Any] | BadRow]:
        try:
            return rows.read(indices)
        except ValueError as error:
            raise ValueError(f"{key}: {name}: {error}") from error

    return RowSource(
        key=key,
        name=name,
        columns=rows.columns,
        num_rows=rows.num_rows,
        fingerprint=fingerprint,
        read=read,
        group_by=group_by,
        place=rows.place,
        broken=rows.broken,
        notes=rows.notes,
    )


def _read_chitchat(key: str, name: str, embedded: EmbeddedData) -> RowSource:
    """One row per turn and its reply; consecutive messages of one person are one turn. A conversation is one group."""
    package = importlib.util.find_spec(embedded.package)
    if package is None or package.origin is None:
        raise ValueError(f"{key}: {name}: its package is not installed; run `pip install {embedded.requirement}`")
    content = Path(package.origin).with_name(embedded.file).read_bytes()
    rows: list[dict[str, Any] | BadRow] = []
    for number, conversation in json.loads(content).items():
        turns = ["\n".join(part["text"].strip() for part in turn).strip() for turn in conversation["messages"]]
        for said, answered in itertools.pairwise(turns):
            if said and answered:
                pair = (("user", said), ("assistant", answered))
                messages = [{"role": role, "content": text} for role, text in pair]
                rows.append({"messages": messages, "conversation": number})
    return _named(key, name, FileRows.of(rows), hashlib.sha256(content).hexdigest(), "conversation")


def _read_hub(data: DataConfig, key: str, name: str, split: str) -> RowSource:
    import datasets

    try:
        found = resolve_commit(name, data.revision, "dataset")
    except NotOnHubError as error:
        raise ValueError(
            f"{key}: {name}: unknown data: not an embedded name ({', '.join(EMBEDDED_DATA)}), not a local "
            f"{_one_of(tuple(FORMATS))} file, and on the hub: {error}"
        ) from error
    had_bars = datasets.utils.logging.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        if found.downloaded is not None:
            rows = datasets.load_dataset(str(found.downloaded), data.subset, split=split)
        else:
            rows = datasets.load_dataset(name, data.subset, split=split, revision=data.revision)
    except Exception as error:  # the hub's formats raise errors of many types
        raise ValueError(f"{key}: {name}, split {split}: cannot be loaded: {reason_of(error)}") from error
    finally:
        if had_bars:
            datasets.enable_progress_bars()
    return RowSource(
        key=key,
        name=name,
        columns=tuple(rows.column_names),
        num_rows=len(rows),
        fingerprint=f"{name}@{found.commit}/{data.subset}/{split}",
        read=lambda indices: [without_padding(row) for row in rows.select(list(indices)).to_list()],
    )


def shown_columns(columns: Sequence[str]) -> str:
    """The first column names, shortened and printable: a file can have many columns with long names."""
    names = [name if name.isprintable() else ascii(name) for name in columns[:MAX_SHOWN_COLUMNS]]
    cut = [name if len(name) <= MAX_SHOWN_CHARACTERS else name[: MAX_SHOWN_CHARACTERS - 1] + "…" for name in names]
    more = len(columns) - len(cut)
    return ", ".join([*cut, f"and {more} more"] if more else cut)


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
