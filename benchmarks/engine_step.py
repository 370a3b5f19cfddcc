"""Times one optimizer step of LoraGrid's engine and of PEFT, after comparing their gradients and loss curves.

    PYTHONPATH=platform:methods:. python -m benchmarks.engine_step --model llama-3.2-1b --out results.md

Needs a CUDA GPU, torch, transformers and peft; no network, no Ray, no MLflow.
"""

import argparse
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import transformers

from benchmarks.packs import build_pack, lora, mixed
from benchmarks.peft_loop import PeftLoop, step_milliseconds
from benchmarks.shapes import random_base, random_rows, shape_config
from loragrid.models.attention import use_causal_attention
from loragrid.planning.memory_estimate import estimate_memory
from loragrid.training.compilation import compile_layers, fuse_pieces
from loragrid.training.cuda_graphs import BATCHES_BEFORE_CAPTURE, STEPS_BEFORE_CAPTURE
from loragrid.training.determinism import compute_deterministically
from loragrid.training.meters import count_activation_bytes
from loragrid.training.step import PackModel, one_worker, train_step
from loragrid.training.step_mode import Mode, ModeChoice
from loragrid.training.step_runner import StepRunner
from loragrid_methods import Method

DEVICE = torch.device("cuda")
LENGTH = 512
NUM_TIMED = 9
CURVE_STEPS = 200


def gradient_errors(model: str) -> tuple[float, float]:
    """Relative error of (LoraGrid's, PEFT's) bfloat16 gradients at step 0 against PEFT in float32, with nonzero B."""
    rows = random_rows(shape_config(model).vocab_size, 1, 2, LENGTH, DEVICE, seed=1)
    own = build_pack(random_base(model, DEVICE, torch.bfloat16), lora(), 1)
    with torch.no_grad():
        for parameter in own.pack.trainable_parameters():
            if not parameter.any():
                parameter.uniform_(-0.02, 0.02)
    own.losses(rows).sum().backward()

    def peft_gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        loop = PeftLoop(random_base(model, DEVICE, dtype), at_its_best=False, autocast=dtype == torch.bfloat16)
        copy_weights(own, loop)
        loop.loss(rows).backward()
        return {name: tensor.grad.clone() for name, tensor in loop.lora_tensors().items() if tensor.grad is not None}

    reference, theirs = peft_gradients(torch.float32), peft_gradients(torch.bfloat16)
    ours = {
        f"{layer}.{name}": tensor.grad[0]
        for layer, stack in own.pack.member_stacks(0)[0].items()
        for name, tensor in stack.named_parameters()
        if tensor.grad is not None
    }

    def error(gradients: dict[str, torch.Tensor]) -> float:
        assert gradients.keys() == reference.keys()
        wrong = sum(float((gradients[key].double() - reference[key].double()).square().sum()) for key in reference)
        whole = sum(float(tensor.double().square().sum()) for tensor in reference.values())
        return math.sqrt(wrong / whole)

    return error(ours), error(theirs)


def copy_weights(own: PackModel, loop: PeftLoop) -> None:
    """Copy the adapters of member 0 into PEFT's layers."""
    stacks, _ = own.pack.member_stacks(0)
    with torch.no_grad():
        for name, tensor in loop.lora_tensors().items():
            layer, _, kind = name.rpartition(".")
            tensor.copy_(stacks[layer].get_parameter(kind)[0])


def curve_difference(model: str) -> float:
    """The largest relative difference between the loss curves of PEFT (P2) and LoraGrid as a graph, over 200 steps."""
    vocabulary = shape_config(model).vocab_size
    own = prepared(model, lora(), "graph", CURVE_STEPS)
    loop = PeftLoop(random_base(model, DEVICE, torch.bfloat16), at_its_best=False)
    copy_weights(own, loop)
    engine = StepRunner(ModeChoice(mode="graph", reason="benchmark"))
    ours, theirs = [], []
    for step in range(CURVE_STEPS):
        rows = random_rows(vocabulary, 1, 1, LENGTH, DEVICE, seed=step % 20)
        ours.append(train_step(own, rows, one_worker, engine).losses[0])
        theirs.append(loop.step(rows))
    assert engine.choice.mode == "graph", engine.choice.reason
    a, b = torch.stack(ours).double(), torch.stack(theirs).double()
    return float(((a - b).abs() / b).max())


def saved_bytes(model: str) -> dict[str, float]:
    """Bytes per token and layer that one LoRA trial's forward keeps for backward, by engine."""
    config = shape_config(model)
    rows = random_rows(config.vocab_size, 1, 1, LENGTH, DEVICE, seed=4)
    found: dict[str, float] = {}

    def count(label: str, base: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> None:
        loss()  # compiles before the count begins
        with count_activation_bytes(base) as saved:
            loss()
        found[label] = saved[0] / LENGTH / config.num_hidden_layers

    for label, at_its_best in (("P2", False), ("P3", True)):
        loop = PeftLoop(random_base(model, DEVICE, torch.bfloat16), at_its_best=at_its_best)
        count(label, loop.model, partial(loop.loss, rows))
    modes: tuple[Mode, ...] = ("eager", "compiled")
    for mode in modes:
        own = prepared(model, lora(), mode, 1)
        count(mode, own.base, partial(own.losses, rows))
    return found


def prepared(model: str, methods: list[Method], mode: Mode, num_steps: int) -> PackModel:
    """A pack on a fresh base, with the attention and the compiled parts of that mode."""
    base = random_base(model, DEVICE, torch.bfloat16)
    if mode != "eager":
        rows = random_rows(shape_config(model).vocab_size, 1, 1, LENGTH, DEVICE, seed=2)
        obstacle = use_causal_attention(base, rows.input_ids)
        assert not obstacle, obstacle
    own = build_pack(base, methods, num_steps)
    if mode != "eager":
        fuse_pieces(own)
    if mode == "compiled":
        torch.compiler.reset()
        compile_layers(base)
    return own


@dataclass(frozen=True, kw_only=True)
class Times:
    """One measurement of an engine.

    steps: milliseconds of each timed step. before: seconds before the first of them. allocated, reserved: peak bytes
    during the steps. evaluations: milliseconds to evaluate the rows of one step; captured if the step is captured.
    """

    steps: list[float]
    before: float
    allocated: int
    reserved: int
    evaluations: list[float] = field(default_factory=list)


def time_own(model: str, methods: list[Method], num_rows: int, mode: Mode) -> Times:
    """The times of a pack of these methods, with `num_rows` rows for each."""
    num_warm = STEPS_BEFORE_CAPTURE + 2
    own = prepared(model, methods, mode, num_warm + NUM_TIMED)
    rows = random_rows(shape_config(model).vocab_size, len(methods), num_rows, LENGTH, DEVICE, seed=3)
    engine = StepRunner(ModeChoice(mode=mode, reason="benchmark"))

    def step() -> object:
        return train_step(own, rows, one_worker, engine)

    start = time.perf_counter()
    for _ in range(num_warm):
        step()
    torch.cuda.synchronize()
    ready = time.perf_counter() - start
    times = step_milliseconds(step, 0, NUM_TIMED)
    assert engine.choice.mode == mode, engine.choice.reason
    memory = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    with torch.no_grad(), own.evaluating():
        evaluations = step_milliseconds(lambda: own.evaluate_batch(own, rows), BATCHES_BEFORE_CAPTURE + 1, NUM_TIMED)
    assert "loragrid.engine.evaluation" not in engine.tags(), engine.tags()
    return Times(steps=times, before=ready, allocated=memory[0], reserved=memory[1], evaluations=evaluations)


def estimated_bytes(model: str, methods: list[Method], num_rows: int, mode: Mode) -> float:
    """The peak bytes of such a pack, as `loragrid plan` estimates them."""
    base = random_base(model, torch.device("meta"), torch.bfloat16)
    return float(estimate_memory(base, methods, num_rows=num_rows, length=LENGTH, mode=mode).total)


def time_peft(model: str, num_rows: int, *, at_its_best: bool) -> Times:
    """As `time_own`, for one trial with PEFT."""
    torch.compiler.reset()
    loop = PeftLoop(random_base(model, DEVICE, torch.bfloat16), at_its_best=at_its_best)
    rows = random_rows(shape_config(model).vocab_size, 1, num_rows, LENGTH, DEVICE, seed=3)
    start = time.perf_counter()
    for _ in range(4):
        loop.step(rows)
    torch.cuda.synchronize()
    ready = time.perf_counter() - start
    times = step_milliseconds(lambda: loop.step(rows), 0, NUM_TIMED)
    return Times(
        steps=times,
        before=ready,
        allocated=torch.cuda.max_memory_allocated(),
        reserved=torch.cuda.max_memory_reserved(),
    )


def measured_limit() -> float:
    """FLOP/s of an 8192^3 bfloat16 matrix product on this card."""
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / (statistics.median(step_milliseconds(lambda: a @ b, 3, 10)) / 1e3)


def _span(times: list[float]) -> str:
    return f"{min(times):.1f}-{max(times):.1f}" if times else ""


def main() -> None:
    """Run the gates and the cases; write a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--modes", nargs="+", default=["eager", "graph", "compiled"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 4, 16], help="rows of 512 tokens per step")
    parser.add_argument("--members", type=int, default=16, help="members of the mixed pack; 0: none")
    parser.add_argument("--baselines", nargs="*", default=["P2", "P3"])
    parser.add_argument("--deterministic", action="store_true", help="use only deterministic kernels")
    parser.add_argument("--no-gates", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("engine_step.md"))
    options = parser.parse_args()
    if options.deterministic:
        compute_deterministically()
    limit, num_parameters = measured_limit(), random_base(options.model, DEVICE, torch.bfloat16).num_parameters()
    lines = [
        f"{torch.cuda.get_device_name()}; torch {torch.__version__}, transformers {transformers.__version__}; "
        f"{options.model}, {num_parameters:,} parameters; LoRA r 16 on 7 linears, bf16 base, fp32 adapters, AdamW, "
        f"clip 1.0; bf16 8192^3 product {limit / 1e12:.0f} TFLOP/s; medians of {NUM_TIMED} steps"
        + ("; deterministic kernels" if options.deterministic else ""),
        "",
    ]

    def say(line: str) -> None:
        print(line, flush=True)
        lines.append(line)
        options.out.write_text("\n".join(lines) + "\n", encoding="utf-8")

    say("")
    if not options.no_gates:
        ours, theirs = gradient_errors(options.model)
        say(f"gradient error at step 0 against float32: LoraGrid {ours:.2e}, PEFT {theirs:.2e} ({ours / theirs:.2f}x)")
        kept = ", ".join(f"{label} {size:,.0f}" for label, size in saved_bytes(options.model).items())
        say(f"saved activations, bytes per token and layer, LoRA: {kept}")
        say(f"loss curves over {CURVE_STEPS} steps: at most {curve_difference(options.model):.1e} apart (relative)\n")
    say(
        "| tokens/step | engine | ms/step | min-max | tokens/s | of the limit | GiB | plan | reserved | s before "
        "| ms to evaluate as many | min-max |"
    )
    say("|---|---|---|---|---|---|---|---|---|---|---|---|")

    def row(
        label: str,
        shape: str,
        num_tokens: int,
        measure: Callable[[], Times],
        estimated: float = 0.0,
    ) -> None:
        torch.compiler.reset()  # compiled code keeps references to the models that it was compiled for
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        try:
            times = measure()
        except (RuntimeError, AssertionError) as error:
            say(f"| {shape} | {label} | failed: {type(error).__name__}: {str(error).splitlines()[0][:300]} |")
            return
        median = statistics.median(times.steps)
        # 4 N FLOP per token: forward and the gradient of the inputs; a frozen base has no gradient of its weights.
        part = 4 * num_parameters * num_tokens / (median / 1e3) / limit
        evaluation = f"{statistics.median(times.evaluations):.1f}" if times.evaluations else ""
        allocated, reserved = times.allocated / 2**30, times.reserved / 2**30
        estimate = f"{estimated / 2**30:.1f}" if estimated else ""
        say(
            f"| {shape} | {label} | {median:.1f} | {_span(times.steps)} | {num_tokens / median * 1e3:,.0f} | "
            f"{part:.2f} | {allocated:.1f} | {estimate} | {reserved:.1f} | {times.before:.0f} | {evaluation} | "
            f"{_span(times.evaluations)} |"
        )

    for num_rows in options.rows:
        shape, num_tokens = f"{num_rows}×{LENGTH}", num_rows * LENGTH
        for name in options.baselines:
            row(name, shape, num_tokens, partial(time_peft, options.model, num_rows, at_its_best=name == "P3"))
        for mode in options.modes:
            estimated = estimated_bytes(options.model, lora(), num_rows, mode)
            row(mode, shape, num_tokens, partial(time_own, options.model, lora(), num_rows, mode), estimated)
    if options.members:
        shape, num_tokens = f"{options.members} × 1×{LENGTH}", options.members * LENGTH
        for mode in options.modes:
            methods = mixed(options.members)
            estimated = estimated_bytes(options.model, methods, 1, mode)
            row(f"{mode}, mixed", shape, num_tokens, partial(time_own, options.model, methods, 1, mode), estimated)


if __name__ == "__main__":
    main()
