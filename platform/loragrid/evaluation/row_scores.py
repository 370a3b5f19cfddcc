"""How a trial does on each row of a split: what paired comparisons of methods are made on."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from loragrid.data.labels import IGNORED

if TYPE_CHECKING:
    from loragrid.data.dataset import TokenRows


@dataclass(frozen=True, kw_only=True)
class RowScores:
    """The scores of N rows, column -> a value per row.

    row: its digest. num_labels: tokens whose prediction counts. loss: cross-entropy summed over these (nats).
    correct: whether it is answered right, 1 or 0; where there is a task.
    """

    columns: dict[str, Sequence[str | int | float]]

    @classmethod
    def of(cls, rows: "TokenRows", losses: Tensor) -> "RowScores":
        """The scores of N rows: losses (N,) are summed over each row's labels."""
        num_labels = (rows.label_targets != IGNORED).sum(1)
        return cls(columns={"row": rows.digests(), "num_labels": num_labels.tolist(), "loss": losses.double().tolist()})

    def with_correct(self, right: Tensor) -> "RowScores":
        """These and whether each row was answered right: right (N,), 1 or 0."""
        return RowScores(columns={**self.columns, "correct": [int(value) for value in right.tolist()]})

    def figures(self, split: str) -> dict[str, float]:
        """Metric key -> figure over all rows: the mean loss of a label, the share of right answers."""
        loss, num_labels = (sum(map(float, self.columns[name])) for name in ("loss", "num_labels"))
        figures = {f"{split}/loss": loss / num_labels}
        if "correct" in self.columns:
            correct = [float(value) for value in self.columns["correct"]]
            figures[f"{split}/accuracy"] = sum(correct) / len(correct)
        return figures

    def write(self, split: str, folder: Path) -> None:
        """Write `<split>.csv` into the folder; every number reads back as what it was."""
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{split}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(self.columns)
            writer.writerows(zip(*self.columns.values(), strict=True))
