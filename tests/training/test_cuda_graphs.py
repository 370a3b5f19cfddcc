"""The mode of steps changes only their speed; a step that cannot be captured runs eagerly, with the reason."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, MistralConfig, MistralForCausalLM

from loragrid.config.experiment import ModelConfig
from loragrid.data.labels import IGNORED
from loragrid.models.attention import NAME, use_causal_attention
from loragrid.models.loading import load_base
from loragrid.models.logits import LogitTransform, logit_transform
from loragrid.training.compilation import compile_layers, fuse_pieces
from loragrid.training.loss import fusible_score_rows, score_rows
from loragrid.training.step import PackModel
from loragrid.training.step_mode import (
    COMPILE_SECONDS,
    COMPILE_SECONDS_PER_STACK,
    SAVED_MORE_PER_STACK,
    SAVED_SECONDS_PER_FEATURE,
    Mode,
    ModeChoice,
    RequestedMode,
    choose_mode,
    features_of_step,
)
from loragrid.training.step_runner import StepRunner
from loragrid.training.torch_internals import is_compiled
from loragrid_methods import LayerShape, get_method, method_names
from loragrid_methods.stacks.optimizer import MemberAdamW, ParameterBlock, adamw_update
from tests.support.model_families import tiny_model
from tests.support.pack_training import small_method
from tests.support.small_packs import (
    Run,
    Setup,
    base_on,
    largest_difference,
    look_at_values,
    make_setup,
    mixed_trials,
    run_pack,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: only one can capture a step")


@pytest.fixture(scope="module")
def setup(tiny_llama_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_llama_dir, chat_jsonl, "float32")


@pytest.mark.parametrize(
    ("requested", "steps", "obstacle", "expected"),
    [
        ("auto", 10, "", "graph"),
        ("auto", 10_000_000, "", "compiled"),
        ("auto", 10_000_000, "dropout", "eager"),
        ("graph", 10_000_000, "", "graph"),
        ("compiled", 1, "", "compiled"),
        ("compiled", 1, "dropout", "eager"),
        ("eager", 10_000_000, "", "eager"),
    ],
)
def test_auto_compiles_if_it_pays_and_obstacles_force_eager(
    requested: RequestedMode, steps: int, obstacle: str, expected: Mode
) -> None:
    choice = choose_mode(requested, num_steps=steps, features_per_step=10**9, num_stacks=1, obstacle=obstacle)
    assert choice.mode == expected
    assert choice.reason == (obstacle or choice.reason) != ""


@pytest.mark.parametrize("num_stacks", [1, 5])
def test_the_cost_model_turns_where_the_saving_is_the_cost(num_stacks: int) -> None:
    cost = COMPILE_SECONDS + num_stacks * COMPILE_SECONDS_PER_STACK
    features = 999_999_937
    saved = features * SAVED_SECONDS_PER_FEATURE * (1 + (num_stacks - 1) * SAVED_MORE_PER_STACK)
    turn = int(cost / saved)
    before, beyond = (
        choose_mode("auto", num_steps=steps, features_per_step=features, num_stacks=num_stacks)
        for steps in (turn, turn + 1)
    )
    assert (before.mode, beyond.mode) == ("graph", "compiled")
    assert f"takes about {cost:.0f} s" in before.reason
    layers = [LayerShape(name="a", in_features=3, out_features=5), LayerShape(name="b", in_features=5, out_features=2)]
    assert features_of_step(layers, 10) == 150


def test_what_is_compiled_already_costs_nothing_more() -> None:
    choice = choose_mode("auto", num_steps=1, features_per_step=1, num_stacks=1, is_compiled=True)
    assert (choice.mode, choice.reason) == ("compiled", "already compiled for the previous pack")


def test_only_methods_that_draw_on_the_host_prevent_capture() -> None:
    for name in method_names():
        assert get_method(name)().capture_obstacle() == ""
    assert small_method("lora", dropout=0.1).capture_obstacle().startswith("lora.dropout")


def test_maskless_attention_equals_masked_attention_at_labelled_tokens(setup: Setup) -> None:
    base, rows = setup.base(), setup.rows.evaluation
    ids = rows.input_ids
    padding = torch.arange(ids.shape[1]) >= rows.num_tokens.unsqueeze(1)
    assert padding.any(), "the rows must be padded for the mask to matter"
    with torch.no_grad():
        masked = base.base_model(input_ids=ids, attention_mask=(~padding).long()).last_hidden_state
        assert use_causal_attention(base, ids) == ""
        assert base.config._attn_implementation == NAME
        plain = base.base_model(input_ids=ids).last_hidden_state
    assert not torch.equal(masked[padding], plain[padding]), "the mask must make a difference somewhere"
    torch.testing.assert_close(plain[~padding], masked[~padding], rtol=1e-5, atol=1e-5)


def test_a_model_without_plain_causal_attention_keeps_its_own(setup: Setup) -> None:
    ids = setup.rows.evaluation.input_ids[:2]
    config = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = MistralForCausalLM(config).eval()
    before = base.config._attn_implementation
    with torch.no_grad():
        own = base(input_ids=ids).logits
    assert "not plain causal" in use_causal_attention(base, ids)
    assert base.config._attn_implementation == before
    with torch.no_grad():
        assert torch.equal(base(input_ids=ids).logits, own)
    base.config.sliding_window = 4096
    assert use_causal_attention(base, ids) == ""


def test_conv1d_models_take_the_attention_too(tiny_gpt2_dir: Path, setup: Setup) -> None:
    base = load_base(ModelConfig(name=str(tiny_gpt2_dir), dtype="float32"))
    assert isinstance(base, GPT2LMHeadModel)
    assert use_causal_attention(base, setup.rows.evaluation.input_ids[:2]) == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_fused_scores_are_those_of_torchs_kernels(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits = (torch.randn(12, 50, dtype=torch.float64) * 5).to(dtype)
    targets = torch.randint(0, 50, (12,))
    targets[3] = IGNORED
    weights = torch.rand(12, dtype=torch.float64).masked_fill(targets == IGNORED, 0.0)
    (losses, gradient), (fused_losses, fused_gradient) = (
        score(logits, targets, weights) for score in (score_rows, fusible_score_rows)
    )
    assert losses[3] == fused_losses[3] == 0.0
    assert gradient.dtype == fused_gradient.dtype == dtype
    exact = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(fused_losses, losses, rtol=1e-6, atol=exact)
    torch.testing.assert_close(fused_gradient, gradient, rtol=exact, atol=exact)
    reference = logits.double().requires_grad_()
    exact_losses = torch.nn.functional.cross_entropy(reference, targets, ignore_index=IGNORED, reduction="none")
    (exact_losses * weights).sum().backward()
    torch.testing.assert_close(fused_gradient.double(), reference.grad, rtol=exact, atol=exact)


@pytest.mark.heavy
def test_compiled_layers_and_fused_pieces_train_to_the_same_curves(
    tiny_gpt2_dir: Path, chat_jsonl: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = make_setup(tiny_gpt2_dir, chat_jsonl, "float64")
    # The graphs that go to the compiler, run as they are: what a compiler for this processor makes of them is its own.
    compiled: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        compiled.append(graph.code)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **keys: original(f, backend=backend, fullgraph=True, **keys))
    torch.compiler.reset()
    trials = [trial for trial in mixed_trials(setup) if trial.method.hyperparameters().get("rank", 2) == 2]
    assert {trial.method.name for trial in trials} == {name for name in method_names() if get_method(name).packable}

    def prepare(model: PackModel) -> None:
        fuse_pieces(model)
        assert model.optimizer.update is not adamw_update
        compile_layers(model.base)

    eager = run_pack(setup, trials)
    fused = run_pack(setup, trials, prepare=prepare)
    torch.compiler.reset()
    assert len(compiled) >= 3, "a layer, the scores, AdamW"
    assert_same_curves(fused, eager, 1e-10)


def test_every_decoder_layer_is_compiled_and_nothing_else(setup: Setup, tiny_gpt2_dir: Path) -> None:
    for base, prefix in (
        (setup.base(), "model.layers"),
        (load_base(ModelConfig(name=str(tiny_gpt2_dir))), "transformer.h"),
    ):
        compile_layers(base)
        names = [name for name, module in base.named_modules() if is_compiled(module)]
        assert names == [f"{prefix}.0", f"{prefix}.1"]


def assert_same_curves(ours: Run, theirs: Run, tolerance: float) -> None:
    for member in range(len(theirs.records)):
        for key in ("train/loss", "eval/loss", "train/grad_norm"):
            a, b = ours.curve(member, key), theirs.curve(member, key)
            nonzero = {step: value for step, value in b.items() if value}
            assert largest_difference({s: a[s] for s in nonzero}, nonzero, relative=True) <= tolerance, (member, key)


@needs_gpu
@pytest.mark.parametrize("name", [*method_names(), "mixed"])
def test_a_captured_step_trains_to_eager_curves(setup: Setup, name: str) -> None:
    trials = mixed_trials(setup, steps=12) if name == "mixed" else [setup.trial(name, steps=12, lr=0.003)]
    trials = [trial for trial in trials if not trial.method.capture_obstacle()]
    base = base_on(setup, torch.device("cuda"))
    engine = StepRunner(ModeChoice(mode="graph", reason="test"))
    eager = run_pack(setup, trials, base=copy.deepcopy(base))
    captured = run_pack(setup, trials, base=base, compute=engine)
    assert engine.choice.mode == "graph", engine.choice.reason
    assert_same_curves(captured, eager, 1e-6)


@needs_gpu
@pytest.mark.parametrize("mode", ["graph", "compiled"])
@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("granite", {"logits_scaling": 8.0}),
        ("gemma2", {"attn_logit_softcapping": None, "layer_types": ["full_attention"] * 2, "sliding_window": None}),
    ],
)
def test_scaled_and_capped_logits_train_to_eager_curves(
    setup: Setup, model_type: str, settings: dict[str, Any], mode: Mode
) -> None:
    base = tiny_model(model_type, vocab_size=setup.base().config.vocab_size, **settings)
    assert logit_transform(base) != LogitTransform(), "the head's output is scaled or capped"
    other = replace(setup, _base=base)
    trials = [other.trial("lora", steps=8, lr=0.003), other.trial("lora", {"rank": 5}, steps=8, lr=0.001)]
    on_gpu = base_on(other, torch.device("cuda"))
    engine = StepRunner(ModeChoice(mode=mode, reason="test"))
    eager = run_pack(other, trials, base=copy.deepcopy(on_gpu))
    captured = run_pack(other, trials, base=on_gpu, compute=engine)
    assert engine.choice.mode == mode, engine.choice.reason
    assert_same_curves(captured, eager, 1e-6 if mode == "graph" else 1e-4)  # compiled kernels sum in another order


@needs_gpu
def test_a_captured_step_in_micro_batches_trains_to_eager_curves(setup: Setup) -> None:
    rows = {"steps": 12, "batch_size": 8, "micro_batch_size": 2}
    trials = [trial for trial in mixed_trials(setup, **rows) if not trial.method.capture_obstacle()]
    base = base_on(setup, torch.device("cuda"))
    engine = StepRunner(ModeChoice(mode="graph", reason="test"))
    eager = run_pack(setup, trials, base=copy.deepcopy(base))
    captured = run_pack(setup, trials, base=base, compute=engine)
    assert engine.choice.mode == "graph", engine.choice.reason
    assert_same_curves(captured, eager, 1e-6)


def look_at_gradients(model: PackModel) -> None:
    before_step = model.pack.before_step
    model.pack.before_step = lambda: (model.pack.gradient_buffer.sum().item(), before_step())[1]  # type: ignore[method-assign]


@needs_gpu
@pytest.mark.parametrize("spoil", [look_at_values, look_at_gradients], ids=["forward", "update"])
def test_a_step_that_cannot_be_captured_runs_eagerly(setup: Setup, spoil: Callable[[PackModel], None]) -> None:
    trial = setup.trial("lora", steps=8)
    engine = StepRunner(ModeChoice(mode="graph", reason="test"))
    eager = run_pack(setup, [trial], base=base_on(setup, torch.device("cuda")))
    run = run_pack(setup, [trial], base=base_on(setup, torch.device("cuda")), prepare=spoil, compute=engine)
    assert engine.choice.mode == "eager"
    assert engine.choice.reason.startswith("the step could not be captured")
    assert torch.rand(1, device="cuda").isfinite(), "the device's own generator must not be left in a capture"
    assert_same_curves(run, eager, 1e-6)


def test_an_eager_engine_is_the_plain_step(setup: Setup) -> None:
    trials = mixed_trials(setup)
    choice = ModeChoice(mode="eager", reason="no GPU")
    run = run_pack(setup, trials, compute=StepRunner(choice))
    assert run.records == run_pack(setup, trials).records
    assert StepRunner(replace(choice)).tags() == {"loragrid.engine": "eager", "loragrid.engine.reason": "no GPU"}


def test_an_engine_may_exchange_the_optimizers_update() -> None:
    weights, gradients = torch.ones(1, 3), torch.ones(1, 3)
    block = ParameterBlock(
        name="w", start=0, weights=weights, gradients=gradients, multiplier=torch.ones(1, 1), shapes={"": weights.shape}
    )
    one = torch.ones(1, dtype=torch.float64)
    optimizer = MemberAdamW([block], weight_decay=0 * one, clip_norm=one, beta1=0.9, beta2=0.999, epsilon=1e-8)
    optimizer.update = lambda weights, *_, **__: weights.fill_(7.0)
    optimizer.step(one, torch.ones(1, dtype=torch.bool))
    assert weights.tolist() == [[7.0, 7.0, 7.0]]
