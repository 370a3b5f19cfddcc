"""Packed greedy decoding returns, row by row, the tokens that transformers generates with each member's model."""

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    RwkvConfig,
    RwkvForCausalLM,
)

from loragrid.config.experiment import EngineConfig
from loragrid.evaluation.generation import Decoding, check_generation, generate, next_tokens
from loragrid.models.activation_checkpointing import checkpoint_activations
from loragrid.models.attention import NAME, use_causal_attention
from loragrid.models.logits import LogitTransform
from loragrid.tasks.kinds.exact_match import ExactMatch
from loragrid.training.assembly import build_model
from loragrid.training.step import PackModel, one_worker
from loragrid.worker.export import export_member, merge_adapter
from loragrid.worker.resident_base import ResidentBase
from loragrid_methods import get_method, method_names
from tests.support.model_families import VOCABULARY, tiny_model
from tests.support.small_packs import Setup, make_setup, mixed_trials

NUM_NEW = 24
PAD = 0
PROMPTS = [
    [5, 9, 200, 31, 77, 8, 150, 42, 99, 12, 13, 14, 15, 250],
    [7],
    [60, 61, 62, 201, 90],
    [1, 33, 34, 35, 36, 37, 38, 39, 40, 41, 43, 44, 45, 46, 47, 48, 49, 50, 51, 52],
    [222, 111],
]
KEYS = [f"row {number}" for number in range(len(PROMPTS))]


@pytest.fixture(scope="module", params=["llama float32", "gpt2 float64"])
def setup(request: pytest.FixtureRequest, tiny_llama_dir: Path, tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    name, dtype = request.param.split()
    return make_setup({"llama": tiny_llama_dir, "gpt2": tiny_gpt2_dir}[name], chat_jsonl, dtype)


def decoding(*ends: int, pad: int = PAD, **fields: float) -> Decoding:
    return Decoding(**{"max_new_tokens": NUM_NEW, "end_token_ids": ends, "pad_token_id": pad} | fields)  # type: ignore[arg-type]


def lively_base(setup: Setup) -> PreTrainedModel:
    """The random base with weights so large that it says something else at every token."""
    base = setup.base()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.dim() > 1 and "wte" not in name and "embed" not in name:
                parameter.mul_(6.0)
    return base


def lively_pack(setup: Setup) -> PackModel:
    """All packable methods with adapters drawn at random, so that no two members say the same."""
    model = build_model(mixed_trials(setup), lively_base(setup))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for stack in model.pack.stacks():
            for parameter in stack.parameters():
                # Padded rows and columns of smaller ranks are zero, and stay so.
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3
                for member in range(stack.num_members):
                    name = next(name for name, own in stack.named_parameters() if own is parameter)
                    view = stack.without_padding(name, parameter[member], member)
                    part = stack.without_padding(name, noise[member], member)
                    view.add_(part.to(view.dtype))
    return model


def alone(model: PackModel, member: int, setup: Setup, folder: Path) -> PreTrainedModel:
    """The base with one member's exported adapter merged into it."""
    base = lively_base(setup)
    if export_member(model, member, "base", folder):
        merge_adapter(base, folder, type(model.pack.methods[member]))
    return base


def by_transformers(base: Any, prompt: Sequence[int], ends: Sequence[int]) -> list[int]:
    """What transformers' own greedy decoding answers to a single prompt, without the token that ended it."""
    ids = torch.tensor([list(prompt)])
    found: list[int] = base.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        num_beams=1,
        max_new_tokens=NUM_NEW,
        eos_token_id=list(ends) or None,
        pad_token_id=PAD,
        use_cache=True,
    )[0, len(prompt) :].tolist()
    end = next((index for index, token in enumerate(found) if token in ends), len(found))
    return found[:end]


def test_greedy_answers_equal_transformers_on_the_merged_model(setup: Setup, tmp_path: Path) -> None:
    model = lively_pack(setup)
    endless = generate(model, PROMPTS, KEYS, decoding(), one_worker)
    # Tokens that the answers do hold, so that rows end early, late and never.
    counted = torch.tensor([token for rows in endless for row in rows for token in row]).bincount()
    ends = counted.argsort(descending=True)[4:7].tolist()
    packed = generate(model, PROMPTS, KEYS, decoding(*ends), one_worker)
    assert {name for name in method_names() if get_method(name).packable} == {
        method.name for method in model.pack.methods
    }
    assert all(len(row) == NUM_NEW for rows in endless for row in rows)
    assert len({tuple(map(tuple, rows)) for rows in packed}) >= len(packed) - 1  # two frozen members are the same
    assert len({len(row) for rows in packed for row in rows}) >= 8
    for member in range(model.pack.num_members):
        single = alone(model, member, setup, tmp_path / str(member))
        assert packed[member] == [by_transformers(single, prompt, ends) for prompt in PROMPTS], member


def test_peft_answers_the_same_with_the_exported_adapter(setup: Setup, tmp_path: Path) -> None:
    import peft

    model = lively_pack(setup)
    packed = generate(model, PROMPTS, KEYS, decoding(), one_worker)
    names = [method.name for method in model.pack.methods]
    for name in ("lora", "vera"):
        member = names.index(name)
        export_member(model, member, "base", tmp_path / name)
        loaded = peft.PeftModel.from_pretrained(lively_base(setup), str(tmp_path / name))
        assert packed[member] == [by_transformers(loaded, prompt, []) for prompt in PROMPTS], name


def test_full_fine_tuning_answers_with_the_base_that_it_wrote(setup: Setup) -> None:
    model = build_model([setup.trial("full")], lively_base(setup))
    with torch.no_grad():
        for parameter in model.pack.trainable_parameters():
            parameter.mul_(1.05)
    model.pack.after_step(1)
    (packed,) = generate(model, PROMPTS, KEYS, decoding(), one_worker)
    assert packed == [by_transformers(model.base, prompt, []) for prompt in PROMPTS]


def test_the_bare_base_answers_as_if_nothing_were_attached(setup: Setup) -> None:
    model = lively_pack(setup)
    (bare,) = generate(model, PROMPTS, KEYS, decoding(), one_worker, frozen=True)
    assert bare == [by_transformers(lively_base(setup), prompt, []) for prompt in PROMPTS]


def test_a_padded_row_gives_the_tokens_it_gives_alone(setup: Setup) -> None:
    model = lively_pack(setup)
    together = generate(model, PROMPTS, KEYS, decoding(), one_worker)
    for row, prompt in enumerate(PROMPTS):
        single = generate(model, [prompt], KEYS[row : row + 1], decoding(), one_worker)
        assert [rows[row] for rows in together] == [rows[0] for rows in single]


def test_what_the_padding_is_changes_nothing(setup: Setup) -> None:
    model = lively_pack(setup)
    answers = [generate(model, PROMPTS, KEYS, decoding(pad=pad), one_worker) for pad in (0, 123)]
    assert answers[0] == answers[1]


def test_generating_leaves_attention_adapters_and_losses_as_they_were(setup: Setup) -> None:
    model = lively_pack(setup)
    rows = setup.rows.evaluation
    assert use_causal_attention(model.base, rows.input_ids[:2].repeat(model.pack.num_members, 1)) == ""
    expected = generate(lively_pack(setup), PROMPTS, KEYS, decoding(), one_worker)
    before = model.base.base_model(input_ids=rows.input_ids[:1].repeat(model.pack.num_members, 1), use_cache=False)
    found = generate(model, PROMPTS, KEYS, decoding(), one_worker)
    after = model.base.base_model(input_ids=rows.input_ids[:1].repeat(model.pack.num_members, 1), use_cache=False)
    assert found == expected
    assert model.base.config._attn_implementation == NAME
    assert model.base.config.use_cache is False
    assert all(stack.training for stack in model.pack.stacks())
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)


def test_activation_checkpointing_leaves_answers_the_same(setup: Setup) -> None:
    model = lively_pack(setup)
    expected = generate(model, PROMPTS, KEYS, decoding(), one_worker)
    checkpoint_activations(model.base, True)
    assert generate(model, PROMPTS, KEYS, decoding(), one_worker) == expected


def test_generation_ends_with_the_last_row_and_not_later(setup: Setup) -> None:
    model = lively_pack(setup)
    counted = [0]

    def count(tensor: torch.Tensor) -> None:
        counted[0] += 1

    answers = generate(model, PROMPTS, KEYS, decoding(), count, frozen=True)[0]
    assert counted == [NUM_NEW]
    counted[0] = 0
    ends = sorted({row[5 + index] for index, row in enumerate(answers)})
    (ended,) = generate(model, PROMPTS, KEYS, decoding(*ends), count, frozen=True)
    assert len({len(row) for row in ended}) > 1
    assert counted == [max(len(row) for row in ended) + 1]
    assert counted[0] < NUM_NEW
    counted[0] = 0
    first_tokens = sorted({row[0] for row in answers})
    assert generate(model, PROMPTS, KEYS, decoding(*first_tokens), count, frozen=True) == [[[] for _ in PROMPTS]]
    assert counted == [1]


def test_members_that_are_no_longer_active_hold_nobody_up(setup: Setup) -> None:
    model = lively_pack(setup)
    model.active[1:] = False
    forwards: list[None] = []
    model.base.base_model.register_forward_hook(lambda *_: forwards.append(None))
    (first, *_) = generate(model, PROMPTS, KEYS, decoding(), one_worker)
    end = first[0][2]
    shown = max(row.index(end) + 1 if end in row else NUM_NEW for row in first[:1])
    forwards.clear()
    assert generate(model, PROMPTS[:1], KEYS[:1], decoding(end), one_worker)[0] == [first[0][: shown - 1]]
    assert len(forwards) == shown
    forwards.clear()
    model.active[:] = False
    generate(model, PROMPTS, KEYS, decoding(), one_worker)
    assert len(forwards) == 1


def test_a_base_that_masks_no_padding_is_refused(
    setup: Setup, tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path
) -> None:
    check_generation(setup.base(), torch.tensor(PROMPTS[0]), "exact_match")
    folder = Path(shutil.copytree(tiny_gpt2_dir, tmp_path / "rwkv"))
    (folder / "model.safetensors").unlink()
    config = RwkvConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, context_length=128)
    RwkvForCausalLM(config).save_pretrained(folder)
    rwkv = make_setup(folder, chat_jsonl, "float32")
    trial, warm = rwkv.trial("full"), ResidentBase(torch.device("cpu"), EngineConfig(), 1)
    with pytest.raises(ValueError, match=r"RwkvForCausalLM.*padding in front of a prompt changes"):
        warm.load(replace(trial, task=ExactMatch()), rwkv.rows)
    warm.load(trial, rwkv.rows)


def test_a_base_without_a_cache_of_its_prompt_is_refused() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, state_size=4)).eval()
    with pytest.raises(ValueError, match=r"MambaForCausalLM.*a cache of the prompt changes.*allowed with task.kind"):
        check_generation(mamba, torch.arange(1, 13), "task.kind: exact_match")


def test_inexact_masking_in_one_dtype_is_refused() -> None:
    # Its position bias is float32, and what it adds to a mask of float64 is beyond float32's range.
    bloom = BloomForCausalLM(BloomConfig(vocab_size=97, hidden_size=32, n_layer=2, n_head=4)).eval()
    check_generation(bloom, torch.arange(1, 13), "exact_match")
    with pytest.raises(ValueError, match=r"padding in front of a prompt changes .* in torch.float64; .*model\.dtype"):
        check_generation(bloom.double(), torch.arange(1, 13), "exact_match")


def test_sampled_answers_depend_on_seed_and_row_only(setup: Setup) -> None:
    model = lively_pack(setup)
    sampling = decoding(temperature=1.5, top_p=0.9, seed=4)
    sampled = generate(model, PROMPTS, KEYS, sampling, one_worker)
    assert sampled == generate(model, PROMPTS, KEYS, sampling, one_worker)
    assert sampled != generate(model, PROMPTS, KEYS, decoding(), one_worker)
    assert sampled != generate(model, PROMPTS, KEYS, decoding(temperature=1.5, top_p=0.9, seed=5), one_worker)
    backwards = generate(model, PROMPTS[::-1], KEYS[::-1], sampling, one_worker)
    assert [rows[::-1] for rows in backwards] == sampled
    # The likeliest token alone makes up so small a part.
    assert generate(model, PROMPTS, KEYS, decoding(temperature=1.5, top_p=1e-6), one_worker) == generate(
        model, PROMPTS, KEYS, decoding(), one_worker
    )


def test_sampled_tokens_are_as_frequent_as_they_are_likely() -> None:
    from loragrid.evaluation.generation import _choose

    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]], dtype=torch.float64).repeat(40_000, 1)
    draws = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = _choose(logits, decoding(temperature=2.0), draws).bincount(minlength=4) / 40_000
    assert torch.allclose(found.double(), (logits[0] / 2.0).softmax(-1), atol=0.01)
    # 2 and 1 make up 0.41 + 0.25 of it: with 0.5 both are kept, and nothing else.
    kept = _choose(logits, decoding(temperature=2.0, top_p=0.5), draws).bincount(minlength=4) / 40_000
    likely = (logits[0] / 2.0).softmax(-1)
    assert torch.allclose(kept.double()[[1, 2]], likely[[1, 2]] / likely[[1, 2]].sum(), atol=0.01)
    assert kept[[0, 3]].sum() == 0


def test_sampling_is_from_the_scaled_and_capped_logits() -> None:
    from loragrid.evaluation.generation import _choose

    outputs = torch.tensor([[0.0, 4.0, 8.0, -4.0]], dtype=torch.float64).repeat(40_000, 1)
    draws = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    transform = LogitTransform(scale=0.5, cap=1.5)
    found = _choose(outputs, decoding(temperature=2.0), draws, transform).bincount(minlength=4) / 40_000
    expected = (1.5 * torch.tanh(outputs[0] * 0.5 / 1.5) / 2.0).softmax(-1)
    assert torch.allclose(found.double(), expected, atol=0.01)


@pytest.mark.parametrize("model_type", ["gemma2", "granite", "cohere"])
def test_the_next_token_is_drawn_from_the_models_own_logits(model_type: str) -> None:
    from loragrid.evaluation.generation import _choose

    base = tiny_model(model_type)
    ids = torch.randint(VOCABULARY, (200, 4), generator=torch.Generator().manual_seed(0))
    draws = torch.rand(200, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=base.config.get_text_config())
    positions = torch.arange(4).repeat(200, 1)
    sampling = decoding(temperature=0.1)
    ours = next_tokens(base, ids, torch.ones_like(ids), positions, cache, sampling, draws)
    assert torch.equal(ours, _choose(base(input_ids=ids, use_cache=False).logits[:, -1], sampling, draws))
