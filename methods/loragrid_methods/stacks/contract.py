"""The contract of a method: hyperparameters, a card, and the stacks it builds for the members of a pack.

The training loop names no method. One step of a pack runs, in this order:

    forward: every adapted layer adds what its stacks return for their members' rows
        stack(x)                                             a low-rank stack only declares `term()`
        stack.forward_with_base(x, base output, weight)      for a stack with `needs_base_output` (DoRA)
    loss of every member; backward
    clip each member's gradient to its own norm
    stack.before_step()          for every stack: gradient corrections (LoRA-FA projected)
    AdamW with every member's learning rate x method.learning_rate_multiplier(parameter)   (LoRA+)
        and with its weight decay where method.is_decayed(parameter)                       (full: not its norms)
    stack.after_step(completed)  for every stack: what follows an update (Delta-LoRA's snapshot)
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor, nn

from loragrid_methods.stacks.adapter_stack import AdapterStack
from loragrid_methods.stacks.base_layers import LayerShape, OtherModule

__all__ = ["Card", "LayerShape", "Method", "ParameterCount"]


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a user must know about a method before comparing it; shown in the documentation and as MLflow tags."""

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
        source = [self.authors, str(self.year), f"arXiv {self.arxiv}" if self.arxiv else ""]
        lines = [
            f"## {self.title}",
            f"{self.paper} ({', '.join(filter(None, source))})",
            f"**Update rule.** {self.update_rule}",
            f"**What differs from the paper.** {self.differences}",
            f"**PEFT equivalent.** {self.peft_equivalent}",
        ]
        return "\n\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """One member's exact parameter counts, computed from shapes.

    trainable: updated by the optimizer. stored: written to an adapter file, which must load elsewhere without a random
    seed. shared: the part of `stored` of which all layers share one copy (VeRA's projections). working: held by the
    stacks besides `stored`, also in the optimizer's dtype: scalings, projections of gradients, row norms.
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
    """Why the method cannot train on a sharded base, as the end of a sentence; "" if it can."""
    trained: ClassVar[tuple[str, ...]] = ()
    """The names of the tensors that train in every stack."""
    draws_from_seed: ClassVar[bool] = False
    """Whether a member's initial weights depend on its seed; if not, seeds differ only in their batches."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = cls.__module__.rpartition(".")[2]
        # With its own export and an inherited `merge`, the class would merge its adapters wrongly.
        exports, merges = (_definer(cls, name) for name in ("peft_config", "merge"))
        if merges is not exports and issubclass(exports, merges):
            raise TypeError(f"{cls.__name__} exports an adapter of its own (`peft_config`) and must define its `merge`")

    name: ClassVar[str]

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of the hyperparameters, in the order of their definition."""
        return tuple(field.name for field in fields(cls))

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Name -> default of every hyperparameter."""
        defaults = {field.name: field.default for field in fields(cls)}
        return {name: defaults[name] for name in cls.field_names()}

    def hyperparameters(self) -> dict[str, Any]:
        """Name -> value of every hyperparameter."""
        return {name: getattr(self, name) for name in self.field_names()}

    def stack_key(self) -> Hashable:
        """Members with equal keys share their stacks; ranks and scalings may differ within a stack."""
        return (self.name,)

    def target_layers(self, layers: Sequence[LayerShape]) -> list[LayerShape]:
        """The layers that this method adapts, selected from all adaptable `layers`; none by default."""
        return []

    def left_out_layers(self, layers: Sequence[LayerShape]) -> list[OtherModule]:
        """The linear layers that the method's settings name and that get no gradient from text; none by default."""
        return []

    @classmethod
    @abstractmethod
    def build_stacks(
        cls, members: Sequence[Self], seeds: Sequence[int], layers: Sequence[LayerShape], base: nn.Module
    ) -> Mapping[str, AdapterStack]:
        """The stacks of members with equal `stack_key`, by layer name ("" for one that belongs to no layer).

        A member's initial draw depends only on its own seed and the layer's name, never on the other members.
        """

    @abstractmethod
    def num_parameters(self, layers: Sequence[LayerShape], num_base_parameters: int = 0) -> ParameterCount:
        """Exact counts; `layers` are all adaptable layers, from which the method selects its targets.

        `num_base_parameters` is the size of the whole base, for a method that trains it.
        """

    def check_steps(self, steps: int) -> None:  # noqa: B027  # a hook with a default, not an abstract method
        """Refuse a training that ends before the step that distinguishes the method from others.

        Raises:
            ValueError: `steps` optimizer steps are too few.
        """

    def capture_obstacle(self) -> str:
        """Why a step of this method cannot be captured as a CUDA graph; "" if it can."""
        return ""

    def learning_rate_multiplier(self, parameter_name: str) -> float:
        """Factor on the member's learning rate for one of the stack's parameters."""
        return 1.0

    @classmethod
    def is_decayed(cls, parameter_name: str) -> bool:
        """Whether weight decay applies to one of the stack's parameters; the same for all members of a stack."""
        return True

    def peft_config(self) -> dict[str, Any]:
        """The method's part of PEFT's `adapter_config.json`; empty when there is no adapter to export.

        The export replaces `target_modules` by the names of the layers that were adapted.
        """
        return {}

    @classmethod
    def merge(cls, weight: Tensor, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Tensor:
        """One layer's weight with an exported adapter merged into it.

        weight (d_out, d_in) in float64 -> the same shape. `config`: the adapter's configuration, written by any version
        of this package. `tensors`: PEFT's key without the layer's name -> tensor, the layer's own and those that all
        layers share. A class that overrides `peft_config` must override this, too.

        Raises:
            ValueError: the adapter is of another kind.
        """
        raise ValueError(f"{cls.name} has no adapter to merge")


def _definer(cls: type, name: str) -> type:
    """The class that defines the attribute `name` of `cls`."""
    return next(base for base in cls.__mro__ if name in vars(base))


def require(condition: bool, method: str, field: str, value: object, allowed: str) -> None:
    """Refuse a hyperparameter's value if `condition` is false.

    Raises:
        ValueError: the value is refused; the message names the method, the field, the value and what is allowed.
    """
    if not condition:
        raise ValueError(f"{method}.{field}: {value!r} is not allowed; allowed: {allowed}")
