"""Decides how a pack's steps are run: kernel by kernel, as CUDA graphs, or compiled and then as graphs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from loragrid_methods import Method

Mode = Literal["eager", "graph", "compiled"]
RequestedMode = Literal["auto", "eager", "graph", "compiled"]

# The cost model of `auto`, read off an H100 and an H200 with Llama-3.2-1B shapes (benchmarks/results/): the seconds
# that compiling the decoder layers takes, and more for every kind of stack in them (13 s for LoRA alone, 43 to 48 for
# four kinds, 83 for eight); what a graph of uncompiled kernels reaches; the part of a step that compiling saves.
COMPILE_SECONDS = 3.0
COMPILE_SECONDS_PER_STACK = 10.0
GRAPH_FLOPS_PER_SECOND = 210e12
COMPILED_SAVES = 0.38


@dataclass(frozen=True, kw_only=True)
class EngineChoice:
    """The mode a pack's steps run in, and why."""

    mode: Mode
    reason: str


def choose_mode(
    requested: RequestedMode, *, num_steps: int, flops_per_step: float, num_stacks: int, obstacle: str = ""
) -> EngineChoice:
    """The mode on a GPU: `requested`, or what `auto` comes to; eager where `obstacle` says what forbids a capture.

    `auto` compiles where the compiler's time is less than what it takes off all steps together. `num_stacks`: the kinds
    of stacks that would have to be compiled; 0 where that was done for an equal pack.
    """
    if requested == "eager":
        return EngineChoice(mode="eager", reason="engine.mode")
    if obstacle:
        return EngineChoice(mode="eager", reason=obstacle)
    if requested != "auto":
        return EngineChoice(mode=requested, reason="engine.mode")
    if num_stacks == 0:
        return EngineChoice(mode="compiled", reason="compiled for the pack before")
    cost = COMPILE_SECONDS + num_stacks * COMPILE_SECONDS_PER_STACK
    saved = COMPILED_SAVES * num_steps * flops_per_step / GRAPH_FLOPS_PER_SECOND
    reason = f"compiling takes about {cost:.0f} s and saves about {saved:.0f} s"
    return EngineChoice(mode="compiled" if saved > cost else "graph", reason=reason)


def capture_obstacle(methods: Iterable[Method], *, shard: bool) -> str:
    """What keeps the steps of these members from being captured, as far as shapes and settings tell; "" for nothing."""
    if shard:
        return "workers.strategy: the layers that workers gather of a sharded base are not captured"
    return next(filter(None, (method.capture_obstacle() for method in methods)), "")


def flops_of_step(num_base_parameters: int, num_tokens: int) -> float:
    """4 N per token: forward and the gradient of the inputs, 2 N each; a frozen base has no gradient of its weights."""
    return 4.0 * num_base_parameters * num_tokens
