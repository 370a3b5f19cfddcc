"""An exported member computes what the member computed, loaded into PEFT or merged into the base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loragrid_methods import get_method, method_names
from loragrid_methods.lora import LoRA
from loragrid_methods.stacks.peft_format import layer_tensors, peft_adapter
from tests.support.pack_training import Member, PackRun, TinyModel, small_method, token_ids

EXPORTABLE = [name for name in method_names() if small_method(name).peft_config()]
VARIANTS: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in EXPORTABLE] + [
    ("lora", {"rslora": True, "alpha": 5.0}),
    ("lora_fa", {"rslora": True, "dropout": 0.2}),
    ("vera", {"projection_seed": 4, "d_initial": 0.3}),
    ("delta_lora", {"delta_scale": 0.5, "alpha": 3.0, "start_step": 9}),
]
OTHERS = [name for name in method_names() if name not in EXPORTABLE]
NUM_STEPS = 4


@pytest.fixture(params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tiny_llama_dir: Path, tiny_gpt2_dir: Path) -> Path:
    return {"llama": tiny_llama_dir, "gpt2": tiny_gpt2_dir}[request.param]


def load_base(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return base.requires_grad_(False).eval()


def trained(base: Any, names: list[str], dtype: torch.dtype, **fields: Any) -> PackRun:
    """A pack after a few steps, past Delta-LoRA's snapshot; the learning rate makes the change plain."""
    members = [
        Member(method=small_method(name, rank=3 + index, **fields), seed=index, lr=0.03)
        for index, name in enumerate(names)
    ]
    run = PackRun(base, members, dtype=dtype)
    run.train(NUM_STEPS)
    return run


def member_logits(run: PackRun, member: int) -> Tensor:
    """The logits of one member for the tokens of seed 99."""
    ids = token_ids(run.base, 99, 0)
    with torch.no_grad():
        logits: Tensor = run.base(input_ids=ids.repeat(len(run.members), 1)).logits
    return logits.view(len(run.members), *ids.shape, -1)[member]


def save_adapter(run: PackRun, member: int, folder: Path) -> dict[str, Tensor]:
    config, tensors = peft_adapter(run.pack, member, "the-base")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return tensors


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=str)
@pytest.mark.parametrize("position", [0, 1], ids=["alone", "in a pack"])
def test_peft_loads_the_export_with_equal_logits(
    folder: Path, tmp_path: Path, name: str, fields: dict[str, Any], position: int
) -> None:
    run = trained(load_base(folder), [name] * (position + 1), torch.float32, **fields)
    run.pack.train(False)
    save_adapter(run, position, tmp_path)
    ids = token_ids(run.base, 99, 0)
    base = load_base(folder)
    with torch.no_grad():
        before = base(input_ids=ids).logits
        loaded = PeftModel.from_pretrained(base, str(tmp_path))
        after = loaded(input_ids=ids).logits
    ours = member_logits(run, position)
    assert (ours - before).abs().max().item() > 1e-2
    # float32 logits of size 1: the two add the same terms in another order.
    assert (ours - after).abs().max().item() <= 1e-5
    adapted = {key.split(".lora_A")[0].split(".vera_lambda_d")[0] for key, _ in loaded.named_parameters() if "." in key}
    for layer in run.pack.methods[position].target_layers(run.pack.layers):
        assert f"base_model.model.{layer.name}" in adapted


@pytest.mark.parametrize("name", EXPORTABLE)
def test_the_export_holds_every_target_and_no_more_than_counted(folder: Path, name: str) -> None:
    run = trained(load_base(folder), [name, name], torch.float32)
    for member, method in enumerate(run.pack.methods):
        config, tensors = peft_adapter(run.pack, member, "the-base")
        layers = method.target_layers(run.pack.layers)
        assert len(layers) == (14 if "llama" in folder.name else 8)
        (_,) = {frozenset(layer_tensors(tensors)[layer.name]) for layer in layers}  # every layer has the same tensors
        for layer in layers:
            own = [tensor for key, tensor in tensors.items() if key.startswith(f"base_model.model.{layer.name}.")]
            assert len(own) >= 2
            assert all(tensor.isfinite().all() and tensor.count_nonzero() > 0 for tensor in own)
        assert sum(tensor.numel() for tensor in tensors.values()) == method.num_parameters(run.pack.layers).stored
        assert all(tensor.is_contiguous() and not tensor.requires_grad for tensor in tensors.values())
        assert config["fan_in_fan_out"] is ("gpt2" in folder.name)
        assert config["base_model_name_or_path"] == "the-base"
        assert config.keys() >= {"peft_type", "r", "target_modules", "task_type", "bias", "peft_version"}


def test_an_incomplete_export_is_refused() -> None:
    """PEFT would load the missing layer without a word, as one that changes nothing."""
    run = trained(TinyModel(), ["lora"], torch.float64)
    del run.pack.groups[0][1]["blocks.1.up_proj"]
    with pytest.raises(AssertionError, match=r"blocks\.1\.up_proj"):
        peft_adapter(run.pack, 0, "the-base")


def test_an_export_does_not_change_when_training_goes_on() -> None:
    for name in EXPORTABLE:
        run = trained(TinyModel(), [name], torch.float64)
        _, tensors = peft_adapter(run.pack, 0, "the-base")
        copies = {key: tensor.clone() for key, tensor in tensors.items()}
        run.train(1)
        assert all(torch.equal(tensor, copies[key]) for key, tensor in tensors.items()), name


@pytest.mark.parametrize(("name", "fields"), VARIANTS, ids=str)
@pytest.mark.parametrize("kind", ["nn.Linear", "Conv1D"])
def test_merging_the_updates_into_the_base_gives_the_packs_logits(
    tiny_gpt2_dir: Path, name: str, fields: dict[str, Any], kind: str
) -> None:
    def fresh() -> Any:
        return TinyModel() if kind == "nn.Linear" else load_base(tiny_gpt2_dir, torch.float64)

    run = trained(fresh(), [name, name], torch.float64, **fields)
    run.pack.train(False)
    ids = token_ids(run.base, 99, 0)
    for member in range(2):
        merged = fresh()
        config, tensors = peft_adapter(run.pack, member, "the-base")
        adapter = layer_tensors(tensors)
        assert adapter.keys() == {layer.name for layer in run.pack.methods[member].target_layers(run.pack.layers)}
        with torch.no_grad():
            before = merged(input_ids=ids).logits
            for layer in run.pack.layers:
                weight = merged.get_submodule(layer.name).weight
                out_by_in = weight.mT if layer.transposed else weight
                out_by_in.copy_(run.pack.methods[member].merge(out_by_in, config, adapter[layer.name]))
            after = merged(input_ids=ids).logits
        ours = member_logits(run, member)
        assert (ours - before).abs().max().item() > 1e-3
        assert (ours - after).abs().max().item() <= 1e-12


def test_some_targets_only_are_exported_as_some_only() -> None:
    for name in EXPORTABLE:
        run = trained(TinyModel(), [name], torch.float64, target_modules=("q_proj", "down_proj"))
        config, tensors = peft_adapter(run.pack, 0, "the-base")
        assert config["target_modules"] == ["q_proj", "down_proj"]
        layers = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("down_proj", "q_proj")]
        assert sorted(layer_tensors(tensors)) == layers


@pytest.mark.parametrize("name", OTHERS)
def test_a_method_without_an_adapter_says_so(name: str) -> None:
    run = PackRun(TinyModel(), [Member(method=get_method(name)())])
    with pytest.raises(ValueError, match=f"{name} has no adapter to export"):
        peft_adapter(run.pack, 0, "the-base")


def test_a_method_with_its_own_export_must_define_its_merge() -> None:
    """LoRA's merge would leave out what such an export holds besides."""
    with pytest.raises(TypeError, match="Another exports an adapter of its own"):

        class Another(LoRA):
            def peft_config(self) -> dict[str, Any]:
                return super().peft_config() | {"use_dora": True}


def test_an_adapter_of_an_older_version_is_merged() -> None:
    a, b = torch.randn(2, 5), torch.randn(3, 2)
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 6.0,
        "lora_dropout": 0.1,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": "the-base",
        "task_type": "CAUSAL_LM",
        "bias": "none",
        "fan_in_fan_out": False,
        "peft_version": "0.21.0",
        "inference_mode": True,
    }
    for method in (LoRA, get_method("lora_fa"), get_method("delta_lora")):
        merged = method.merge(torch.zeros(3, 5, dtype=torch.float64), config, {"lora_A.weight": a, "lora_B.weight": b})
        assert torch.equal(merged, 3.0 * (b.double() @ a.double()))


def test_plain_lora_refuses_to_merge_other_kinds_of_lora() -> None:
    run = trained(TinyModel(), ["lora"], torch.float64)
    config, tensors = peft_adapter(run.pack, 0, "the-base")
    own, weight = layer_tensors(tensors)["blocks.0.q_proj"], torch.zeros(12, 12)
    with pytest.raises(ValueError, match=r"use_dora: True cannot be merged by this method"):
        LoRA.merge(weight, config | {"use_dora": True}, own)
    with pytest.raises(ValueError, match=r"tensor 'lora_magnitude_vector' cannot be merged by this method"):
        LoRA.merge(weight, config, own | {"lora_magnitude_vector": weight[0]})
