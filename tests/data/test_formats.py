"""The table of file formats."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data import formats
from loragrid.data.dataset import load_data
from loragrid.data.file_rows import FileRows
from loragrid.data.formats import FORMATS
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
