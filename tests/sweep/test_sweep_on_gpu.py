"""Whole sweeps through Ray on a GPU: captured steps, generated answers, and results that repeat to the bit."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
import torch

import loragrid as lg
from loragrid.comparison.sample_answers import load_samples
from loragrid.comparison.selection import choose
from tests.support.shared_ray import SharedRay
from tests.support.sums_task import EXACT, NUM_TEST, STEPS, sums

REPEATED = ("train/loss", "train/grad_norm", "eval/loss", "eval/accuracy", "forgetting/loss")

pytestmark = [
    pytest.mark.end_to_end,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: only there are steps captured"),
]


@pytest.fixture(scope="module", autouse=True)
def ray_with_a_gpu(shared_ray: SharedRay) -> Iterator[None]:
    shared_ray.stop()
    ray.init(address="local", num_cpus=4, num_gpus=1, log_to_driver=False, logging_level=logging.ERROR)
    yield
    ray.shutdown()


def test_a_deterministic_sweep_with_a_task_repeats_to_the_bit(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    rows, text = tmp_path / "sums.jsonl", tmp_path / "plain.txt"
    rows.write_text("".join(json.dumps(row) + "\n" for row in sums()), encoding="utf-8")
    text.write_text("The old bridge stands near the market, and nobody knows who built it. " * 6, encoding="utf-8")
    first, again = (
        lg.run(
            lg.Experiment(
                name=f"task-on-gpu-{number}",
                model={"name": str(tiny_gpt2_dir), "dtype": "bfloat16"},
                data={
                    "name": str(rows),
                    "max_length": 96,
                    "num_eval": 10,
                    "num_test": NUM_TEST,
                    "forgetting_name": str(text),
                },
                training={"steps": STEPS, "batch_size": 8, "measure_steps": 0, "eval_every": 20},
                task=EXACT.model_dump(),
                methods=[
                    {"name": "lora", "rank": 16, "lr": 0.02},
                    {"name": "lora_fa", "rank": 16, "lr": 0.02},
                    {"name": "delta_lora", "rank": 16, "lr": 0.02, "start_step": 10},
                    {"name": "vera", "rank": 16, "lr": 0.3},
                    "frozen",
                ],
                engine={"mode": "graph", "deterministic": True},
                storage={"path": str(tmp_path / "store")},
            )
        ).comparison()
        for number in range(2)
    )
    table, other = first.table.set_index("method"), again.table.set_index("method")
    assert set(table["status"]) == {"FINISHED"}
    assert {first.tags[trial_id]["loragrid.engine"] for trial_id in table["trial_id"]} == {"graph"}
    for key in ("test/accuracy", "test/loss", "forgetting/base_loss", "forgetting/loss", "forgetting/best_step_loss"):
        assert table[key].tolist() == other[key].tolist(), key
    answers, repeated = (load_samples(found, choose(found).choices) for found in (first, again))
    assert answers is not None
    assert repeated is not None
    assert answers.rows == repeated.rows
    assert len(answers.rows) == 5
    accuracy = dict(zip(table.index, table["test/accuracy"].tolist(), strict=True))
    assert accuracy["lora"] > 0.5  # it has learnt the four signs that the base never writes
    assert accuracy["frozen"] == 0.0
    forgotten = table["forgetting/loss"] - table["forgetting/base_loss"]
    assert forgotten["frozen"] == 0.0
    assert forgotten["lora"] != 0.0
    point = ["trial_id", "key", "step"]
    curves, others = (
        found.curves[found.curves["key"].isin(REPEATED)].sort_values(point)[[*point, "value"]].reset_index(drop=True)
        for found in (first, again)
    )
    assert set(curves["key"]) == set(REPEATED)
    assert curves.equals(others)
