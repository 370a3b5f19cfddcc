"""One worker's batches for all members of a pack; a member's rows depend only on its seed and the step."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loragrid.data.dataset import TokenizedData, TokenRows, batch_indices
from loragrid.data.labels import IGNORED
from loragrid.training.chunks import Chunks
from loragrid.training.step import Batch

ROWS_TAG = "loragrid.scoring.rows_at_once"
PROMPTS_TAG = "loragrid.scoring.prompts_at_once"


class PackBatches:
    """The batches of members with the given seeds; members of one seed see the same rows.

    A training batch holds all rows of a step that belong to this worker; an evaluation batch holds one chunk of
    `scoring` for each member. `answering`: the chunks of prompts that are answered at once; they may be larger.
    """

    def __init__(
        self,
        data: TokenizedData,
        seeds: Sequence[int],
        batch_size: int,
        *,
        micro_batch_size: int | None = None,
        prompts_at_once: int | None = None,
        worker: int = 0,
        num_workers: int = 1,
        device: torch.device | str = "cpu",
    ) -> None:
        assert batch_size % num_workers == 0, "every worker takes an equal share of the batch"
        self.data, self.seeds, self.batch_size = data, list(seeds), batch_size
        self.worker, self.num_workers = worker, num_workers
        place = {"worker": worker, "num_workers": num_workers}
        self.scoring = Chunks(micro_batch_size or batch_size // num_workers, **place, tag=ROWS_TAG)
        self.answering = self.scoring
        if prompts_at_once is not None and prompts_at_once > self.scoring.size:
            self.answering = Chunks(prompts_at_once, **place, tag=PROMPTS_TAG)
        self.device = torch.device(device)
        self.num_eval_labels = int((data.evaluation.label_targets != IGNORED).sum())
        self._evaluation: dict[int, list[Batch]] = {}
        self._evaluated_at_once = 0

    @property
    def tags(self) -> dict[str, str]:
        """The chunk sizes of scoring, as MLflow tags, if they differ from the configured ones."""
        return self.scoring.tags | self.answering.tags

    def training(self, step: int) -> Batch:
        """This worker's rows in step `step`, counted from 0."""
        return self.rows(step).to(self.device)

    def rows(self, step: int) -> Batch:
        """The same rows as `training`, in main memory."""
        rows = self.data.train
        share = self.batch_size // self.num_workers
        mine = slice(self.worker * share, (self.worker + 1) * share)
        chosen = {seed: batch_indices(len(rows), self.batch_size, seed, step) for seed in dict.fromkeys(self.seeds)}
        counts = {seed: (rows.label_targets[indices] != IGNORED).sum() for seed, indices in chosen.items()}
        return _batch(
            rows.select(torch.cat([chosen[seed][mine] for seed in self.seeds])),
            torch.stack([counts[seed] for seed in self.seeds]).double(),
        )

    def tokens(self, step: int, member: int) -> int:
        """The number of non-padding tokens in one member's whole batch."""
        return sum(self.row_tokens(step, member))

    def row_tokens(self, step: int, member: int) -> list[int]:
        """The number of non-padding tokens in each row of one member's whole batch."""
        rows = self.data.train
        lengths: list[int] = rows.num_tokens[
            batch_indices(len(rows), self.batch_size, self.seeds[member], step)
        ].tolist()
        return lengths

    def evaluation(self, num_members: int) -> list[Batch]:
        """This worker's share of the evaluation rows, the same for every member; kept on the device.

        Every batch has the same shape: the last one is filled up with rows without labels. `num_labels` is 1,
        which makes losses sums.
        """
        size = self.scoring.size
        if size != self._evaluated_at_once:
            self._evaluation, self._evaluated_at_once = {}, size
        if num_members not in self._evaluation:
            rows, ones = self.data.evaluation, torch.ones(num_members).double()
            self._evaluation[num_members] = [
                _batch(_repeat(_padded(rows, start, size), num_members), ones).to(self.device)
                for start in self.scoring.starts(len(rows))
            ]
        return self._evaluation[num_members]

    def by_row(self, rows: TokenRows, num_members: int) -> Iterator[tuple[int, Batch]]:
        """Yield (index of its first row, batch) for this worker's share of `rows`, the same for every member.

        `num_labels` has an entry of 1 for every row, so each loss is the sum over one row.
        """
        size = self.scoring.size
        ones = torch.ones(num_members * size).double()
        for start in self.scoring.starts(len(rows)):
            yield start, _batch(_repeat(_padded(rows, start, size), num_members), ones).to(self.device)


def _batch(rows: TokenRows, num_labels: Tensor) -> Batch:
    """The rows as a batch, in main memory."""
    return Batch(
        input_ids=rows.input_ids,
        label_positions=rows.label_positions,
        label_targets=rows.label_targets,
        num_labels=num_labels,
    )


def _padded(rows: TokenRows, start: int, size: int) -> TokenRows:
    """`size` rows from `start` on; past the end, copies of the first row without labels."""
    indices = torch.arange(start, start + size)
    inside = indices < len(rows)
    chosen = rows.select(torch.where(inside, indices, 0))
    targets = torch.where(inside.unsqueeze(1), chosen.label_targets, IGNORED)
    return replace(chosen, label_targets=targets)


def _repeat(rows: TokenRows, times: int) -> TokenRows:
    return rows.select(torch.arange(len(rows)).repeat(times))
