"""Times a whole grid from start to table: with LoraGrid, or with PEFT in Tune and TorchTrainer, a process per trial.

    PYTHONPATH=platform:methods:. python -m benchmarks.grid --model llama-3.2-1b --folder FOLDER own
    PYTHONPATH=platform:methods:. python -m benchmarks.grid --model llama-3.2-1b --folder FOLDER peft --trials 3
    PYTHONPATH=platform:methods:. python -m benchmarks.grid --model llama-3.2-1b --folder FOLDER peft --gpu-share 0.25

64 trials: LoRA, LoRA-FA, Delta-LoRA, each with four ranks and four learning rates, and LoRA+ with four ranks and four
ratios; 200 steps of 1 x 512 tokens. Needs a CUDA GPU and all of LoraGrid's and PEFT's packages; no network.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from benchmarks.shapes import random_base, shape_config

STEPS, LENGTH, NUM_ROWS, RANKS, RATES = 200, 512, 256, (2, 4, 8, 16), (1e-4, 2e-4, 4e-4, 8e-4)

PREPARE_TIMEOUT_SECONDS = 300.0


def make_inputs(model: str, folder: Path, device: str = "cuda", length: int = LENGTH) -> None:
    """Write a model folder with random weights and a word tokenizer, and rows of exactly `length` tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"w{index}" for index in range(min(1000, shape_config(model).vocab_size - 2))]
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<end>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>")
    random_base(model, torch.device(device), torch.bfloat16).save_pretrained(folder / "model")
    wrapped.save_pretrained(folder / "model")
    draw = random.Random(0)
    rows = [{"text": " ".join(draw.choices(words, k=length - 1))} for _ in range(NUM_ROWS)]  # plus the end token
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def prepare_inputs(model: str, folder: Path, device: str, length: int) -> None:
    """Make the inputs if they are missing, in a separate process.

    It also stores compiled Python files and the digest of the base, which would otherwise slow down only the first of
    several sweeps.
    """
    if (folder / "rows.jsonl").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    code = (
        "import sys; from pathlib import Path; from benchmarks.grid import make_inputs\n"
        "import loragrid.sweep.run, loragrid.worker.main, torch._inductor.compile_fx\n"
        "from loragrid.config.sections import ModelConfig; from loragrid.models.loading import model_digest\n"
        "make_inputs(sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))\n"
        "model_digest(ModelConfig(name=str(Path(sys.argv[2]) / 'model')))"
    )
    command = [sys.executable, "-c", code, model, str(folder), device, str(length)]
    subprocess.run(command, check=True, timeout=PREPARE_TIMEOUT_SECONDS)


def experiment(
    folder: Path, measure_steps: int, *, dtype: str = "bfloat16", steps: int = STEPS, length: int = LENGTH
) -> dict[str, Any]:
    """The grid, as the contents of a LoraGrid experiment file."""
    return {
        "name": "grid-of-64",
        "model": {"name": str(folder / "model"), "dtype": dtype},
        "data": {"name": str(folder / "rows.jsonl"), "max_length": length, "num_eval": 16, "loss_on": "all"},
        "training": {"steps": steps, "batch_size": 1, "lr": 1e-4, "measure_steps": measure_steps},
        "methods": [
            # A seed is an axis of the grid for all methods or none; four learning rates take the place of four seeds.
            {"name": "lora", "grid": {"rank": list(RANKS), "lr": list(RATES)}},
            {"name": "lora_fa", "grid": {"rank": list(RANKS), "lr": list(RATES)}},
            {"name": "delta_lora", "start_step": 50, "grid": {"rank": list(RANKS), "lr": list(RATES)}},
            {"name": "lora_plus", "grid": {"rank": list(RANKS), "lr_ratio": [2, 4, 8, 16]}},
        ],
        "storage": {"path": str(folder / "store")},
    }


def time_own(folder: Path, measure_steps: int) -> None:
    """Run the grid with the function behind `loragrid run`, and print its time."""
    start = time.perf_counter()
    from rich.console import Console

    import loragrid as lg
    from loragrid.trials.load import experiment_from_mapping

    mapping = experiment(folder, measure_steps)
    file = folder / "grid.yaml"
    file.write_text(yaml.safe_dump(mapping), encoding="utf-8")
    result = lg.run(experiment_from_mapping(mapping, str(file)), console=Console(force_terminal=False, width=140))
    table = result.to_pandas()
    seconds = time.perf_counter() - start
    print(
        f"LoraGrid: {sum(table['status'] == 'FINISHED')} of {len(table)} trials finished, "
        f"{seconds:.1f} s from start to table"
    )
    columns = [column for column in table.columns if column.startswith(("time/", "memory/pack"))]
    print(table[["method", "rank", *columns]].groupby("method").first().to_string())


def train_with_peft(config: dict[str, Any]) -> None:
    """Train one trial in the usual way: PEFT, autocast, fused AdamW, the model's own loss (P2)."""
    import ray.train
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.peft_loop import PeftLoop
    from loragrid.training.step import Batch

    folder = Path(config["folder"])
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    texts = [json.loads(line)["text"] for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    ids = torch.tensor(tokenizer(texts)["input_ids"]).cuda()
    base = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16, device_map="cuda")
    ids = torch.cat([ids, torch.full_like(ids[:, :1], tokenizer.eos_token_id)], 1)
    loop = PeftLoop(base, at_its_best=False)
    for step in range(STEPS):
        row = ids[step % len(ids)][None]
        positions = torch.arange(row.shape[1] - 1, device="cuda")[None]
        count = torch.ones(1, dtype=torch.float64, device="cuda")
        loss = loop.step(Batch(input_ids=row, label_positions=positions, label_targets=row[:, 1:], num_labels=count))
        if (step + 1) % 4 == 0:
            ray.train.report({"step": step + 1, "loss": float(loss)})


def time_peft(folder: Path, num_trials: int, gpu_share: float) -> None:
    """Run a sample of trials through Tune and `TorchTrainer`, as many at once as share the GPU."""
    start = time.perf_counter()
    import os

    import ray
    from ray import tune
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    at_once = round(1 / gpu_share)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    ray.init(log_to_driver=False)
    cpus = max(1, int(ray.cluster_resources()["CPU"]) // at_once // 2)  # type: ignore[no-untyped-call]
    started = time.perf_counter()

    def drive(config: dict[str, Any]) -> None:
        TorchTrainer(
            train_with_peft,
            train_loop_config={"folder": str(folder)},
            scaling_config=ScalingConfig(
                num_workers=1, use_gpu=True, resources_per_worker={"GPU": gpu_share, "CPU": cpus}
            ),
            run_config=RunConfig(
                name=f"trial-{gpu_share}-{config['seed']}",
                storage_path=str(folder / "peft"),
                callbacks=[TuneReportCallback()],  # type: ignore[list-item, no-untyped-call]
            ),
        ).fit()

    trainable = tune.with_resources(drive, tune.PlacementGroupFactory([{"memory": 5e8}]))
    results = tune.Tuner(
        trainable,
        param_space={"seed": tune.grid_search(list(range(num_trials)))},
        tune_config=tune.TuneConfig(max_concurrent_trials=at_once),
        run_config=tune.RunConfig(name=f"peft-{gpu_share}", storage_path=str(folder / "peft"), verbose=0),
    ).fit()
    end = time.perf_counter()
    assert results.num_errors == 0
    per_trial = (end - started) / num_trials
    print(
        f"PEFT, Tune and TorchTrainer, {at_once} at once: {num_trials} trials in {end - started:.1f} s after "
        f"{started - start:.1f} s of Ray's start; {per_trial:.1f} s each, so {64 * per_trial + started - start:.0f} s "
        "for 64"
    )


def main() -> None:
    """Make the inputs if they are missing, then time LoraGrid (`own`) or PEFT (`peft`)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("way", choices=["make", "own", "peft"])
    parser.add_argument("--model", default="llama-3.2-1b")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--measure-steps", type=int, default=0, help="solo measurement of every shape, in steps")
    parser.add_argument("--trials", type=int, default=3, help="PEFT: trials in the sample")
    parser.add_argument("--gpu-share", type=float, default=1.0, help="PEFT: GPU per trial")
    options = parser.parse_args()
    if not (options.folder / "rows.jsonl").exists():
        options.folder.mkdir(parents=True, exist_ok=True)
        make_inputs(options.model, options.folder)
    if options.way == "own":
        time_own(options.folder, options.measure_steps)
    elif options.way == "peft":
        time_peft(options.folder, options.trials, options.gpu_share)


if __name__ == "__main__":
    main()
