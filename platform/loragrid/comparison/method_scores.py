"""The figures of every method, seed and test row that one comparison of methods rests on."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class MethodScores:
    """M methods at their chosen settings, each trained with the same S seeds and scored on the same N test rows.

    names: M different names.
    values (M, S, N): a row's loss per label in nats, or its figure for a task.
    weights (N,): a row's number of labels for a loss, 1 for a task's figure. All are positive.
    groups (N,): rows with equal numbers belong to one group, such as a conversation. The order does not matter.
    is_proportion: the values are 0 or 1, or shares between them.
    seed_variances (M,): the variance over seeds of a method that its other settings show to be far noisier than the
        others, 0 for every other method, see `seed_spread`; None: nothing is known.

    Raises:
        ValueError: a shape does not fit, a value is not finite, a weight is not positive, or a proportion is outside
            0 to 1.
    """

    names: tuple[str, ...]
    values: Floats
    weights: Floats
    groups: NDArray[np.int64]
    higher_is_better: bool = False
    is_proportion: bool = False
    seed_variances: Floats | None = None

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names) or not self.names:
            raise ValueError(f"names are {', '.join(self.names) or 'none'}; allowed: one or more different names")
        if self.values.ndim != 3 or self.values.shape[0] != len(self.names) or 0 in self.values.shape:
            raise ValueError(
                f"values have the shape {self.values.shape}; "
                f"allowed: ({len(self.names)} methods, seeds, rows), none of them empty"
            )
        for name, array in (("weights", self.weights), ("groups", self.groups)):
            if array.shape != (self.values.shape[2],):
                raise ValueError(
                    f"{name} have the shape {array.shape}; allowed: ({self.values.shape[2]},), one per row"
                )
        self._check_values()
        if not (np.isfinite(self.weights).all() and (self.weights > 0).all()):
            raise ValueError("a weight is not a positive number; allowed: rows with labels only")
        if not np.issubdtype(self.groups.dtype, np.integer):
            raise ValueError(f"groups are of type {self.groups.dtype}; allowed: integers, one number per group")

        known = self.seed_variances
        if known is not None and (
            known.shape != (len(self.names),) or not (np.isfinite(known).all() and (known >= 0).all())
        ):
            raise ValueError(f"seed variances are {known}; allowed: one per method, each 0 or more")

    def _check_values(self) -> None:
        wrong = ~np.isfinite(self.values)
        allowed = "finite numbers"
        if self.is_proportion and not wrong.any():
            wrong = (self.values < 0) | (self.values > 1)
            allowed = "proportions from 0 to 1"
        if wrong.any():
            method, seed, row = (int(index[0]) for index in np.nonzero(wrong))
            value = self.values[method, seed, row]
            raise ValueError(f"{self.names[method]}: seed number {seed}, row {row} is {value}; allowed: {allowed}")
