"""A process that may not have more memory: a trial that does not fit is a result, and those beside it finish."""

import json
import multiprocessing
import resource
from pathlib import Path

import psutil

from loragrid.lane_run import run_lane
from loragrid.messages import PackUpdate
from loragrid.pack_trainer import PackTrainer
from loragrid.planning import Pack
from loragrid.trial_store import TrialStore
from tests.loragrid.small_packs import make_setup

MORE_BYTES = 700 * 2**20
"""What the process may take beyond what it has once everything is imported and loaded."""


def train_with_a_limit(model_folder: str, rows_file: str, folder: str) -> None:
    """The body of the process: two packs, in the first a trial whose adapter alone would take gigabytes."""
    import torch

    setup = make_setup(Path(model_folder), Path(rows_file), "float32")
    small = [setup.trial("lora", seed=seed, measure_steps=0) for seed in range(3)]
    large = setup.trial("lora", {"rank": 400_000}, measure_steps=0)
    ended: dict[str, tuple[str, str]] = {}

    def see(update: PackUpdate) -> None:
        ended.update({trial_id: (end.status, end.reason) for trial_id, end in update.ended.items()})

    trainer = PackTrainer(
        lambda model, data: setup.rows, see, TrialStore(folder), torch.device("cpu"), isolate_failures=True
    )
    packs = [Pack(pack_id="first", trials=(small[0], small[1], large)), Pack(pack_id="second", trials=(small[2],))]
    limit = psutil.Process().memory_info().vms + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    run_lane(packs, trainer, None)
    found = {"large": ended.pop(large.trial_id), "small": list(ended.values())}
    (Path(folder) / "ended.json").write_text(json.dumps(found))


def test_a_trial_that_a_limited_process_cannot_hold_is_a_result_and_the_others_finish(
    tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path
) -> None:
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
