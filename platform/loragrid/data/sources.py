"""Opens the rows of a data set (an embedded name, a local file or a hub id) and finds the columns to learn from."""

import hashlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loragrid.config.experiment import DataConfig
from loragrid.config.local_path import local_path, reason_of
from loragrid.data.formats import FORMATS, TEXT_FORMATS, FileRows
from loragrid.models.hub import NotOnHubError, resolve_commit
from loragrid.schema.errors import MAX_SHOWN_CHARACTERS

MAX_SHOWN_COLUMNS = 30
ROW_KINDS = (("messages",), ("prompt", "completion"), ("text",))
"""The canonical columns of each kind of row; a data set is read as exactly one kind."""


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
    group_by: the column whose equal values are one group if the experiment names none; None: see `group_of`.
    """

    key: str
    name: str
    columns: tuple[str, ...]
    num_rows: int
    fingerprint: str
    read: Callable[[Sequence[int]], list[dict[str, Any]]]
    group_by: str | None = None

    @property
    def title(self) -> str:
        """The beginning of an error message about these rows."""
        return f"{self.key}: {self.name}"

    def place(self, index: int) -> str:
        """Where row number `index` stands in the source, for an error message."""
        return f"row {index + 1}"


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
    if Path(name).suffix not in formats:
        raise ValueError(f"{key}: {name}: not a local {_one_of(tuple(formats))} file")
    source = _read_file(key, name, formats)
    find_columns(source, {"text": "text"})
    return source


def find_columns(source: RowSource, columns: Mapping[str, str]) -> dict[str, str]:
    """Canonical column -> the source's own column, for the one kind of row that the source holds.

    columns: the experiment's canonical column -> the source's column; if it is not empty, it selects the kind.

    Raises:
        ValueError: the columns fit no kind of row, or several.
    """
    if columns:
        kinds = [kind for kind in ROW_KINDS if set(columns) <= set(kind)]
        if not kinds:
            raise ValueError(
                f"data.columns: {', '.join(columns)}: belong to different kinds of row; {_allowed_kinds()}"
            )
    else:
        kinds = [kind for kind in ROW_KINDS if set(kind) <= set(source.columns)]
        if len(kinds) > 1:
            found = " or as ".join("+".join(kind) for kind in kinds)
            raise ValueError(
                f"{source.title}: its rows can be read as {found}; choose with data.columns, "
                f"for example {{{kinds[0][0]}: {kinds[0][0]}}}"
            )
        if not kinds:
            raise ValueError(
                f"{source.title}: has the columns {_shown(source.columns)}; {_allowed_kinds()}; data.columns maps them"
            )
    found_columns = {canonical: columns.get(canonical, canonical) for canonical in kinds[0]}
    for canonical, column in found_columns.items():
        if column not in source.columns:
            raise ValueError(
                f"{source.title}: has no column {_shown([column])} (needed for {canonical}); "
                f"its columns: {_shown(source.columns)}"
            )
    return found_columns


def find_group_column(source: RowSource, group_by: str | None) -> str | None:
    """The source's column whose equal values are one group; None if rows with equal prompts are one group.

    Raises:
        ValueError: the source has no column `group_by`.
    """
    if group_by is None:
        return source.group_by
    if group_by not in source.columns:
        raise ValueError(
            f"data.group_by: {_shown([group_by])}: {source.title} has no such column; "
            f"allowed: {_shown(source.columns)}, or null for equal prompts"
        )
    return group_by


def _open_own(data: DataConfig, purpose: str, name: str | None, split: str | None) -> RowSource | None:
    if name is not None:
        key = f"data.{purpose}_name"
        if Path(name).suffix not in FORMATS:
            raise ValueError(f"{key}: {name}: not a local {_one_of(tuple(FORMATS))} file")
        return _read_file(key, name, FORMATS)
    return None if split is None else _open(data, f"data.{purpose}_split", data.name, split)


def _open(data: DataConfig, key: str, name: str, split: str) -> RowSource:
    embedded = EMBEDDED_DATA.get(name)
    path = local_path(key, name)
    if embedded is not None or path.suffix in FORMATS or path.exists() or name.startswith(("/", ".", "~")):
        set_for_hub = {key: getattr(data, key) for key in ("revision", "subset", "eval_split", "test_split")}
        set_for_hub["split"] = None if data.split == "train" else data.split
        for field, value in set_for_hub.items():
            if value is not None:
                raise ValueError(f"data.{field}: {value}: {name} is not on the hub; only data sets there have it")
        return _read_chitchat(key, name, embedded) if embedded is not None else _read_file(key, name, FORMATS)
    return _read_hub(data, key, name, split)


def _read_file(key: str, name: str, formats: Mapping[str, Callable[[Path], FileRows]]) -> RowSource:
    path = local_path(key, name)
    if path.suffix not in formats:
        raise ValueError(
            f"{key}: {name}: cannot be read; allowed are local files that end in {_one_of(tuple(formats))}"
        )
    if not path.is_file():
        raise ValueError(f"{key}: {name}: there is no such file in {path.absolute().parent}")
    try:
        return _named(key, name, formats[path.suffix](path), _fingerprint(path))
    except (OSError, ValueError) as error:
        raise ValueError(f"{key}: {name}: {error}") from error


def _fingerprint(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(key: str, name: str, rows: FileRows, fingerprint: str, group_by: str | None = None) -> RowSource:
    def read(indices: Sequence[int]) -> list[dict[str, Any]]:
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
    )


def _read_chitchat(key: str, name: str, embedded: EmbeddedData) -> RowSource:
    """One row per turn and its reply; consecutive messages of one person are one turn. A conversation is one group."""
    package = importlib.util.find_spec(embedded.package)
    if package is None or package.origin is None:
        raise ValueError(f"{key}: {name}: its package is not installed; run `pip install {embedded.requirement}`")
    content = Path(package.origin).with_name(embedded.file).read_bytes()
    rows = []
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
        read=lambda indices: rows.select(list(indices)).to_list(),
    )


def _shown(columns: Sequence[str]) -> str:
    """The first column names, shortened and printable: a file can have many columns with long names."""
    names = [name if name.isprintable() else ascii(name) for name in columns[:MAX_SHOWN_COLUMNS]]
    cut = [name if len(name) <= MAX_SHOWN_CHARACTERS else name[: MAX_SHOWN_CHARACTERS - 1] + "…" for name in names]
    more = len(columns) - len(cut)
    return ", ".join([*cut, f"and {more} more"] if more else cut)


def _one_of(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _allowed_kinds() -> str:
    return f"allowed: {_one_of(['+'.join(kind) for kind in ROW_KINDS])}"
