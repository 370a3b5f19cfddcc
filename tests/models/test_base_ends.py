"""The end tokens of a base are those that its files name; nothing is guessed."""

import json
from pathlib import Path

import pytest

from loragrid.config.experiment import ModelConfig
from loragrid.models.base_ends import BASE_ENDS, base_ends
from loragrid.models.loading import load_tokenizer
from tests.support.tiny_tokenizers import byte_level, save_tiny_llama


@pytest.mark.parametrize(
    ("generation", "config", "wanted"),
    [
        ({"eos_token_id": [7, 3]}, {"eos_token_id": 1}, (3, 7)),
        ({"eos_token_id": 7}, {}, (7,)),
        ({}, {"eos_token_id": [1, 2]}, (1, 2)),
        (None, {"eos_token_id": 1}, (1,)),
        (None, {"text_config": {"eos_token_id": 4}}, (4,)),
        (None, {"model_type": "llama"}, ()),  # the class's default of 2 is written nowhere
        (None, {"eos_token_id": None}, ()),
        (None, {"eos_token_id": True}, ()),
        ("{", {"eos_token_id": 1}, (1,)),
        (None, None, ()),
    ],
)
def test_the_files_of_a_base_name_its_ends(
    generation: object, config: object, wanted: tuple[int, ...], tmp_path: Path
) -> None:
    for name, content in (("generation_config.json", generation), ("config.json", config)):
        if content is not None:
            (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    assert base_ends(str(tmp_path), None) == wanted


def test_a_loaded_tokenizer_knows_them(tmp_path: Path) -> None:
    save_tiny_llama(byte_level(), tmp_path, eos_token_id=[2, 0])
    assert getattr(load_tokenizer(ModelConfig(name=str(tmp_path))), BASE_ENDS) == (0, 2)
