"""What the methods' chosen settings cost, and which of them produce a whole model instead of an adapter."""

from collections.abc import Mapping
from dataclasses import dataclass

from loragrid.comparison.choice import Choice
from loragrid.comparison.costs import STEP_TIME, Cost, cost_of
from loragrid.comparison.settings import mean_figure
from loragrid.comparison.table import Comparison
from loragrid.trials.tags import WRITES_BASE_TAG

_MEMORY_PARTS = (
    "memory/base_bytes",
    "memory/adapter_bytes",
    "memory/gradient_bytes",
    "memory/optimizer_bytes",
    "memory/saved_activation_bytes",
    "memory/loss_bytes",
)


@dataclass(frozen=True, kw_only=True)
class ChoiceCosts:
    """The costs of one choice; None: not measured.

    parameters: trained values. memory: bytes of a training step of this trial by itself: the peak on a GPU, otherwise
    the sum of the parts that are counted exactly. seconds: one optimizer step of this trial by itself, with its spread.
    is_whole_model: whether the method trains the base itself, so that its result is no adapter.
    """

    parameters: float | None
    memory: float | None
    seconds: Cost | None
    is_whole_model: bool

    def by(self, cost: str) -> Cost | None:
        """The cost that `verdict.cost` names."""
        if cost == "time":
            return self.seconds
        counted = {"parameters": self.parameters, "memory": self.memory}[cost]
        return None if counted is None else Cost.exact(counted)


def costs_of(comparison: Comparison, choices: tuple[Choice, ...]) -> Mapping[str, ChoiceCosts]:
    """Name of the choice -> its costs, as means over the trials of the chosen setting."""
    return {choice.name: _costs(comparison, choice) for choice in choices}


def _costs(comparison: Comparison, choice: Choice) -> ChoiceCosts:
    trial_ids = [*choice.setting.trial_ids.values(), *choice.reported_trials.values()]
    figures = {key: mean_figure(comparison, trial_ids, key) for key in _MEMORY_PARTS}
    counted = [value for value in figures.values() if value is not None]
    peak = mean_figure(comparison, trial_ids, "memory/peak_allocated_bytes")
    parameters = mean_figure(comparison, trial_ids, "parameters/trainable")
    # Older sweeps lack the tag. In float32, an eighth of the bytes are half of the values; no adapter trains as many.
    base_bytes = figures["memory/base_bytes"]
    is_large = parameters is not None and base_bytes is not None and 8 * parameters >= base_bytes
    tagged = any(comparison.tags.get(trial_id, {}).get(WRITES_BASE_TAG) == "true" for trial_id in trial_ids)
    return ChoiceCosts(
        parameters=parameters,
        memory=peak if peak is not None else (sum(counted) if len(counted) == len(_MEMORY_PARTS) else None),
        seconds=cost_of(comparison, trial_ids, STEP_TIME),
        is_whole_model=tagged or is_large,
    )
