"""Sweeps with values from known formulas, written by the real recorder; tests check reports on them."""

import csv
import math
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loragrid.comparison.experiment_file import keep_experiment
from loragrid.sweep.record import sweep_parameters
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import Scalar, card_tags
from loragrid.trials.load import experiment_from_mapping
from loragrid.trials.tags import COST_SHAPE_TAG, LABEL_TAG, QUESTION_TAG
from loragrid_methods import get_method

QUESTION = "Which method teaches a small model grade-school maths best, when each has its own best learning rate?"
EVAL_STEPS = range(0, 501, 50)
SEEDS = (0, 1, 2)
NUM_TEST_ROWS = 40

# method: best learning rate, loss there, trained parameters per rank, saved MiB, step ms
METHODS: dict[str, tuple[float, float, int, int, float]] = {
    "delta_lora": (1e-3, 1.172, 57_600, 610, 96.0),
    "lora": (1e-3, 1.184, 57_600, 604, 84.0),
    "lora_fa": (3e-3, 1.203, 28_800, 402, 71.0),
    "lora_plus": (3e-4, 1.179, 57_600, 604, 84.5),
    "vera": (1e-2, 1.262, 1_080, 640, 92.0),
}
LADDERS = {
    "delta_lora": (3e-4, 1e-3, 3e-3),
    "lora": (3e-4, 1e-3, 3e-3),
    "lora_fa": (3e-4, 1e-3, 3e-3),
    "lora_plus": (1e-4, 3e-4, 1e-3),
    "vera": (1e-3, 1e-2, 1e-1),
}
ENVIRONMENT = {
    "loragrid.version.python": "3.12.3",
    "loragrid.version.loragrid": "0.1.0",
    "loragrid.version.torch": "2.13.0",
    "loragrid.version.transformers": "5.23.0",
    "loragrid.system": "linux x86_64",
    "loragrid.cpu.num_cores": "16",
    "loragrid.device": "NVIDIA H200",
    "loragrid.gpu": "1 × NVIDIA H200",
    "loragrid.gpu.driver": "570.86.15",
    "mlflow.source.git.commit": "0f3c2a9d7be14c55a8f1b6e9d2c3a4b5c6d7e8f9",
    "loragrid.git.dirty": "false",
}


@dataclass(frozen=True, kw_only=True)
class MadeUpTrial:
    """One trial to be recorded."""

    trial_id: str
    method: str
    rank: int
    lr: float
    seed: int
    lr_ratio: float | None = None

    @property
    def loss(self) -> float:
        """Final evaluation loss: a parabola in log(lr), a little lower at rank 16, plus a little noise."""
        best, loss, *_ = METHODS[self.method]
        bowl = 0.035 * math.log(self.lr / best) ** 2
        ratio = 0.006 * abs(math.log((self.lr_ratio or 16) / 16))
        noise = random.Random(self.trial_id).uniform(-0.006, 0.006) + 0.004 * self.seed
        return loss + bowl + ratio - (0.012 if self.rank == 16 else 0.0) + noise

    @property
    def accuracy(self) -> float:
        """Final share of 40 rows answered right; it peaks at three times the learning rate of the lowest loss."""
        best, loss, *_ = METHODS[self.method]
        share = 0.52 - 0.6 * (loss - 1.17) - 0.08 * math.log(self.lr / (3 * best)) ** 2 + 0.025 * self.seed
        return (round(NUM_TEST_ROWS * share) + random.Random(self.trial_id).choice((0, 0, 1))) / NUM_TEST_ROWS

    @property
    def failure(self) -> str:
        if self.method == "vera" and self.lr == 1e-1:
            return "diverged: loss or gradient not finite at step 37"
        if self.method == "delta_lora" and self.rank == 16 and self.seed == 2 and self.lr == 3e-3:
            return "out_of_memory: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has 139.80 GiB in all"
        return ""

    @property
    def is_stopped(self) -> bool:
        return self.method == "lora_fa" and self.lr == 3e-4 and self.rank == 8


def made_up_trials() -> Iterator[MadeUpTrial]:
    """Five methods × three learning rates × two ranks (two ratios) × three seeds."""
    for method in METHODS:
        for lr in LADDERS[method]:
            for second in (4, 16) if method == "lora_plus" else (8, 16):
                for seed in SEEDS:
                    rank, ratio = (8, float(second)) if method == "lora_plus" else (second, None)
                    yield MadeUpTrial(
                        trial_id=f"{method}-{lr:g}-{second}-{seed}",
                        method=method,
                        rank=rank,
                        lr=lr,
                        seed=seed,
                        lr_ratio=ratio,
                    )


def record_maths(uri: str) -> Recorder:
    """Records all 90 trials as the sweep `maths-1` of the experiment `maths`."""
    experiment = experiment_from_mapping(
        {
            "name": "maths",
            "question": QUESTION,
            "model": {"name": "smollm2-135m-instruct", "dtype": "bfloat16"},
            "data": {"name": "chitchat", "max_length": 128},
            "training": {"steps": 500, "batch_size": 8, "eval_every": 50},
            "methods": [
                {"name": "delta_lora", "start_step": 100, "grid": {"lr": [3e-4, 1e-3, 3e-3]}},
                {"name": "lora", "grid": {"lr": [3e-4, 1e-3, 3e-3]}},
                {"name": "vera", "grid": {"lr": [1e-3, 1e-2, 1e-1]}},
            ],
            "grid": {"seed": [0, 1, 2], "method.rank": [8, 16]},
        },
        "maths",
    )
    recorder = Recorder("maths", uri)
    recorder.start_sweep("maths-1", sweep_parameters(experiment), {QUESTION_TAG: QUESTION})
    keep_experiment(recorder, experiment)
    for trial in made_up_trials():
        record_trial(recorder, trial)
    recorder.end_sweep("FAILED")
    return recorder


def record_word_problems(uri: str) -> Recorder:
    """Records 26 trials with accuracies as the sweep `words-1` of the experiment `words`; one method has a label."""
    recorder = Recorder("words", uri)
    recorder.start_sweep("words-1", {}, {QUESTION_TAG: "Which method solves most word problems?"})
    for method, label in {"lora": "lora", "lora_fa": "LoRA, A frozen", "delta_lora": "delta_lora"}.items():
        for lr in LADDERS[method]:
            for seed in SEEDS:
                trial = MadeUpTrial(trial_id=f"{method}-{lr:g}-{seed}", method=method, rank=16, lr=lr, seed=seed)
                if not trial.failure:
                    record_trial(recorder, trial, {LABEL_TAG: label}, is_answered=True)
    recorder.end_sweep("FINISHED")
    return recorder


def record_trial(
    recorder: Recorder, trial: MadeUpTrial, more_tags: Mapping[str, str] | None = None, *, is_answered: bool = False
) -> None:
    """Records one trial from start to end, with a task's accuracies if `is_answered`."""
    _, _, per_rank, saved_mib, step_ms = METHODS[trial.method]
    parameters: dict[str, Scalar] = {
        "method.name": trial.method,
        "method.rank": trial.rank,
        "seed": trial.seed,
        "model.name": "smollm2-135m-instruct",
        "model.dtype": "bfloat16",
        "data.name": "chitchat",
        "data.max_length": 128,
        "training.steps": 500,
        "training.batch_size": 8,
        "training.lr": trial.lr,
    }
    if trial.lr_ratio is not None:
        parameters["method.lr_ratio"] = trial.lr_ratio
    tags = {**ENVIRONMENT, **card_tags(get_method(trial.method).card), "loragrid.pack": f"pack-{trial.method}"}
    tags |= {COST_SHAPE_TAG: f"{trial.method}-{trial.rank}"} | dict(more_tags or {})
    recorder.start_trial(trial.trial_id, parameters, tags)
    recorder.log_summary(
        trial.trial_id,
        {
            "parameters/trainable": per_rank * trial.rank,
            "parameters/stored": per_rank * trial.rank,
            "memory/base_bytes": 269 * 2**20,
            "memory/adapter_bytes": 4 * per_rank * trial.rank,
            "memory/gradient_bytes": 4 * per_rank * trial.rank,
            "memory/optimizer_bytes": 8 * per_rank * trial.rank,
            "memory/saved_activation_bytes": saved_mib * 2**20,
            "memory/loss_bytes": 96 * 2**20,
            "memory/peak_allocated_bytes": (269 + 96 + saved_mib + 40) * 2**20,
            "memory/eval_peak_allocated_bytes": 1100 * 2**20,
            "memory/peak_reserved_bytes": (269 + 96 + saved_mib + 140) * 2**20,
            "memory/pack_estimated_bytes": 6.1e9,
            "memory/pack_peak_bytes": 6.1e9 if trial.method == "vera" else 5.7e9,
            "time/step_seconds": step_ms / 1000,
            "time/step_low_seconds": 0.95 * step_ms / 1000,
            "time/step_high_seconds": 1.05 * step_ms / 1000,
            "time/step_cpu_seconds": step_ms / 1000,
            "time/measure_repeats": 5,
            "time/measure_load": 0.25,
            "throughput/tokens_per_second": 700 / (step_ms / 1000),
        },
    )
    losses = [(step, trial.loss + 0.9 * math.exp(-step / 90)) for step in EVAL_STEPS]
    if trial.failure:
        recorder.log_records(trial.trial_id, [{"step": 0, "eval/loss": losses[0][1]}])
        recorder.end_trial(trial.trial_id, "FAILED", trial.failure)
        return
    if trial.is_stopped:
        recorder.log_records(trial.trial_id, [{"step": s, "eval/loss": loss} for s, loss in losses[:3]])
        recorder.end_trial(
            trial.trial_id, "KILLED", "stopped early at rung 1 (step 100): eval/loss 1.53 is number 6 of 9, 3 continue"
        )
        return
    recorder.log_records(
        trial.trial_id, [{"step": s, "eval/loss": loss, "train/loss": loss - 0.03} for s, loss in losses]
    )
    recorder.log_summary(
        trial.trial_id,
        {
            "eval/final_loss": losses[-1][1],
            "eval/best_loss": losses[-1][1],
            "test/loss": losses[-1][1] + 0.021,
            "time/setup_seconds": 21.0,
            "time/measure_seconds": 6.0,
            "time/compile_seconds": 14.0,
            "time/train_seconds": 500 * step_ms / 1000 * 1.4,
            "time/data_seconds": 3.1,
            "time/eval_seconds": 18.0,
            "time/checkpoint_seconds": 4.0,
        },
    )
    if is_answered:
        shares = {0: 0.05, 250: trial.accuracy - 0.1, 500: trial.accuracy}
        recorder.log_records(trial.trial_id, [{"step": s, "eval/accuracy": share} for s, share in shares.items()])
        recorder.log_summary(trial.trial_id, {"test/accuracy": trial.accuracy - 0.025})
    with tempfile.TemporaryDirectory() as name:
        num_right = round(NUM_TEST_ROWS * (trial.accuracy - 0.025)) if is_answered else None
        write_scores(Path(name) / "test.csv", losses[-1][1] + 0.021, trial.trial_id, num_right)
        recorder.log_artifacts(trial.trial_id, Path(name), "scores")
    recorder.end_trial(trial.trial_id, "FINISHED")


def write_scores(path: Path, loss: float, trial_id: str, num_right: int | None = None) -> None:
    """Writes one line per test row. All trials have the same rows; the mean loss is `loss` nats per label."""
    noise = random.Random(trial_id)
    spread: Sequence[float] = [0.3 * math.sin(row) + noise.gauss(0, 0.02) for row in range(NUM_TEST_ROWS)]
    middle = sum(spread) / len(spread)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "num_labels", "loss", *([] if num_right is None else ["correct"])])
        # Later rows are harder for every trial; noise lets a trial miss some of the others too.
        right = sorted(range(NUM_TEST_ROWS), key=lambda row: row + noise.uniform(0, 10))[:num_right]
        for row, offset in enumerate(spread):
            correct = [] if num_right is None else [int(row in right)]
            writer.writerow([f"{row:016x}", 20, 20 * (loss + offset - middle), *correct])
