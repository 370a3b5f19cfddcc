"""A pack's estimated GPU memory, computed from shapes, agrees with counts by hand and with a GPU's allocator."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from loragrid.evaluation.generation import Decoding, generate
from loragrid.models.attention import NAME, causal_attention, use_causal_attention
from loragrid.models.loading import load_meta_model
from loragrid.planning.memory_estimate import (
    BLOCK_BYTES,
    SINGLE_QUERIES_ARE_GROUPED,
    MemoryEstimate,
    ScoringShape,
    estimate_memory,
)
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.compilation import compile_layers, fuse_pieces
from loragrid.training.cuda_graphs import STEPS_BEFORE_CAPTURE
from loragrid.training.meters import LiveBytes, count_activation_bytes, reset_peak_memory
from loragrid.training.step import Batch, PackModel, compute_step, one_worker, train_step
from loragrid.training.step_mode import Mode, ModeChoice
from loragrid.training.step_runner import StepRunner
from loragrid_methods import Method, get_method, method_names
from loragrid_methods.stacks.optimizer import MemberAdamW
from loragrid_methods.stacks.pack import AdapterPack, member_order
from tests.support.model_families import tiny_model
from tests.support.small_packs import make_setup

ROWS, LENGTH = 2, 64


def shapes(dtype: torch.dtype, sizes: Mapping[str, int] | None = None, *, device: str = "meta") -> PreTrainedModel:
    """A Llama of a few layers."""
    config = LlamaConfig(
        **{  # type: ignore[arg-type]
            "vocab_size": 1000,
            "hidden_size": 64,
            "intermediate_size": 160,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        }
        | dict(sizes or {})
    )
    with torch.device(device):
        base: PreTrainedModel = LlamaForCausalLM(config)
    base.to(dtype)  # type: ignore[arg-type]  # transformers narrows torch's own signature
    base.requires_grad_(False).train(False)
    return base


def method(name: str, **fields: object) -> Method:
    return get_method(name)(**fields)


def estimate(*methods: Method, rows: int = ROWS, length: int = LENGTH, mode: Mode = "eager") -> MemoryEstimate:
    return estimate_memory(shapes(torch.bfloat16), methods, num_rows=rows, length=length, mode=mode)


def test_base_adapters_and_optimizer_are_counted_to_the_byte() -> None:
    # Seven layers in a block: 64->64, 64->32 twice, 64->64, 64->160 twice, 160->64; in + out, and out.
    in_and_out, out = 128 + 96 + 96 + 128 + 224 + 224 + 224, 64 + 32 + 32 + 64 + 160 + 160 + 64
    parameters = 1000 * 64 + 64 + 3 * (2 * 64 + 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160)
    found = estimate(method("lora", rank=4), method("lora", rank=4))
    assert abs(found.base - 2 * parameters) <= 64  # and the table of rotary frequencies
    trained = 3 * 4 * in_and_out * 2
    scalings = 3 * 7 * 2
    assert found.adapters == 4 * (trained + scalings)
    assert found.optimizer == 3 * 4 * trained
    frozen_a = estimate(method("lora_fa", rank=4))
    assert frozen_a.adapters == 4 * (3 * 4 * in_and_out + 3 * 7)
    assert frozen_a.optimizer == 3 * 4 * (3 * 4 * out)


def test_ranks_are_padded_to_the_largest_of_their_stack() -> None:
    both, larger = estimate(method("lora", rank=2), method("lora", rank=8)), estimate(method("lora", rank=8))
    assert both.optimizer == 2 * larger.optimizer


def test_a_worker_holds_its_base_share_and_the_gathered_weights() -> None:
    def found(num_shares: int) -> MemoryEstimate:
        lora = [method("lora", rank=4)]
        return estimate_memory(
            shapes(torch.bfloat16), lora, num_rows=ROWS, length=LENGTH, mode="eager", num_shares=num_shares
        )

    layer = 2 * 64 + 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160
    whole, shared = found(1), found(4)
    assert 4 * shared.base == pytest.approx(whole.base, abs=4 * 64)  # every worker has the rotary frequencies
    assert shared.passing - whole.passing == 2 * (1000 * 64 + 64 + 2 * layer)
    parts = ("adapters", "optimizer", "activations")
    assert [getattr(shared, part) for part in parts] == [getattr(whole, part) for part in parts]


def test_activations_grow_with_tokens_and_members_except_frozen_ones() -> None:
    one = estimate(method("lora"))
    assert estimate(method("lora"), rows=2 * ROWS).activations == pytest.approx(2 * one.activations, rel=0.01)
    assert estimate(method("lora"), method("lora")).activations == pytest.approx(2 * one.activations, rel=0.01)
    assert estimate(method("lora_fa")).activations < one.activations
    assert estimate(method("frozen")).activations < 0.1 * one.activations
    assert estimate(method("full")).activations > one.activations


def test_fused_losses_and_compiled_layers_need_less() -> None:
    eager, graph, compiled = (estimate(method("lora"), mode=mode).total for mode in ("eager", "graph", "compiled"))
    assert eager > graph > compiled


@pytest.mark.parametrize("name", method_names())
def test_activations_are_what_autograd_keeps(tiny_llama_dir: Path, chat_jsonl: Path, name: str) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "bfloat16")
    trial = setup.trial(name)
    base = setup.base()
    batch = build_batches([trial], setup.rows, torch.device("cpu")).training(0)
    model = build_model([trial], base)
    with count_activation_bytes(base) as saved:
        model.losses(batch)
    rows, length = batch.input_ids.shape
    found = estimate_memory(load_meta_model(setup.model), [trial.method], num_rows=rows, length=length)
    # The processor's attention keeps other small tensors than a GPU's, and not every token of these rows is a label.
    assert found.activations == pytest.approx(saved[0], rel=0.15 if name != "frozen" else None, abs=2**17)


def test_the_base_is_given_back_as_it_was() -> None:
    base = shapes(torch.bfloat16)
    before, attention = [name for name, _ in base.named_modules()], base.config._attn_implementation
    estimate_memory(base, [method("lora")], num_rows=1, length=8)
    assert [name for name, _ in base.named_modules()] == before
    assert base.config._attn_implementation == attention


def pack_of_methods(base: PreTrainedModel, methods: list[Method]) -> PackModel:
    pack = AdapterPack(base, [(method, 0) for method in methods], output_layer=base.get_output_embeddings())
    pack.train()
    vector = torch.ones(len(methods), dtype=torch.float64, device=base.device)
    settings = {"weight_decay": 0 * vector, "clip_norm": vector, "beta1": 0.9, "beta2": 0.999, "epsilon": 1e-8}
    return PackModel(
        base=base,
        pack=pack,
        optimizer=MemberAdamW(pack.blocks, **settings),  # type: ignore[arg-type]
        learning_rates=1e-4 * vector.unsqueeze(0),
        active=vector > 0,
    )


def rows_of_tokens(base: PreTrainedModel, num_members: int, num_rows: int, length: int) -> Batch:
    """Rows in which every token but the first is a label."""
    ids = torch.zeros(num_members * num_rows, length, dtype=torch.long, device=base.device)
    return Batch(
        input_ids=ids,
        label_positions=torch.arange(length - 1, device=base.device).repeat(len(ids), 1),
        label_targets=ids[:, 1:].contiguous(),
        num_labels=torch.ones(num_members, dtype=torch.float64, device=base.device),
    )


@pytest.mark.parametrize("name", [name for name in method_names() if name != "frozen"])
def test_a_step_in_micro_batches_peaks_like_one_micro_batch(name: str) -> None:
    def peak(num_rows: int, micro_batch_size: int | None = None) -> float:
        base = shapes(torch.bfloat16)
        AttentionInterface.register(NAME, causal_attention)
        base.set_attn_implementation(NAME)
        with torch.device("meta"):
            model, rows = pack_of_methods(base, [method(name)]), rows_of_tokens(base, 1, num_rows, LENGTH)
            model.micro_batch_size = micro_batch_size
            with LiveBytes() as live:
                compute_step(model, rows, model.learning_rates[0], one_worker)
        return float(live.peak)

    assert peak(4 * ROWS, ROWS) == pytest.approx(peak(ROWS), rel=0.01)
    assert peak(4 * ROWS, ROWS) < 0.5 * peak(4 * ROWS)


# Prompts that are long, answers that are long, and a vocabulary whose draws are what is largest.
ANSWERS = {
    "long prompts": ScoringShape(length=LENGTH, prompt=200, max_new_tokens=4),
    "long answers": ScoringShape(length=LENGTH, prompt=5, max_new_tokens=120),
    "draws": ScoringShape(length=LENGTH, prompt=5, max_new_tokens=20, sampled=True),
    "one token": ScoringShape(length=LENGTH, prompt=30, max_new_tokens=1),
    "two tokens": ScoringShape(length=LENGTH, prompt=30, max_new_tokens=2),
}
MIXED = ("lora", "lora_fa", "vera")


def decoding(scoring: ScoringShape) -> Decoding:
    """As such answers are generated; none ends before its time."""
    return Decoding(
        max_new_tokens=scoring.max_new_tokens,
        end_token_ids=(-1,),
        pad_token_id=0,
        temperature=1.0 if scoring.sampled else None,
    )


def answer(model: PackModel, scoring: ScoringShape) -> None:
    """Let every member answer ROWS prompts, one of them shorter, as `loragrid.evaluation.pack_members` does."""
    prompts = [[1] * scoring.prompt, *[[1] * (scoring.prompt - 2)] * (ROWS - 1)]
    generate(model, prompts, [str(row) for row in range(ROWS)], decoding(scoring), one_worker)


@pytest.mark.parametrize("name", ANSWERS)
def test_generation_is_estimated_as_what_lives_while_prompts_are_answered(name: str) -> None:
    scoring, methods = ANSWERS[name], [method(name, rank=2) for name in MIXED]
    model = pack_of_methods(shapes(torch.float32, device="cpu"), methods)
    with LiveBytes(block_bytes=BLOCK_BYTES) as live:
        answer(model, scoring)
    found = estimate_memory(shapes(torch.float32), methods, num_rows=ROWS, length=LENGTH, scoring=scoring)
    # Where keys are repeated and the mask becomes numbers, a processor's attention does it out of sight.
    assert found.generation == pytest.approx(live.peak, rel=0.1)


def test_the_key_value_cache_grows_by_its_closed_form() -> None:
    sizes = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 256}
    members, layers, heads, head_size, two_bytes = 3, 8, 4, 32, 2

    def found(max_new_tokens: int) -> int:
        scoring = ScoringShape(length=8, prompt=8, max_new_tokens=max_new_tokens)
        lora = [method("lora", rank=1)] * members
        base = shapes(torch.bfloat16, sizes)
        return estimate_memory(base, lora, num_rows=ROWS, length=8, scoring=scoring).generation

    one_head = ROWS * members * head_size * two_bytes
    cache = 2 * layers * heads * one_head
    # The truth value of the mask for every row, and the number that it is made of.
    mask = ROWS * members * (8 + 1)
    if SINGLE_QUERIES_ARE_GROUPED:
        # While a token is put behind them, there is what was there of one layer's keys.
        beside = heads * one_head + mask
    else:
        # While a token attends, one layer's keys and values once for each head that asks, and the mask as numbers.
        beside = 2 * sizes["num_attention_heads"] * one_head + ROWS * members * two_bytes + mask
    assert (found(3000) - found(1000)) / 2000 == pytest.approx(cache + beside, abs=1)
    assert found(3000) == pytest.approx((8 + 3000 - 1) * (cache + beside), rel=0.02)
    assert found(3000) >= (8 + 3000 - 1) * cache


@pytest.mark.parametrize("name", ["lora", "full"])
def test_an_evaluation_is_estimated_as_what_lives_in_it(name: str) -> None:
    model = pack_of_methods(shapes(torch.float32, device="cpu"), [method(name)])
    rows = rows_of_tokens(model.base, 1, ROWS, 3 * LENGTH)
    with model.evaluating(), torch.no_grad(), LiveBytes(block_bytes=BLOCK_BYTES) as live:
        model.losses(rows)
    scoring = ScoringShape(length=3 * LENGTH)
    found = estimate_memory(shapes(torch.float32), [method(name)], num_rows=ROWS, length=LENGTH, scoring=scoring)
    assert found.evaluation == pytest.approx(live.peak, rel=0.05)
    assert found.generation == 0


def test_training_memory_limits_how_many_prompts_are_answered_at_once() -> None:
    lora = [method("lora", rank=4)] * 2

    def found(num_prompts: int, max_new_tokens: int = LENGTH) -> MemoryEstimate:
        scoring = ScoringShape(length=LENGTH, prompt=LENGTH, max_new_tokens=max_new_tokens, num_prompts=num_prompts)
        return estimate_memory(shapes(torch.bfloat16), lora, num_rows=ROWS, length=LENGTH, scoring=scoring)

    few, more, all_of_many = found(0), found(2 * ROWS - 1), found(10**6)
    assert (few.prompts_at_once, more.prompts_at_once) == (ROWS, 2 * ROWS)
    at_once = all_of_many.prompts_at_once
    assert at_once in {ROWS * 2**times for times in range(2, 12)}, "such can be halved"
    assert few.total == more.total == all_of_many.total
    limit = max(few.activations + few.passing, few.evaluation)
    assert more.generation < all_of_many.generation <= limit
    assert 2 * all_of_many.generation > limit, "twice as many would not do"
    assert found(10**6, 9000).prompts_at_once == ROWS, "never fewer than rows are trained"
    assert estimate_memory(shapes(torch.bfloat16), lora, num_rows=ROWS, length=LENGTH).prompts_at_once == 0


def test_the_peak_is_the_largest_of_step_evaluation_and_generation() -> None:
    lora = [method("lora", rank=4)]
    for scoring, largest in (
        (None, "step"),
        (ScoringShape(length=40 * LENGTH), "evaluation"),
        (ScoringShape(length=LENGTH, prompt=LENGTH, max_new_tokens=9000), "generation"),
    ):
        found = estimate_memory(shapes(torch.bfloat16), lora, num_rows=ROWS, length=LENGTH, scoring=scoring)
        parts = {
            "step": found.activations + found.passing,
            "evaluation": found.evaluation,
            "generation": found.generation,
        }
        assert max(parts, key=lambda part: parts[part]) == largest
        assert found.total == found.base + found.adapters + found.optimizer + parts[largest]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: only there is memory allocated by torch alone")
@pytest.mark.parametrize("mode", ["eager", "graph", "compiled"])
@pytest.mark.parametrize("composition", ["one lora", "one full", "mixed"])
def test_the_allocators_peak_on_a_gpu_is_within_15_percent(mode: Mode, composition: str) -> None:
    methods = {
        "one lora": [method("lora", rank=16)],
        "one full": [method("full")],
        "mixed": [method(name) for name in method_names() if get_method(name).packable for _ in range(2)],
    }[composition]
    methods = [methods[index] for index in member_order(methods)]
    sizes = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    expected = estimate_memory(shapes(torch.bfloat16, sizes), methods, num_rows=2, length=512, mode=mode)
    torch.compiler.reset()
    base = shapes(torch.bfloat16, sizes, device="cuda")
    device = base.device
    reset_peak_memory(device)
    before = torch.cuda.memory_allocated(device) - expected.base
    assert use_causal_attention(base, torch.zeros(1, 8, dtype=torch.long, device=device)) == ""
    model = pack_of_methods(base, methods)
    if mode != "eager":
        fuse_pieces(model)
    if mode == "compiled":
        compile_layers(base)
    engine = StepRunner(ModeChoice(mode=mode, reason="test"))
    rows = rows_of_tokens(base, len(methods), 2, 512)
    for _ in range(STEPS_BEFORE_CAPTURE + 2):
        model.completed = 0
        train_step(model, rows, one_worker, engine)
    assert engine.choice.mode == mode, engine.choice.reason
    measured = torch.cuda.max_memory_allocated(device) - before
    print(f"{composition} {mode}: estimated {expected} = {expected.total:,}, measured {measured:,}")
    assert expected.total == pytest.approx(measured, rel=0.15)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: only there is memory allocated by torch alone")
@pytest.mark.parametrize("name", ["long prompts", "long answers"])
def test_estimated_generation_is_within_15_percent_of_the_gpus_peak(name: str) -> None:
    scoring = {
        "long prompts": ScoringShape(length=64, prompt=1500, max_new_tokens=4),
        "long answers": ScoringShape(length=64, prompt=64, max_new_tokens=500),
    }[name]
    sizes = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 6}
    lora = [method("lora", rank=16)] * 4
    expected = estimate_memory(shapes(torch.bfloat16, sizes), lora, num_rows=ROWS, length=64, scoring=scoring)
    model = pack_of_methods(shapes(torch.bfloat16, sizes, device="cuda"), lora)
    use_causal_attention(model.base, torch.zeros(1, 8, dtype=torch.long, device="cuda"))
    answer(model, replace(scoring, max_new_tokens=2))  # what cuBLAS takes once is there
    reset_peak_memory(model.base.device)
    before = torch.cuda.memory_allocated()
    answer(model, scoring)
    measured = torch.cuda.max_memory_allocated() - before
    print(f"{name}: estimated {expected.generation:,}, measured {measured:,}")
    assert expected.generation == pytest.approx(measured, rel=0.15)


@pytest.mark.parametrize(
    ("model_type", "plain"), [("gemma2", {"final_logit_softcapping": None}), ("granite", {"logits_scaling": 1.0})]
)
def test_scaled_and_capped_logits_cost_what_is_estimated(model_type: str, plain: dict[str, Any]) -> None:
    methods = [method("lora", rank=2)]

    def estimated_and_live(settings: dict[str, Any], mode: Mode = "eager") -> tuple[int, float]:
        base = tiny_model(model_type, vocab_size=2000, **settings)
        model, rows = pack_of_methods(base, methods), rows_of_tokens(base, 1, ROWS, LENGTH)
        with LiveBytes(block_bytes=BLOCK_BYTES) as live:
            compute_step(model, rows, model.learning_rates[0], one_worker)
        meta = tiny_model(model_type, vocab_size=2000, **settings).to(torch.device("meta"))  # type: ignore[arg-type]
        estimate = estimate_memory(meta, methods, num_rows=ROWS, length=LENGTH, mode=mode)
        return estimate.activations + estimate.passing, live.peak

    (with_it, live), (without, live_without) = estimated_and_live({}), estimated_and_live(plain)
    assert with_it - without == pytest.approx(live - live_without, rel=0.01)
    assert live > live_without
    # Fused kernels keep no tensor for it.
    assert estimated_and_live({}, "graph")[0] == estimated_and_live(plain, "graph")[0]
