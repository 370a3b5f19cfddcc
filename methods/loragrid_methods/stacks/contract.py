"""What a method is: hyperparameters, a card, and the stacks it builds for the members of a pack.

The training loop names no method. For one step of a pack it does, in this order:

    forward: every adapted layer adds what its stacks return for their members' rows
        stack(x)                                             a low-rank stack only declares `term()`
        stack.forward_with_base(x, base output, weight)      for a stack with `needs_base_output` (DoRA)
    loss of every member; backward
    clip each member's gradient to its own norm
    stack.before_step()          for every stack: gradient corrections (LoRA-FA projected)
    AdamW with every member's learning rate x method.learning_rate_multiplier(parameter)   (LoRA+)
    stack.after_step(completed)  for every stack: what follows an update (Delta-LoRA's snapshot)
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.targets import LayerShape

__all__ = ["Card", "LayerShape", "Method", "ParameterCount"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a user must know of a method before comparing it; becomes documentation and MLflow tags."""

    title: str
    authors: str
    year: int
    arxiv: str
    paper: str
    update_rule: str
    differences: str
    peft_equivalent: str

    def to_markdown(self) -> str:
        """The card as Markdown, heading included."""
        lines = [
            f"## {self.title}",
            f"{self.paper} ({self.authors}, {self.year}" + (f", arXiv {self.arxiv})" if self.arxiv else ")"),
            f"**Update rule.** {self.update_rule}",
            f"**What differs from the paper.** {self.differences}",
            f"**PEFT equivalent.** {self.peft_equivalent}",
        ]
        return "\n\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Exact numbers of parameters of one member, counted from shapes.

    `trainable` is what the optimizer updates; `stored` what an adapter file must hold to be loaded elsewhere without
    a random seed; `shared` the part of `stored` that one copy serves for all layers (VeRA's projections). `working` is
    what the stacks hold beside `stored`, in the optimizer's type too: scalings, projections of gradients, row norms.
    """

    trainable: int
    stored: int
    shared: int = 0
    working: int = 0


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """Base of all methods; the fields of a subclass are its hyperparameters."""

    card: ClassVar[Card]
    packable: ClassVar[bool] = True
    """Whether several trials may share one base; False for a method that writes the base."""
    sharding_obstacle: ClassVar[str] = ""
    """Why the method does not train on a base that workers share out, as the end of a sentence; "" where it does."""
    trained: ClassVar[tuple[str, ...]] = ()
    """The names of the tensors that train in every stack."""
    draws_from_seed: ClassVar[bool] = False
    """Whether a member's start depends on its seed; where it does not, seeds differ in their batches only."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = cls.__module__.rpartition(".")[2]
        # An export of another kind than the merge that is inherited would be merged wrong.
        exports, merges = (_definer(cls, name) for name in ("peft_config", "merge"))
        if merges is not exports and issubclass(exports, merges):
            raise TypeError(f"{cls.__name__} exports an adapter of its own (`peft_config`) and must define its `merge`")

    name: ClassVar[str]

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The hyperparameters, in the order of their definition."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Name -> default of every hyperparameter."""
        return {field.name: field.default for field in fields(cls)}

    def hyperparameters(self) -> dict[str, Any]:
        """Name -> value of every hyperparameter."""
        return {name: getattr(self, name) for name in self.field_names()}

    def stack_key(self) -> Hashable:
        """Members with equal keys share their stacks; ranks and scalings may differ inside one."""
        return (self.name,)

    def target_layers(self, layers: Sequence[LayerShape]) -> list[LayerShape]:
        """The layers this method adapts, out of all that can be adapted; none unless a method says otherwise."""
        return []

    @classmethod
    @abstractmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        """The stacks of members with equal `stack_key`, by layer name ("" for one that belongs to no layer).

        A member's initial draw depends on its own seed and the layer's name alone, so a pack's composition
        never changes it.
        """

    @abstractmethod
    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        """Exact counts over `layers` (all that can be adapted; the method selects its targets itself).

        `num_base_parameters` is the size of the whole base, for a method that trains it.
        """

    def check_steps(self, steps: int) -> None:  # noqa: B027  # a hook with a default, not an abstract method
        """Refuse a training in which the method would not be itself.

        Raises:
            ValueError: `steps` optimizer steps are too few for what defines the method to happen.
        """

    def capture_obstacle(self) -> str:
        """Why a step of this method cannot be captured as a CUDA graph; "" where it can."""
        return ""

    def learning_rate_multiplier(self, parameter_name: str) -> float:
        """Factor on the member's learning rate for one of the stack's parameters."""
        return 1.0

    def peft_config(self) -> dict[str, Any]:
        """The method's part of PEFT's `adapter_config.json`; empty when there is no adapter to export."""
        return {}

    @classmethod
    def merge(cls, weight: Tensor, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        """The weight of one layer with an exported adapter merged into it; the class that has `peft_config` has this.

        weight (d_out, d_in) in float64 -> the same shape. `config` is the adapter's, of any version of this package;
        `tensors` are the layer's by PEFT's key after the layer's name, and what all layers share.

        Raises:
            ValueError: an adapter of another kind.
        """
        raise ValueError(f"{cls.name} has no adapter to merge")


def _definer(cls: type, name: str) -> type:
    """The class from which `cls` has an attribute."""
    return next(base for base in cls.__mro__ if name in vars(base))


def require(condition: bool, method: str, field: str, value: object, allowed: str) -> None:
    """Refuse a hyperparameter.

    Raises:
        ValueError: `condition` is false; the message names the method, the field, the value and what is allowed.
    """
    if not condition:
        raise ValueError(f"{method}.{field}: {value!r} is not possible; allowed: {allowed}")
