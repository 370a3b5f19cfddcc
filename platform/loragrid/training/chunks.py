"""Decides how many rows of each member are scored at once, and which rows belong to a worker."""

import math


class Chunks:
    """This worker's share of rows, in chunks of at most `size` rows of each member; `halve` makes them smaller.

    Workers take turns of the initial `size` rows. A worker that halves its chunks still takes whole turns, so
    every row belongs to exactly one worker. Every turn has at least one chunk, because with a sharded base all workers
    take part in every forward.
    """

    def __init__(self, size: int, *, worker: int, num_workers: int, tag: str) -> None:
        self.size = self._turn = size
        self._worker, self._num_workers, self._tag = worker, num_workers, tag
        self.tags: dict[str, str] = {}
        """The chunk size and the reason, as MLflow tags, if the size differs from the configured one."""

    def halve(self, reason: str) -> None:
        """Use chunks of at most half the size from now on; a turn remains a whole number of chunks."""
        assert self.size > 1
        half = self.size // 2
        self.size = next(size for size in range(half, 0, -1) if self._turn % size == 0)
        self.tags = {self._tag: str(self.size), f"{self._tag}.reason": reason}

    def starts(self, num_rows: int) -> list[int]:
        """The index of the first row of each of this worker's chunks, out of `num_rows` rows."""
        turn = self._turn
        num_rounds = math.ceil(num_rows / (turn * self._num_workers))
        turns = range(self._worker * turn, num_rounds * self._num_workers * turn, self._num_workers * turn)
        return [
            start for first in turns for start in range(first, max(min(first + turn, num_rows), first + 1), self.size)
        ]
