"""Names the layers that a trial adapts, and those that its settings name and that training on text cannot change."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from loragrid.formatting import count_of
from loragrid.planning.plan import base_shape
from loragrid.trials.trial import Trial


@dataclass(frozen=True, kw_only=True)
class AdaptedLayers:
    """The names of the layers that a trial adapts, and of those that are left out because they get no gradient."""

    names: tuple[str, ...]
    left_out: tuple[str, ...]

    @classmethod
    def of(cls, trial: Trial) -> "AdaptedLayers":
        """The layers of a trial, from the shape of its base; none for a method without adapters."""
        layers = base_shape(trial.model).layers
        return cls(
            names=tuple(layer.name for layer in trial.method.target_layers(layers)),
            left_out=tuple(layer.name for layer in trial.method.left_out_layers(layers)),
        )

    def sentence(self) -> str:
        """For example: 14 layers: model.layers.{0-1}.self_attn.{q_proj,k_proj}, ..."""
        adapted = f"{count_of(len(self.names), 'layer')}: {compressed(self.names)}"
        if not self.left_out:
            return adapted
        left_out = f"{count_of(len(self.left_out), 'layer')}: {compressed(self.left_out)}"
        return f"{adapted}; left out, because training on text cannot change them: {left_out}"


def adapted_sentences(trials: Sequence[Trial]) -> list[str]:
    """For every base and selection, a sentence that names the methods and the layers they adapt."""
    methods: dict[tuple[str, str], dict[str, None]] = {}
    for trial in trials:
        layers = AdaptedLayers.of(trial)
        if layers.names:
            methods.setdefault((trial.model.name, layers.sentence()), {})[trial.label or trial.method.name] = None
    several = len({model for model, _ in methods}) > 1
    return [
        f"adapted by {', '.join(names)}{f' on {model}' if several else ''}: {sentence}"
        for (model, sentence), names in methods.items()
    ]


def compressed(names: Iterable[str]) -> str:
    """The names, those that differ only in their first number or in their last part as one: layers.{0-3}.{up,down}."""
    numbers: dict[tuple[str, str], list[int]] = {}
    for name in names:
        parent, _, last = name.rpartition(".")
        match = re.search(r"(?<=\.)\d+(?=\.|$)", parent)
        number = -1 if match is None else int(match[0])
        place = parent if match is None else f"{parent[: match.start()]}{{}}{parent[match.end() :]}"
        numbers.setdefault((place, last), []).append(number)
    lasts: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (place, last), found in numbers.items():
        lasts.setdefault((place, tuple(sorted(found))), []).append(last)
    return ", ".join(_one(place, found, ends) for (place, found), ends in lasts.items())


def _one(place: str, numbers: Sequence[int], lasts: Sequence[str]) -> str:
    parent = place if numbers[0] < 0 else place.replace("{}", _braced(_ranges(numbers)))
    return ".".join(filter(None, (parent, _braced(lasts))))


def _braced(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 and "-" not in parts[0] else "{" + ",".join(parts) + "}"


def _ranges(numbers: Sequence[int]) -> list[str]:
    """Whole numbers in ascending order as ranges: 0, 1, 2, 5 -> 0-2 and 5."""
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
