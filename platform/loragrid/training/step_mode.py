"""Decides how a pack's steps run: kernel by kernel (eager), as CUDA graphs, or compiled and then as graphs."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from loragrid_methods import LayerShape, Method

Mode = Literal["eager", "graph", "compiled"]
RequestedMode = Literal["auto", "eager", "graph", "compiled"]

MODE_TAG = "loragrid.engine"

# The cost model of `auto`, measured on H100s with the shapes of SmolLM2-135M, Qwen3-0.6B and Llama-3.2-1B
# (benchmarks/results/engine_step_h100.md). Compiling the decoder layers takes the first number of seconds, and the
# second for every kind of stack in them: 13 s for LoRA only, 43 to 48 for four kinds, 83 for eight.
COMPILE_SECONDS = 3.0
COMPILE_SECONDS_PER_STACK = 10.0
# Compiling saves memory traffic between short kernels, so the saving is proportional to the features that pass through
# them, not to the operations. The first number is the seconds saved per feature and token with one kind of stack, the
# second the relative increase for every further kind. In eleven measured steps of 512 to 16,384 tokens the saving was
# 0.6 to 1.5 times this.
SAVED_SECONDS_PER_FEATURE = 1.25e-11
SAVED_MORE_PER_STACK = 0.15


@dataclass(frozen=True, kw_only=True)
class ModeChoice:
    """The mode in which a pack's steps run, and the reason.

    attention: why the base keeps its own attention; "" if it does not, or without a GPU, where it always does.
    """

    mode: Mode
    reason: str
    attention: str = ""


def choose_mode(
    requested: RequestedMode,
    *,
    num_steps: int,
    features_per_step: int,
    num_stacks: int,
    is_compiled: bool = False,
    obstacle: str = "",
) -> ModeChoice:
    """The mode on a GPU: the requested one, or the result of `auto`; eager if there is an `obstacle` to capturing.

    `auto` compiles if that takes less time than it saves in all steps together. num_stacks: the number of kinds of
    stacks to compile. is_compiled: whether the code is already compiled for an equal pack.
    """
    if requested == "eager":
        return ModeChoice(mode="eager", reason="engine.mode")
    if obstacle:
        return ModeChoice(mode="eager", reason=obstacle)
    if requested != "auto":
        return ModeChoice(mode=requested, reason="engine.mode")
    if is_compiled:
        return ModeChoice(mode="compiled", reason="already compiled for the previous pack")
    cost = COMPILE_SECONDS + num_stacks * COMPILE_SECONDS_PER_STACK
    per_feature = SAVED_SECONDS_PER_FEATURE * (1 + SAVED_MORE_PER_STACK * (num_stacks - 1))
    saved = per_feature * features_per_step * num_steps
    reason = f"compiling takes about {cost:.0f} s and saves about {saved:.0f} s"
    return ModeChoice(mode="compiled" if saved > cost else "graph", reason=reason)


def capture_obstacle(methods: Iterable[Method], *, shard: bool) -> str:
    """Why the settings forbid capturing steps of these members; "" if they do not."""
    if shard:
        return "workers.strategy: steps with a sharded base cannot be captured"
    return next(filter(None, (method.capture_obstacle() for method in methods)), "")


def features_of_step(layers: Iterable[LayerShape], num_tokens: int) -> int:
    """The input and output features of the base's linear layers, summed over all tokens of a step."""
    return num_tokens * sum(layer.in_features + layer.out_features for layer in layers)
