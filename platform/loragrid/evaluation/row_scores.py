"""A trial's scores on every row of a split: the data of paired comparisons of methods."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from loragrid.data.labels import IGNORED

if TYPE_CHECKING:
    from loragrid.data.dataset import TokenRows


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """The scores of N rows, column -> a value per row.

    row: its digest. group: the digest of its group. num_labels: labelled tokens. loss: cross-entropy in nats, summed
    over these. A task adds columns of its own, such as `correct` (1 or 0), and `task_figures`, figure name -> value
    over all rows.
    """

    columns: dict[str, Sequence[str | int | float]]
    task_figures: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, rows: "TokenRows", losses: Tensor) -> "RowScores":
        """The scores of N rows: losses (N,) are summed over each row's labels."""
        num_labels = (rows.label_targets != IGNORED).sum(1)
        named = {"row": rows.digests(), "group": rows.group_digests()}
        return cls(columns={**named, "num_labels": num_labels.tolist(), "loss": losses.double().tolist()})

    def with_task(self, columns: Mapping[str, Sequence[float]], figures: Mapping[str, float]) -> "RowScores":
        """These scores with those of a task added; whole numbers become integers."""
        own = {name: [_number(value) for value in values] for name, values in columns.items()}
        return RowScores(columns={**self.columns, **own}, task_figures=figures)

    def figures(self, split: str) -> dict[str, float]:
        """Metric key -> figure over all rows: the mean loss per label, and the task's figures."""
        loss, num_labels = (sum(map(float, self.columns[name])) for name in ("loss", "num_labels"))
        return {f"{split}/loss": loss / num_labels} | {f"{split}/{name}": v for name, v in self.task_figures.items()}

    def write(self, split: str, folder: Path) -> None:
        """Write `<split>.csv` into the folder; every number reads back to the bit."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(zip(*self.columns.values(), strict=True))


def _number(value: float) -> int | float:
    return int(value) if value.is_integer() else value
