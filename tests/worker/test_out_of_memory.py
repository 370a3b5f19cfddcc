"""In a process with a memory limit, a trial that does not fit is recorded as a result, and the other trials finish."""

import json
import multiprocessing
import resource
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from torch.multiprocessing.spawn import start_processes

from loragrid.trials.packing import Pack
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import PackUpdate
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.queue import run_queue
from loragrid.worker.queue_worker import build_worker
from tests.support.small_packs import Setup, make_setup, run_pack

pytestmark = pytest.mark.heavy  # each test starts a process of its own

MORE_BYTES = 700 * 2**20
"""What the process may take beyond what it has once everything is imported and loaded."""


def train_with_a_limit(model_folder: str, rows_file: str, folder: str) -> None:
    """The body of the process: two packs, in the first a trial whose adapter alone would take gigabytes."""
    setup = make_setup(Path(model_folder), Path(rows_file), "float32")
    small = [setup.trial("lora", seed=seed, measure_steps=0) for seed in range(3)]
    large = setup.trial("lora", {"rank": 400_000}, measure_steps=0)
    ended: dict[str, tuple[str, str]] = {}

    def see(update: PackUpdate) -> None:
        ended.update({trial_id: (end.status, end.reason) for trial_id, end in update.ended.items()})

    group = ProcessGroup(device=torch.device("cpu"), isolate_failures=True)
    worker = build_worker(lambda model, data: setup.rows, see, TrialStore(folder), group)
    packs = [Pack(pack_id="first", trials=(small[0], small[1], large)), Pack(pack_id="second", trials=(small[2],))]
    limit = psutil.Process().memory_info().vms + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    run_queue(packs, worker, None)
    found = {"large": ended.pop(large.trial_id), "small": list(ended.values())}
    (Path(folder) / "ended.json").write_text(json.dumps(found))


def test_a_trial_too_large_for_memory_fails_alone(tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(
        target=train_with_a_limit, args=(str(tiny_gpt2_dir), str(chat_jsonl), str(tmp_path))
    )
    process.start()
    process.join(timeout=300)
    assert process.exitcode == 0
    found = json.loads((tmp_path / "ended.json").read_text())
    status, reason = found["large"]
    assert status == "FAILED"
    assert reason.startswith("out_of_memory")
    assert found["small"] == [["FINISHED", ""]] * 3


# Four trials of 64 rows take less, eight and one of 1024 rows take more.
FREE_BYTES = 300 * 2**20


def packs_of(setup: Setup) -> dict[str, list[Trial]]:
    """Those that fit, those that fit in halves, one that does not fit at all, and one that comes after it."""
    common: dict[str, Any] = {"steps": 2, "measure_steps": 0}
    return {
        "first": [setup.trial("lora_fa", **common)],
        "many": [setup.trial("lora", seed=seed, batch_size=64, **common) for seed in range(8)],
        "large": [setup.trial("lora", batch_size=1024, **common)],
        "last": [setup.trial("vera", **common)],
    }


def train_in_little_memory(process: int, model_folder: str, rows_file: str, folder: str) -> None:
    """The body of a process that may take `FREE_BYTES` more than it has once it has trained a pack."""
    setup = make_setup(Path(model_folder), Path(rows_file), "float64")
    updates: list[PackUpdate] = []

    def see(update: PackUpdate) -> None:
        updates.append(update)

    group = ProcessGroup(device=torch.device("cpu"), isolate_failures=True)
    worker = build_worker(lambda model, data: setup.rows, see, TrialStore(f"{folder}/store"), group)
    packs = [Pack(pack_id=name, trials=tuple(trials)) for name, trials in packs_of(setup).items()]
    run_queue(packs[:1], worker, None)
    limit = psutil.Process().memory_info().vms + FREE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    run_queue(packs[1:], worker, None)
    torch.save(updates, f"{folder}/updates.pt")


def test_packs_without_memory_are_halved_and_the_queue_continues(
    tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path
) -> None:
    arguments = (str(tiny_gpt2_dir), str(chat_jsonl), str(tmp_path))
    start_processes(train_in_little_memory, arguments, nprocs=1, start_method="spawn")
    updates: list[PackUpdate] = torch.load(tmp_path / "updates.pt", weights_only=False)
    ended = {trial_id: end for update in updates for trial_id, end in update.ended.items()}
    tags: dict[str, dict[str, str]] = {}
    records: dict[str, dict[int, dict[str, float]]] = {}
    for update in updates:
        for trial_id, found in update.tags.items():
            tags.setdefault(trial_id, {}).update(found)
        for trial_id, curve in update.records.items():
            records.setdefault(trial_id, {}).update({int(record["step"]): record for record in curve})
    setup = make_setup(tiny_gpt2_dir, chat_jsonl, "float64")
    packs = packs_of(setup)
    (large,) = packs.pop("large")
    assert ended[large.trial_id].status == "FAILED"
    assert ended[large.trial_id].reason.startswith("out_of_memory: ")
    assert "can't allocate memory: you tried to allocate" in ended[large.trial_id].reason
    assert tags[large.trial_id]["loragrid.out_of_memory"] == "true"
    for trial in packs["many"]:
        assert " trials was halved: out_of_memory: " in tags[trial.trial_id]["loragrid.pack.split"]
    for trial in (trial for trials in packs.values() for trial in trials):
        assert ended[trial.trial_id].status == "FINISHED", ended[trial.trial_id].reason
        alone = run_pack(setup, [trial], eval_every=None).records[0]
        assert records[trial.trial_id].keys() == alone.keys()
        for step, record in alone.items():
            for key in record.keys() & {"train/loss", "eval/loss", "train/grad_norm"}:
                assert abs(records[trial.trial_id][step][key] - record[key]) <= 1e-10, (trial.trial_id, step, key)
