"""Sweeps with known figures per trial and made-up scores per test row, and their verdicts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from loragrid.comparison.table import Comparison
from loragrid.comparison.verdict import Verdict, judge
from loragrid.trials.tags import WRITES_BASE_TAG
from tests.support.comparisons import made_up_comparison

NUM_ROWS = 60
LABELS = [5 + i % 17 for i in range(NUM_ROWS - 1)] + [5 + (NUM_ROWS - 2) % 17]
# Sixteen hex digits can look like an integer or like a number with an exponent; two rows have the same content.
ROW_IDS = [f"{i:016d}" for i in range(NUM_ROWS - 3)] + ["12345678901e2345", "0000000098765432", "0000000098765432"]


def comparison_of(figures: Mapping[tuple[str, float], Sequence[float]], key: str = "test/loss") -> Comparison:
    """(method, lr) -> one figure per seed, used for evaluation rows and for test rows."""
    rows = [
        {
            "trial_id": f"{method}-{lr:g}-{seed}",
            "status": "FINISHED",
            "reason": "",
            "run_id": "r",
            "method": method,
            "lr": lr,
            "seed": seed,
            "eval/final_loss": figure,
            key: figure,
            "parameters/trainable": 0 if method == "frozen" else 1000,
        }
        for (method, lr), values in figures.items()
        for seed, figure in enumerate(values)
    ]
    return made_up_comparison(rows, {"lr": "training.lr", "seed": "seed"}, experiment_name="judged")


THREE_SEEDS: dict[tuple[str, float], Sequence[float]] = {
    ("lora", 1e-4): [2.60, 2.62, 2.61],
    ("lora", 1e-3): [2.30, 2.33, 2.31],
    ("lora", 1e-2): [2.40, 2.43, 2.41],
    ("lora_plus", 1e-3): [2.20, 2.234, 2.209],
    ("vera", 1e-3): [2.32, 2.31, 2.33],
    ("frozen", 1e-3): [3.0, 3.0, 3.0],
}


def scores_of(comparison: Comparison, seed: int = 0, correct: bool = False, noise: float = 0.05) -> pd.DataFrame:
    """Every trial's loss on each row: the trial's mean plus the row's difficulty plus a little noise."""
    generator = np.random.default_rng(seed)
    difficulty = generator.normal(0.0, 0.5, NUM_ROWS)
    difficulty[-1] = difficulty[-2]
    parts = []
    for row in comparison.table.to_dict("records"):
        level = float(row["eval/final_loss"])
        per_label = level + difficulty + generator.normal(0.0, noise, NUM_ROWS)
        part = pd.DataFrame({"row": ROW_IDS, "num_labels": LABELS, "loss": per_label * LABELS})
        if correct:
            part["correct"] = (generator.random(NUM_ROWS) < float(row["test/accuracy"])).astype(int)
        part.insert(0, "trial_id", row["trial_id"])
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def judged(figures: Mapping[tuple[str, float], Sequence[float]], noise: float = 0.05, **changes: Any) -> Verdict:
    comparison = replace(comparison_of(figures), **changes)
    return judge(comparison, scores_of(comparison, noise=noise))


CLEAR: dict[tuple[str, float], Sequence[float]] = {
    ("lora", 1e-3): [2.300, 2.302, 2.301],
    ("lora_plus", 1e-3): [2.301, 2.301, 2.302],
    ("vera", 1e-3): [2.700, 2.702, 2.701],
}


def costed(figures: Mapping[tuple[str, float], Sequence[float]], **parameters: int) -> Comparison:
    """A comparison whose methods train these numbers of parameters, with memory in proportion; `full` is no adapter."""
    comparison = comparison_of(figures)
    methods = comparison.table["method"]
    comparison.table["parameters/trainable"] = [parameters.get(method, 1000) for method in methods]
    comparison.table["memory/peak_allocated_bytes"] = [10.0 * parameters.get(method, 1000) for method in methods]
    tags = {
        trial_id: {WRITES_BASE_TAG: "true"}
        for trial_id, method in zip(comparison.table["trial_id"], methods, strict=True)
        if method == "full"
    }
    return replace(comparison, tags=tags)
