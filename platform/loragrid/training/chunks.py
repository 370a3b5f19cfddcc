"""How many rows of each member are scored at once, and which rows are a worker's."""

import math


class Chunks:
    """This worker's share of rows, in chunks of at most `size` rows of each member, until `halve`.

    Workers take turns, each as long as the rows that it was to score at once: whoever then scores fewer, every row
    stays one worker's. In every turn there is a chunk, for where the base is sharded all workers take part in every
    forward.
    """

    def __init__(self, size: int, *, worker: int, num_workers: int, tag: str) -> None:
        self.size = self._turn = size
        self._worker, self._num_workers, self._tag = worker, num_workers, tag
        self.tags: dict[str, str] = {}
        """How rows are scored where that is not as configured, for the record."""

    def halve(self, reason: str) -> None:
        """Score at most half as many at once from now on, in equal parts of a turn."""
        assert self.size > 1
        half = self.size // 2
        self.size = next(size for size in range(half, 0, -1) if self._turn % size == 0)
        self.tags = {self._tag: str(self.size), f"{self._tag}.reason": reason}

    def starts(self, num_rows: int) -> list[int]:
        """Where this worker's chunks of so many rows begin."""
        turn = self._turn
        num_rounds = math.ceil(num_rows / (turn * self._num_workers))
        turns = range(self._worker * turn, num_rounds * self._num_workers * turn, self._num_workers * turn)
        return [
            start for first in turns for start in range(first, max(min(first + turn, num_rows), first + 1), self.size)
        ]
