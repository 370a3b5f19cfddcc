"""A worker's tags about its base describe the base that it has loaded."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from loragrid.trials.tags import MODEL_FILES_TAG, MODEL_LOCATION_TAG, UNUSED_WEIGHTS_TAG, WEIGHTS_TAG
from loragrid.worker.worker_tags import WorkerEnvironment
from tests.support.small_packs import make_setup


def test_tags_are_those_of_the_base_in_memory(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_dir, base)
    setup = make_setup(base, chat_jsonl, "float32")
    describe = WorkerEnvironment(torch.device("cpu"), 1)
    loaded = describe(setup.trial("lora"), setup.rows, True)
    assert loaded[MODEL_LOCATION_TAG] == str(base)
    tensors = {name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert describe(setup.trial("lora"), setup.rows, False) == loaded
    again = describe(setup.trial("lora"), setup.rows, True)
    assert {key for key in again if again[key] != loaded[key]} == {WEIGHTS_TAG, MODEL_FILES_TAG}
    assert UNUSED_WEIGHTS_TAG not in again
    more = tensors | {"mtp.norm": torch.ones(2)}
    save_file(more, base / "model.safetensors", metadata={"format": "pt"})
    assert describe(setup.trial("lora"), setup.rows, True)[UNUSED_WEIGHTS_TAG] == "mtp.*"
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    assert describe(setup.trial("lora"), setup.rows, True) == again
    shutil.rmtree(base)
    assert describe(setup.trial("lora"), setup.rows, False) == again
