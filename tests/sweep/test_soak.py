"""A sweep of 24 trials whose workers and driver are killed at random every few seconds ends as an undisturbed one.

It takes about ten minutes and runs only with `make soak`.
"""

import random
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support.sweep_processes import assert_undisturbed, finish, settings_of, start, statuses, write

pytestmark = [pytest.mark.end_to_end, pytest.mark.soak, pytest.mark.timeout(2400)]

NUM_STRIKES = 12
SECONDS_BETWEEN_STRIKES = (4.0, 50.0)
"""From less than the start of Ray takes to several packs."""


@pytest.mark.parametrize("seed", [0, 1])
def test_processes_killed_at_random_change_no_bit_of_24_trials(
    tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path, seed: int
) -> None:
    settings = settings_of(tiny_gpt2_dir, chat_jsonl)
    settings["training"] |= {"steps": 60, "checkpoint_every": 5, "report_every": 2, "eval_every": 20}
    settings["grid"] = {"method.rank": [2, 3], "seed": [0, 1, 2]}
    settings["pack"] = {"max_members": 4}
    settings["workers"] |= {"max_failures": 100}
    calm, store = tmp_path / "calm", tmp_path / "store"
    code, output = finish(start(write(settings, calm, tmp_path / "calm.yaml")), 600)
    assert code == 0, output
    assert statuses(calm) == ["FINISHED"] * 24
    file = write(settings, store, tmp_path / "struck.yaml")
    draw, killed = random.Random(seed), {"worker": 0, "driver": 0}
    process = start(file)
    for _ in range(NUM_STRIKES):
        try:
            finish(process, draw.uniform(*SECONDS_BETWEEN_STRIKES))
            break  # the sweep was quicker
        except subprocess.TimeoutExpired:
            pass
        workers = [
            child for child in psutil.Process(process.pid).children(recursive=True) if "RayTrainW" in child.name()
        ]
        if workers and draw.random() < 0.6:
            draw.choice(workers).kill()
            killed["worker"] += 1
            continue
        process.kill()
        finish(process)
        killed["driver"] += 1
        time.sleep(2)
        process = start(file, "--resume")
    code, output = finish(process, 900)
    assert code == 0, output
    print(f"killed: {killed}")
    assert killed["worker"] + killed["driver"] >= NUM_STRIKES // 2
    assert_undisturbed(store, calm)
