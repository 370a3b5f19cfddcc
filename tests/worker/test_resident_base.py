"""A worker refuses a base that would train wrongly when it loads it, and records why a base keeps its attention."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loragrid.config.experiment import EngineConfig
from loragrid.worker.resident_base import ResidentBase
from loragrid_methods.stacks.targets import adaptable_layers
from tests.support.model_families import tiny_model
from tests.support.small_packs import Setup, make_setup


@pytest.fixture
def setup(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path) -> Setup:
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    return make_setup(folder, chat_jsonl, "float32")


def resident() -> ResidentBase:
    return ResidentBase(torch.device("cpu"), EngineConfig(), 1)


def test_a_good_base_is_loaded_once(setup: Setup) -> None:
    worker, trial = resident(), setup.trial("lora")
    base = worker.load(trial, setup.rows)
    assert worker.load(trial, setup.rows) is base


def test_a_bidirectional_base_is_refused(setup: Setup) -> None:
    base = tiny_model("gemma3_text", vocab_size=300, head_dim=8, use_bidirectional_attention=True)
    base.save_pretrained(setup.model.name)
    with pytest.raises(ValueError, match="is not causal"):
        resident().load(setup.trial("lora"), setup.rows)


def test_a_damaged_weight_is_named(setup: Setup) -> None:
    path = Path(setup.model.name) / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.0.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.v_proj\.weight' holds 1 values"):
        resident().load(setup.trial("lora"), setup.rows)


@pytest.mark.parametrize("split", ["train", "evaluation", "test"])
def test_rows_with_foreign_tokens_are_refused_before_a_forward(
    setup: Setup, split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = getattr(setup.rows, "evaluation" if split == "test" else split)
    ids = rows.input_ids.clone()
    ids[1, 2] = 300
    changed = replace(setup.rows, **{split: replace(rows, input_ids=ids)})
    monkeypatch.setattr("loragrid.worker.resident_base.check_base", lambda *_, **__: pytest.fail("a forward"))
    with pytest.raises(ValueError, match=r"a row holds the token id 300, and the base's embedding has 300 rows"):
        resident().load(setup.trial("lora"), changed)


def test_the_reason_for_its_own_attention_goes_into_every_choice(setup: Setup) -> None:
    for mode in ("auto", "eager", "graph"):
        worker = ResidentBase(torch.device("cuda"), EngineConfig(mode=mode), 1)  # no GPU is asked for a choice
        worker._base = setup.base()
        worker._layers = adaptable_layers(worker._base, worker._base.get_output_embeddings())
        worker._attention_obstacle = "it has attention sinks"
        assert worker.choose_mode([setup.trial("lora")], 32, 10).attention == "it has attention sinks"
