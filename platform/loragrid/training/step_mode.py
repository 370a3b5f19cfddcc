"""Decides how a pack's steps are run: kernel by kernel, as CUDA graphs, or compiled and then as graphs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from loragrid_methods import LayerShape, Method

Mode = Literal["eager", "graph", "compiled"]
RequestedMode = Literal["auto", "eager", "graph", "compiled"]

MODE_TAG = "loragrid.engine"

# The cost model of `auto`, read off H100s with the shapes of SmolLM2-135M, Qwen3-0.6B and Llama-3.2-1B
# (benchmarks/results/engine_step_h100.md). The seconds that compiling the decoder layers takes, and more for every kind
# of stack in them: 13 s for LoRA alone, 43 to 48 for four kinds, 83 for eight.
COMPILE_SECONDS = 3.0
COMPILE_SECONDS_PER_STACK = 10.0
# What it saves is traffic between short kernels, so it goes by the features that pass them, not by the operations: the
# seconds of one feature of one token with one kind of stack, and the part by which every further kind adds to that.
# Of eleven steps, of 512 to 16,384 tokens, each one's saving is 0.6 to 1.5 times this.
SAVED_SECONDS_PER_FEATURE = 1.25e-11
SAVED_MORE_PER_STACK = 0.15


@dataclass(frozen=True, kw_only=True)
class ModeChoice:
    """The mode a pack's steps run in, and why."""

    mode: Mode
    reason: str


def choose_mode(
    requested: RequestedMode,
    *,
    num_steps: int,
    features_per_step: int,
    num_stacks: int,
    is_compiled: bool = False,
    obstacle: str = "",
) -> ModeChoice:
    """The mode on a GPU: `requested`, or what `auto` comes to; eager where `obstacle` says what forbids a capture.

    `auto` compiles where the compiler's time is less than what it takes off all steps together. `num_stacks`: the kinds
    of stacks that would have to be compiled. `is_compiled`: that was done for an equal pack.
    """
    if requested == "eager":
        return ModeChoice(mode="eager", reason="engine.mode")
    if obstacle:
        return ModeChoice(mode="eager", reason=obstacle)
    if requested != "auto":
        return ModeChoice(mode=requested, reason="engine.mode")
    if is_compiled:
        return ModeChoice(mode="compiled", reason="compiled for the pack before")
    cost = COMPILE_SECONDS + num_stacks * COMPILE_SECONDS_PER_STACK
    per_feature = SAVED_SECONDS_PER_FEATURE * (1 + SAVED_MORE_PER_STACK * (num_stacks - 1))
    saved = per_feature * features_per_step * num_steps
    reason = f"compiling takes about {cost:.0f} s and saves about {saved:.0f} s"
    return ModeChoice(mode="compiled" if saved > cost else "graph", reason=reason)


def capture_obstacle(methods: Iterable[Method], *, shard: bool) -> str:
    """What keeps the steps of these members from being captured, as far as shapes and settings tell; "" for nothing."""
    if shard:
        return "workers.strategy: the layers that workers gather of a sharded base are not captured"
    return next(filter(None, (method.capture_obstacle() for method in methods)), "")


def features_of_step(layers: Iterable[LayerShape], num_tokens: int) -> int:
    """The features that go into and come out of the base's linear layers in a step, over all of its tokens."""
    return num_tokens * sum(layer.in_features + layer.out_features for layer in layers)
