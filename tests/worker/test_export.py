"""Exported members: the model that PEFT or transformers loads computes what the member computed in its pack."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from loragrid.config.experiment import ModelConfig
from loragrid.models.loading import load_base, load_tokenizer
from loragrid.worker.export import ADAPTER_CONFIG, ADAPTER_TENSORS, export_member, export_merged, merge_adapter
from loragrid_methods import get_method, method_names
from loragrid_methods.lora import LoRA
from loragrid_methods.stacks.pack import member_order
from tests.support.small_packs import Run, Setup, make_setup, run_pack

ADAPTERS = [name for name in method_names() if get_method(name)().peft_config()]
NAMES = [[*ADAPTERS, "frozen"][index] for index in member_order([get_method(name)() for name in [*ADAPTERS, "frozen"]])]
"""Methods with an adapter and one without, in the order in which a pack takes them."""


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def setup(request: pytest.FixtureRequest, tiny_gpt2_dir: Path, tiny_llama_dir: Path, chat_jsonl: Path) -> Setup:
    """GPT-2 stores its weights transposed; Llama has layers of several shapes."""
    return make_setup({"gpt2": tiny_gpt2_dir, "llama": tiny_llama_dir}[request.param], chat_jsonl, "float64")


@pytest.fixture(scope="module")
def run(setup: Setup) -> Run:
    fields: dict[str, dict[str, Any]] = {
        "lora": {"rank": 3, "alpha": 5.0},
        "lora_plus": {"rank": 4, "alpha": 5.0, "rslora": True},
        "delta_lora": {"rank": 4, "alpha": 5.0},
    }
    trials = [setup.trial(name, fields.get(name), lr=0.1 if name == "vera" else 0.01) for name in NAMES]
    return run_pack(setup, trials)


@torch.no_grad()
def logits_of(model: torch.nn.Module, setup: Setup, num_members: int = 1) -> list[Tensor]:
    ids = setup.rows.evaluation.input_ids[:2]
    return list(model(input_ids=ids.repeat(num_members, 1)).logits.chunk(num_members))


def difference(ours: Tensor, theirs: Tensor) -> float:
    return (ours - theirs).abs().max().item()


def tolerance(setup: Setup) -> float:
    """Llama computes its norms in float32 whatever the model's type."""
    return {"gpt2": 1e-11, "llama": 1e-5}[setup.base().config.model_type]


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_an_exported_member_and_computes_the_same(setup: Setup, run: Run, name: str, tmp_path: Path) -> None:
    member = NAMES.index(name)
    assert export_member(run.model, member, "the-base", tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / ADAPTER_CONFIG).read_text())["base_model_name_or_path"] == "the-base"
    loaded = PeftModel.from_pretrained(setup.base(), tmp_path / "adapter", autocast_adapter_dtype=False).double()
    expected = logits_of(run.model.base, setup, len(NAMES))[member]
    (bare,) = logits_of(setup.base(), setup)
    assert difference(expected, bare) > 1e-3
    assert difference(logits_of(loaded, setup)[0], expected) <= tolerance(setup)


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_merged_base_computes_the_same(setup: Setup, run: Run, name: str, tmp_path: Path) -> None:
    member = NAMES.index(name)
    export_member(run.model, member, "the-base", tmp_path)
    base = setup.base()
    merge_adapter(base, tmp_path, get_method(name))
    expected = logits_of(run.model.base, setup, len(NAMES))[member]
    assert difference(logits_of(base, setup)[0], expected) <= tolerance(setup)


def test_merging_into_bfloat16_rounds_once(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "bfloat16")
    run = run_pack(setup, [setup.trial("lora", {"rank": 3, "alpha": 7.0})])
    export_member(run.model, 0, "the-base", tmp_path)
    base, merged = setup.base(), setup.base()
    merge_adapter(merged, tmp_path, LoRA)
    tensors = load_file(tmp_path / ADAPTER_TENSORS)
    names = [key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")]
    assert len(names) == 14
    for name in names:
        a, b = tensors[f"{name}.lora_A.weight"].double(), tensors[f"{name}.lora_B.weight"].double()
        layer = name.removeprefix("base_model.model.")
        exact = base.get_parameter(f"{layer}.weight").double() + 7.0 / 3 * (b @ a)
        assert torch.equal(merged.get_parameter(f"{layer}.weight"), exact.bfloat16())


def test_a_full_fine_tuned_model_loads_in_transformers(setup: Setup, tmp_path: Path) -> None:
    run = run_pack(setup, [setup.trial("full", lr=0.003)])
    assert export_member(run.model, 0, "the-base", tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64)
    trained, bare = run.model.base.state_dict(), setup.base().state_dict()
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, trained[key])
        assert not torch.equal(tensor, bare[key])


def test_the_frozen_base_leaves_nothing_to_write(run: Run, tmp_path: Path) -> None:
    assert not export_member(run.model, NAMES.index("frozen"), "the-base", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_exporting_leaves_the_member_as_it_is(setup: Setup, run: Run, tmp_path: Path) -> None:
    before = logits_of(run.model.base, setup, len(NAMES))
    for member, name in enumerate(NAMES):
        export_member(run.model, member, "the-base", tmp_path / name)
    after = logits_of(run.model.base, setup, len(NAMES))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(before, after, strict=True))


def test_an_adapter_with_an_unknown_layer_is_refused(setup: Setup, run: Run, tmp_path: Path) -> None:
    export_member(run.model, 0, "the-base", tmp_path)
    tensors = load_file(tmp_path / ADAPTER_TENSORS)
    renamed = {key.replace(".0.", ".7."): tensor for key, tensor in tensors.items()}
    save_file(renamed, tmp_path / ADAPTER_TENSORS)
    base = setup.base()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match=r"the adapter has a layer '.*\.7\..*' that the model lacks"):
        merge_adapter(base, tmp_path, LoRA)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())


def test_an_adapter_of_another_kind_is_not_merged(setup: Setup, run: Run, tmp_path: Path) -> None:
    export_member(run.model, NAMES.index("vera"), "the-base", tmp_path)
    base = setup.base()
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match=r"peft_type: 'VERA' cannot be merged by this method; allowed: LORA"):
        merge_adapter(base, tmp_path, LoRA)
    assert all(torch.equal(tensor, before[key]) for key, tensor in base.state_dict().items())


def test_a_merged_export_is_a_model_folder_with_a_tokenizer(setup: Setup, run: Run, tmp_path: Path) -> None:
    export_member(run.model, 0, setup.model.name, tmp_path / "adapter")
    export_merged(setup.model, tmp_path / "adapter", get_method(NAMES[0]), tmp_path / "merged")
    merged = ModelConfig(name=str(tmp_path / "merged"), dtype="float64")
    loaded: PreTrainedModel = load_base(merged)
    expected = logits_of(run.model.base, setup, len(NAMES))[0]
    assert difference(logits_of(loaded, setup)[0], expected) <= tolerance(setup)
    text = "Which door has the harbour?"
    assert load_tokenizer(merged)(text).input_ids == load_tokenizer(setup.model)(text).input_ids
