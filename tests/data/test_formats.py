"""The table of file formats."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet
from transformers import PreTrainedTokenizerBase

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.dataset import load_data
from loragrid.data.files import formats
from loragrid.data.files.file_rows import FileRows
from loragrid.data.files.formats import FORMATS, read_parquet, reader_of
from loragrid.models.loading import load_tokenizer

PAIRS = [{"prompt": f"Is {number} even?", "completion": "no" if number % 2 else "yes"} for number in range(20)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny_llama_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_llama_dir))


@pytest.fixture
def tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    return load_tokenizer(model)


def read_tsv(path: Path) -> FileRows:
    header, *lines = path.read_text(encoding="utf-8").splitlines()
    return FileRows.of([dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines])


def write_tsv(path: Path, rows: list[dict[str, Any]]) -> str:
    lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in rows)]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def test_one_entry_of_the_table_adds_a_format(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, text = write_tsv(tmp_path / "rows.tsv", PAIRS), write_tsv(tmp_path / "text.tsv", [{"text": "Old bridges."}])
    keys: dict[str, Any] = {"max_length": 60, "num_eval": 4}
    for wrong in (
        {"name": rows},
        {"name": "chitchat", "eval_name": rows},
        {"name": "chitchat", "forgetting_name": text},
    ):
        with pytest.raises(ValueError, match=r"\.tsv: .*\.jsonl, \.json, \.csv or \.parquet"):
            load_data(DataConfig.model_validate(keys | wrong), model, tokenizer)
    monkeypatch.setitem(FORMATS, ".tsv", read_tsv)
    found = load_data(
        DataConfig.model_validate(keys | {"name": rows, "test_name": rows, "num_test": 3, "forgetting_name": text}),
        model,
        tokenizer,
    )
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    same = load_data(
        DataConfig.model_validate(keys | {"name": str(path), "test_name": str(path), "num_test": 3}), model, tokenizer
    )
    assert found.digest == same.digest
    assert found.held_out_text is not None
    unknown = tmp_path / "rows.xyz"
    unknown.write_text("x", encoding="utf-8")
    with pytest.raises(ValueError, match=r"rows\.xyz: cannot be read; .*\.jsonl, \.json, \.csv, \.parquet or \.tsv"):
        load_data(DataConfig(name=str(unknown), max_length=60), model, tokenizer)


def test_every_reader_is_in_a_table() -> None:
    readers = {value for name, value in vars(formats).items() if name.startswith("read_")}
    assert readers == {*formats.FORMATS.values(), *formats.TEXT_FORMATS.values()}


def write_table(path: Path, **columns: Any) -> Path:
    parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array(["a", "b"]),
        pyarrow.array(["a", "b"], pyarrow.large_string()),
        pyarrow.array(["a", "b"], pyarrow.string_view()),
        pyarrow.array(["a", "b"]).dictionary_encode(),
    ],
    ids=["string", "large_string", "string_view", "dictionary"],
)
def test_every_type_of_text_in_parquet_is_text(tmp_path: Path, column: Any) -> None:
    assert read_parquet(write_table(tmp_path / "rows.parquet", text=column)).read([1, 0]) == [
        {"text": "b"},
        {"text": "a"},
    ]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([b"a"] * 9),
        pyarrow.array([1.5] * 9),
        pyarrow.array([1] * 9, pyarrow.timestamp("ms")),
        pyarrow.array([["a"]] * 9),
        pyarrow.array([{"a": "b"}] * 9),
    ],
    ids=["binary", "float", "timestamp", "list", "struct"],
)
def test_other_types_in_parquet_are_refused_with_the_row(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, column: Any
) -> None:
    path = write_table(tmp_path / "rows.parquet", text=column)
    with pytest.raises(ValueError, match=r"rows\.parquet: row \d, column text: .*: not text"):
        load_data(DataConfig(name=str(path), max_length=60, num_eval=2), model, tokenizer)


def test_equal_names_of_columns_in_parquet_are_refused(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"])
    parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(ValueError, match="several columns with the name 'text'"):
        read_parquet(tmp_path / "rows.parquet")


def test_nulls_that_parquet_adds_to_objects_are_left_out(tmp_path: Path) -> None:
    messages = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "calls": [{"x": {"y": "1"}}, {"x": {"z": "2"}}]}]
    ]
    path = write_table(tmp_path / "rows.parquet", messages=messages, other=pyarrow.array([None], pyarrow.string()))
    assert read_parquet(path).read([0]) == [{"messages": messages[0], "other": None}]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("rows.jsonl.gz", "it is compressed: unpack it first"),
        ("rows.zip", "it is compressed: unpack it first"),
        ("rows.tsv", "save it as .csv with commas between the fields"),
        ("rows.xlsx", "save the sheet as .csv"),
        ("rows.ndjson", "rename it to .jsonl"),
        ("rows.arrow", "save it as .parquet or .jsonl"),
        ("folder", "it is a folder: name one file"),
        ("folder.csv", "it is a folder: name one file"),
    ],
)
@pytest.mark.parametrize("key", ["name", "eval_name"])
def test_other_files_are_refused_with_the_remedy(
    model: ModelConfig, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, remedy: str, key: str
) -> None:
    path, rows = tmp_path / name, tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in PAIRS), encoding="utf-8")
    path.mkdir() if name.startswith("folder") else path.write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"data\.{key}: .*{remedy}"):
        load_data(DataConfig.model_validate({"name": str(rows), "max_length": 60, key: str(path)}), model, tokenizer)


def test_the_case_of_a_suffix_makes_no_difference(tmp_path: Path) -> None:
    assert reader_of("ROWS.CSV", FORMATS) is FORMATS[".csv"]
    assert reader_of("rows.txt", FORMATS) is None
