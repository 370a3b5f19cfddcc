"""Several workers train a pack as one worker does: real processes that meet through gloo."""

from pathlib import Path

import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from tests.loragrid.small_packs import largest_difference, make_setup, run_pack, train_as_worker, worker_packs

NUM_WORKERS = 2


@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_two_workers_with_four_rows_each_train_and_evaluate_as_one_with_eight(
    tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path, micro_batch_size: int | None
) -> None:
    arguments = (NUM_WORKERS, str(tiny_gpt2_dir), str(chat_jsonl), str(tmp_path), micro_batch_size)
    start_processes(train_as_worker, arguments, nprocs=NUM_WORKERS, start_method="spawn")
    workers = [torch.load(tmp_path / f"{worker}.pt") for worker in range(NUM_WORKERS)]
    setup = make_setup(tiny_gpt2_dir, chat_jsonl, "float64")
    for pack, trials in enumerate(worker_packs(setup)):
        one = run_pack(setup, trials)
        for member, trial in enumerate(trials):
            for worker in workers:
                records, weights = worker[pack]["records"][member], worker[pack]["weights"][member]
                assert records.keys() == one.records[member].keys()
                assert {"eval/loss", "train/loss"} <= records[trial.training.steps].keys()
                for step, record in records.items():
                    assert largest_difference(record, one.records[member][step]) <= 1e-10, (trial.trial_id, step)
                assert largest_difference(weights, one.weights(member)) <= 1e-10, trial.trial_id
