"""Stored rows that are damaged are never trained on: they are tokenized again, and the user is told."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.models.cache import DamagedError, read_cached
from loragrid.models.loading import load_tokenizer


@pytest.fixture
def load(tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], TokenizedData]:
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))
    rows = [{"prompt": f"Question {n}:", "completion": f" answer {n}"} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model, data = (
        ModelConfig(name=str(tiny_llama_dir)),
        DataConfig(name=str(tmp_path / "rows.jsonl"), num_eval=2, max_length=64),
    )
    return lambda: load_data(data, model, load_tokenizer(model))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit of the rows": lambda folder: flip(folder / "rows.safetensors", -9),
    "a bit of the header": lambda folder: flip(folder / "rows.safetensors", 3),
    "half of the rows": lambda folder: (folder / "rows.safetensors").write_bytes(
        (folder / "rows.safetensors").read_bytes()[:700]
    ),
    "no rows": lambda folder: (folder / "rows.safetensors").unlink(),
    "empty rows": lambda folder: (folder / "rows.safetensors").write_bytes(b""),
    "no summary": lambda folder: (folder / "summary.json").unlink(),
    "empty summary": lambda folder: (folder / "summary.json").write_text(""),
    "another summary": lambda folder: (folder / "summary.json").write_text("[]"),
    "a number of the summary": lambda folder: (folder / "summary.json").write_text(
        (folder / "summary.json").read_text().replace('num_source_rows\\": 12', 'num_source_rows\\": 13')
    ),
    "bytes that are no text": lambda folder: (folder / "summary.json").write_bytes(b"\xff\xfe"),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_rows_are_made_again_and_it_is_said(
    load: Callable[[], TokenizedData], tmp_path: Path, damage: Callable[[Path], object]
) -> None:
    first = load()
    assert first.remark == ""
    (folder,) = [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]
    damage(folder)
    mended = load()
    assert "were damaged" in mended.remark
    assert str(folder) in mended.remark
    assert (mended.digest, mended.num_source_rows, mended.skipped) == (first.digest, 12, first.skipped)
    assert load().remark == ""


def test_the_largest_token_is_that_of_all_rows(load: Callable[[], TokenizedData]) -> None:
    data = load()
    every = (data.train, data.evaluation)
    assert data.largest_token == max(int(rows.input_ids.max()) for rows in every)


def test_one_process_mends_while_others_wait(tmp_path: Path) -> None:
    folder, filled = tmp_path / "rows", []
    folder.mkdir()

    def fill(unfinished: Path) -> None:
        filled.append(unfinished)
        (unfinished / "whole").touch()

    def read(found: Path) -> str:
        if not (found / "whole").exists():
            raise DamagedError("not whole")
        return found.name

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda _: read_cached(folder, fill, read), range(8)))
    assert len(filled) == 1
    assert sorted(results) == [("rows", "")] * 7 + [("rows", "not whole")]


def test_a_file_in_place_of_the_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "rows").write_text("")
    assert read_cached(tmp_path / "rows", lambda folder: (folder / "whole").touch(), lambda folder: folder.name) == (
        "rows",
        "",
    )
