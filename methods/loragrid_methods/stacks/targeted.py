"""A method that adapts linear layers of the base: the settings that select them."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

from loragrid_methods.stacks.base_layers import LayerShape, OtherModule
from loragrid_methods.stacks.contract import Method
from loragrid_methods.stacks.targets import ALL_LINEAR, Targets


@dataclass(frozen=True, kw_only=True)
class TargetedMethod(Method):
    """Base of all methods that adapt linear layers; its fields select them, with PEFT's names and meaning."""

    target_modules: str | tuple[str, ...] = ALL_LINEAR
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of the hyperparameters: the method's own first, then those that select layers."""
        selecting = [field.name for field in fields(TargetedMethod)]
        return (*(name for name in super().field_names() if name not in selecting), *selecting)

    @property
    def targets(self) -> Targets:
        """The settings that select layers; members that share a stack have equal ones."""
        return Targets(
            target_modules=self.target_modules,
            layers_to_transform=self.layers_to_transform,
            layers_pattern=self.layers_pattern,
            exclude_modules=self.exclude_modules,
        )

    def target_layers(self, layers: Sequence[LayerShape]) -> list[LayerShape]:
        return self.targets.select(layers)

    def left_out_layers(self, layers: Sequence[LayerShape]) -> list[OtherModule]:
        return self.targets.left_out(layers)
