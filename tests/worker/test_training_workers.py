"""Several workers train a pack as one worker does, in real processes connected by gloo or NCCL."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import start_processes

from loragrid.training.step_mode import Mode
from loragrid.worker.messages import PackUpdate
from tests.support.small_packs import (
    base_on,
    bit_equal,
    largest_difference,
    make_setup,
    run_pack,
    worker_packs,
)
from tests.support.worker_processes import run_queue_as_worker, train_as_worker

pytestmark = pytest.mark.heavy  # each test starts two processes of its own

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
def test_two_workers_of_four_rows_equal_one_of_eight(
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


def test_all_workers_halve_a_pack_together(tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    def queue(name: str, *free: float) -> list[list[PackUpdate]]:
        folder = tmp_path / name
        folder.mkdir()
        arguments = (NUM_WORKERS, str(tiny_gpt2_dir), str(chat_jsonl), str(folder), free)
        start_processes(run_queue_as_worker, arguments, nprocs=NUM_WORKERS, start_method="spawn")
        return [torch.load(folder / f"{worker}.pt", weights_only=False) for worker in range(NUM_WORKERS)]

    plenty = float(2**40)
    whole, _ = queue("whole", plenty, plenty)
    held = sum(
        own[f"memory/{part}_bytes"]
        for update in whole
        for own in update.figures.values()
        if "memory/adapter_bytes" in own
        for part in ("adapter", "gradient", "optimizer", "saved_activation", "loss")
    )
    needed = NUM_WORKERS * 1.1 * held  # they share this machine's memory
    halved = queue("halved", plenty, needed - 1)
    assert [len(updates) for updates in halved] == [len(halved[0])] * NUM_WORKERS, "Ray Train waits for every report"
    ends = {trial_id: end for update in halved[0] for trial_id, end in update.ended.items()}
    assert [end.status for end in ends.values()] == ["FINISHED"] * 4
    reasons = [tags["loragrid.pack.split"] for tags in tags_of(halved[0]).values()]
    assert len(reasons) == 4
    for reason in reasons:
        assert "out_of_memory: besides the base this pack needs" in reason
        assert "on the machine of worker 1, but only" in reason
    assert not any("loragrid.pack.split" in tags for tags in tags_of(whole).values())
    ours, theirs = losses_of(halved[0]), losses_of(whole)
    assert ours.keys() == theirs.keys()
    assert len(ours) == 4 * 4
    assert largest_difference(ours, theirs) <= 1e-10
    # Just enough is enough.
    fitting, _ = queue("fitting", plenty, needed + 1)
    assert not any("loragrid.pack.split" in tags for tags in tags_of(fitting).values())


def tags_of(updates: Sequence[PackUpdate]) -> dict[str, dict[str, str]]:
    found: dict[str, dict[str, str]] = {}
    for update in updates:
        for trial_id, tags in update.tags.items():
            found.setdefault(trial_id, {}).update(tags)
    return found


def losses_of(updates: Sequence[PackUpdate]) -> dict[tuple[str, int], float]:
    """(Trial id, step) -> training loss."""
    return {
        (trial_id, int(record["step"])): record["train/loss"]
        for update in updates
        for trial_id, records in update.records.items()
        for record in records
        if "train/loss" in record
    }
