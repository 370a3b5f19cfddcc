"""Several workers train a pack as one worker does: real processes that meet through gloo or NCCL."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from loragrid.engine_choice import Mode
from tests.loragrid.small_packs import (
    base_on,
    bit_equal,
    largest_difference,
    make_setup,
    run_pack,
    train_as_worker,
    worker_packs,
)

NUM_WORKERS = 2


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: only one can capture a step")
needs_gpus = pytest.mark.skipif(torch.cuda.device_count() < NUM_WORKERS, reason="NCCL wants a GPU for each worker")


@pytest.mark.parametrize(
    ("backend", "mode", "not_captured"),
    [
        pytest.param("gloo", "eager", (), id="processors"),
        pytest.param("gloo", "graph", (), id="one-gpu-captured", marks=needs_gpu),
        pytest.param("gloo", "graph", (1,), id="one-gpu-and-only-one-captured", marks=needs_gpu),
        pytest.param("nccl", "graph", (), id="two-gpus-captured", marks=needs_gpus),
        pytest.param("nccl", "graph", (0,), id="two-gpus-and-only-one-captured", marks=needs_gpus),
    ],
)
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_two_workers_with_four_rows_each_train_and_evaluate_as_one_with_eight(
    tiny_gpt2_dir: Path,
    chat_jsonl: Path,
    tmp_path: Path,
    micro_batch_size: int | None,
    backend: str,
    mode: Mode,
    not_captured: Sequence[int],
) -> None:
    files = (str(tiny_gpt2_dir), str(chat_jsonl), str(tmp_path))
    arguments = (NUM_WORKERS, *files, micro_batch_size, backend, mode, not_captured)
    start_processes(train_as_worker, arguments, nprocs=NUM_WORKERS, start_method="spawn")
    workers = [torch.load(tmp_path / f"{worker}.pt", map_location="cpu") for worker in range(NUM_WORKERS)]
    setup = make_setup(tiny_gpt2_dir, chat_jsonl, "float64")
    for pack, trials in enumerate(worker_packs(setup)):
        one = run_pack(setup, trials, base=base_on(setup, torch.device("cpu" if mode == "eager" else "cuda")))
        for member, trial in enumerate(trials):
            assert bit_equal(*(worker[pack]["weights"][member] for worker in workers)), trial.trial_id
            for worker in workers:
                records, weights = worker[pack]["records"][member], worker[pack]["weights"][member]
                assert records.keys() == one.records[member].keys()
                assert {"eval/loss", "train/loss"} <= records[trial.training.steps].keys()
                for step, record in records.items():
                    assert largest_difference(record, one.records[member][step]) <= 1e-10, (trial.trial_id, step)
                assert largest_difference(weights, cpu(one.weights(member))) <= 1e-10, trial.trial_id


def cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.cpu() for name, tensor in tensors.items()}
