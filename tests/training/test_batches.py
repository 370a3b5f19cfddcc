"""Every member's rows in every step follow from its seed and the step; workers cut them without overlap."""

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from loragrid.data.dataset import TokenizedData, TokenRows, batch_indices
from loragrid.data.labels import IGNORED
from loragrid.training.batches import PackBatches

NUM_TRAIN, NUM_EVAL, LENGTH, LABELS = 24, 10, 7, 3
SEEDS = [5, 1, 5, 9]


def make_rows(count: int, first: int) -> TokenRows:
    """Rows that carry their own number in every position; row n has 1 + n % 3 labels and 4 + n % 4 tokens."""
    numbers = torch.arange(first, first + count)
    targets = numbers.unsqueeze(1).repeat(1, LABELS)
    targets[torch.arange(LABELS).unsqueeze(0) > (numbers % 3).unsqueeze(1)] = IGNORED
    return TokenRows(
        input_ids=numbers.unsqueeze(1).repeat(1, LENGTH),
        label_positions=torch.arange(LABELS).repeat(count, 1),
        label_targets=targets,
        num_tokens=4 + numbers % 4,
        groups=numbers,
    )


DATA = TokenizedData(
    train=make_rows(NUM_TRAIN, 0),
    evaluation=make_rows(NUM_EVAL, 100),
    test=make_rows(NUM_EVAL - 1, 200),
    skipped={},
    digest="sha256:0",
    num_source_rows=NUM_TRAIN + NUM_EVAL,
)


def make_batches(seeds: Sequence[int] = SEEDS, batch_size: int = 4, **where: Any) -> PackBatches:
    return PackBatches(DATA, seeds, batch_size, **where)


def row_numbers(batches: PackBatches, step: int) -> list[list[int]]:
    """The numbers of every member's rows."""
    ids = batches.training(step).input_ids
    return ids[:, 0].view(len(batches.seeds), -1).tolist()


def num_labels_of(rows: Sequence[int]) -> int:
    return sum(1 + row % 3 for row in rows)


def test_members_see_equal_rows_exactly_if_seeds_are_equal() -> None:
    for step in range(12):
        first, second, third, fourth = row_numbers(make_batches(), step)
        assert first == third
        assert len({tuple(first), tuple(second), tuple(fourth)}) == 3


def test_a_members_rows_do_not_depend_on_its_pack() -> None:
    packed, alone = make_batches(), make_batches([1])
    for step in (7, 0, 3):
        assert row_numbers(alone, step)[0] == row_numbers(packed, step)[1]
        assert row_numbers(packed, step)[1] == batch_indices(NUM_TRAIN, 4, 1, step).tolist()


def test_an_epoch_gives_a_member_every_row_once() -> None:
    batches = make_batches()
    for member in range(len(SEEDS)):
        seen = [row for step in range(NUM_TRAIN // 4) for row in row_numbers(batches, step)[member]]
        assert sorted(seen) == list(range(NUM_TRAIN))


@pytest.mark.parametrize("num_workers", [1, 2, 4])
def test_workers_share_every_members_rows_without_overlap_in_order(num_workers: int) -> None:
    workers = [make_batches(worker=worker, num_workers=num_workers) for worker in range(num_workers)]
    for step in range(8):
        shares = [row_numbers(worker, step) for worker in workers]
        together = [[row for share in shares for row in share[member]] for member in range(len(SEEDS))]
        assert together == row_numbers(make_batches(), step)
        assert {len(rows) for share in shares for rows in share} == {4 // num_workers}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_labels_are_counted_over_the_whole_step_of_all_workers(num_workers: int) -> None:
    whole = make_batches()
    for worker in range(num_workers):
        batches = make_batches(worker=worker, num_workers=num_workers)
        for step in range(8):
            counts = batches.training(step).num_labels
            assert counts.dtype == torch.float64
            assert counts.tolist() == [num_labels_of(rows) for rows in row_numbers(whole, step)]


def test_every_batch_has_one_shape_and_keeps_its_labels() -> None:
    batches = make_batches()
    for step in range(NUM_TRAIN):
        batch = batches.training(step)
        assert batch.input_ids.shape == (len(SEEDS) * 4, LENGTH)
        assert batch.label_positions.shape == batch.label_targets.shape == (len(SEEDS) * 4, LABELS)
        for ids, targets in zip(batch.input_ids, batch.label_targets, strict=True):
            assert set(targets.tolist()) - {IGNORED} == {int(ids[0])}


def test_tokens_are_those_of_one_members_whole_batch_without_padding() -> None:
    batches = make_batches(worker=1, num_workers=2)
    for step in range(6):
        for member, rows in enumerate(row_numbers(make_batches(), step)):
            assert batches.tokens(step, member) == sum(4 + row % 4 for row in rows) < 4 * LENGTH


@pytest.mark.parametrize("batch_size", [1, 4, 12, 64])
@pytest.mark.parametrize("num_workers", [1, 3])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 4])
def test_every_evaluation_row_counts_once_over_all_workers(
    batch_size: int, num_workers: int, micro_batch_size: int | None
) -> None:
    rows_at_once = micro_batch_size or batch_size
    batch_size *= num_workers
    labels: list[list[int]] = [[], []]
    for worker in range(num_workers):
        batches = make_batches(
            batch_size=batch_size, micro_batch_size=micro_batch_size, worker=worker, num_workers=num_workers
        )
        for batch in batches.evaluation(2):
            assert batch.input_ids.shape == (2 * rows_at_once, LENGTH)
            assert batch.num_labels.tolist() == [1.0, 1.0]
            for member, targets in enumerate(batch.label_targets.chunk(2)):
                labels[member] += targets[targets != IGNORED].tolist()
        assert batches.num_eval_labels == num_labels_of(range(100, 100 + NUM_EVAL))
    expected = [row for row in range(100, 100 + NUM_EVAL) for _ in range(1 + row % 3)]
    assert sorted(labels[0]) == sorted(labels[1]) == expected


@pytest.mark.parametrize("batch_size", [2, 8, 12])
def test_every_worker_evaluates_as_many_batches_as_the_others(batch_size: int) -> None:
    numbers = {len(make_batches(batch_size=batch_size, worker=w, num_workers=2).evaluation(2)) for w in range(2)}
    assert numbers == {-(-NUM_EVAL // batch_size)}


@pytest.mark.parametrize("rows", [5, 8, 12])
@pytest.mark.parametrize("num_workers", [1, 2])
def test_halved_chunks_leave_every_row_to_one_worker(rows: int, num_workers: int) -> None:
    for times in itertools.product(range(3), repeat=num_workers):
        seen = []
        for worker, number in enumerate(times):
            batches = make_batches(batch_size=rows * num_workers, worker=worker, num_workers=num_workers)
            for _ in range(number):
                before = batches.scoring.size
                if before > 1:
                    batches.scoring.halve("no memory")
                    assert 1 <= batches.scoring.size <= before / 2
            for batch in batches.evaluation(1):
                assert len(batch.input_ids) == batches.scoring.size
                seen += batch.label_targets[batch.label_targets != IGNORED].tolist()
        assert sorted(seen) == [row for row in range(100, 100 + NUM_EVAL) for _ in range(1 + row % 3)]


def test_evaluation_batches_are_made_once() -> None:
    batches = make_batches()
    assert batches.evaluation(4) is batches.evaluation(4)
    assert len(batches.evaluation(1)[0].input_ids) == 4


def test_a_batch_that_workers_cannot_share_equally_is_refused() -> None:
    with pytest.raises(AssertionError, match="equal share"):
        make_batches(batch_size=4, num_workers=3)
