"""Times a step of each method by itself: one shape after another as before, and all shapes in turns as now.

    PYTHONPATH=platform:methods:. python -m benchmarks.solo_costs --model smollm2-135m llama-3.2-1b --out FOLDER

Everything is measured several times. LoRA of rank 16 is listed twice, so that a difference between the two is known to
be none. `--load` starts processes that compute meanwhile, to show what a busy machine does. Needs torch and
transformers; no network, no Ray, no MLflow.
"""

import argparse
import itertools
import multiprocessing
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from benchmarks.shapes import random_base, shape_config
from benchmarks.tables import Table
from loragrid.comparison.costs import Cost, are_apart, why_not_compared
from loragrid.config.experiment import DataConfig, ModelConfig, TrainingConfig
from loragrid.data.dataset import TokenizedData, TokenRows
from loragrid.formatting import format_seconds_range
from loragrid.models.attention import use_causal_attention
from loragrid.planning.solo_run import SoloRun, take_turns
from loragrid.training.step_mode import Mode, ModeChoice
from loragrid.training.step_runner import StepRunner
from loragrid.trials.trial import Trial
from loragrid_methods import get_method

SHAPES: dict[str, tuple[str, dict[str, object]]] = {
    "LoRA 16": ("lora", {"rank": 16}),
    "LoRA 16 again": ("lora", {"rank": 16}),
    "LoRA 4": ("lora", {"rank": 4}),
    "LoRA-FA 16": ("lora_fa", {"rank": 16}),
    "Delta-LoRA 4": ("delta_lora", {"rank": 4, "start_step": 0}),
    "Delta-LoRA 16": ("delta_lora", {"rank": 16, "start_step": 0}),
    "VeRA 256": ("vera", {"rank": 256}),
    "DoRA 16": ("dora", {"rank": 16}),
}
REPEATS_BEFORE = 3
"""The steps of each shape, one shape after another, from which LoraGrid took its step times before."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is measured: a model's shapes in a mode, with rows of random tokens."""

    model: str
    mode: Mode
    num_rows: int
    length: int
    device: torch.device
    num_rounds: int


def make_trials(setting: Setting) -> dict[str, Trial]:
    """Name -> the trial of that shape; its values do not matter."""
    training = TrainingConfig(steps=50, batch_size=setting.num_rows, lr=1e-4, check_every=0)
    return {
        name: Trial(
            trial_id=name,
            method=get_method(method)(**fields),
            seed=0,
            model=ModelConfig(name=setting.model),
            data=DataConfig(name="random", max_length=setting.length),
            training=training,
        )
        for name, (method, fields) in SHAPES.items()
    }


def random_data(setting: Setting) -> TokenizedData:
    """Rows of random tokens, every one of which is a label."""
    generator = torch.Generator().manual_seed(0)
    size = (8 * setting.num_rows, setting.length)
    ids = torch.randint(0, shape_config(setting.model).vocab_size, size, generator=generator)
    rows = TokenRows(
        input_ids=ids,
        label_positions=torch.arange(setting.length - 1).expand(len(ids), -1).contiguous(),
        label_targets=ids[:, 1:].contiguous(),
        num_tokens=torch.full((len(ids),), setting.length),
        groups=torch.arange(len(ids)),
    )
    none = rows.select(torch.arange(0))
    return TokenizedData(train=rows, evaluation=rows, test=none, skipped={}, digest="random", num_source_rows=len(rows))


def make_run(
    trial: Trial, base: PreTrainedModel, data: TokenizedData, mode: Mode, beside: Sequence[SoloRun] = ()
) -> SoloRun:
    """The trial's run in a mode; a mode that could not be captured is an error, not another mode."""
    runner = StepRunner(ModeChoice(mode=mode, reason="benchmark"))
    run = SoloRun(trial, base, data, step_runner=runner, beside=beside)
    if runner.mode != mode:
        raise RuntimeError(f"{trial.trial_id} ran in the mode {runner.mode}: {runner.choice.reason}")
    return run


def cost_of_run(run: SoloRun, shared: dict[str, float], shape: str) -> Cost:
    """The run's step time with its spread."""
    figures = run.figures()
    return Cost(
        median=figures["time/step_seconds"],
        low=figures["time/step_low_seconds"],
        high=figures["time/step_high_seconds"],
        shapes=frozenset({shape}),
        load=shared.get("time/measure_load"),
    )


def one_after_another(setting: Setting, base: PreTrainedModel, data: TokenizedData) -> dict[str, Cost]:
    """Name -> step time, as measured before: a few steps of one shape, then those of the next."""
    costs = {}
    for name, trial in make_trials(setting).items():
        run = make_run(trial, base, data, setting.mode)
        costs[name] = cost_of_run(run, take_turns([run], REPEATS_BEFORE), name)
        del run
    return costs


def in_turns(setting: Setting, base: PreTrainedModel, data: TokenizedData) -> tuple[dict[str, Cost], dict[str, float]]:
    """Name -> step time with all shapes taking turns, and name -> peak of the GPU memory without that of the others."""
    runs: dict[str, SoloRun] = {}
    for name, trial in make_trials(setting).items():
        runs[name] = make_run(trial, base, data, setting.mode, list(runs.values()))
    shared = take_turns(list(runs.values()), setting.num_rounds)
    peaks = {name: run.figures().get("memory/peak_allocated_bytes", 0.0) for name, run in runs.items()}
    return {name: cost_of_run(run, shared, name) for name, run in runs.items()}, peaks


def compare_procedures(setting: Setting, num_passes: int, path: Path | None) -> None:
    """Measure in both ways `num_passes` times, and write both tables."""
    base = random_base(
        setting.model, setting.device, torch.bfloat16 if setting.device.type == "cuda" else torch.float32
    )
    data = random_data(setting)
    if setting.device.type == "cuda":
        use_causal_attention(base, data.evaluation.input_ids[:2].to(setting.device))
    before = [one_after_another(setting, base, data) for _ in range(num_passes)]
    now = [in_turns(setting, base, data) for _ in range(num_passes)]
    about = (
        f"## {setting.model}, {setting.mode}, {setting.num_rows} rows of {setting.length} tokens, {setting.device}\n\n"
        f"Medians of {num_passes} measurements. Before: {REPEATS_BEFORE} steps, one shape after another. Now: "
        f"{setting.num_rounds} steps, all shapes in turns; the range is that of the last measurement."
    )
    table = Table(
        path, about, ["shape", "before, each measurement", "now, each measurement", "range", "peak, beside others"]
    )
    for name in SHAPES:
        last = now[-1][0][name]
        table.add(
            name,
            " ".join(f"{1000 * costs[name].median:.4g}" for costs in before) + " ms",
            " ".join(f"{1000 * costs[name].median:.4g}" for costs, _ in now) + " ms",
            format_seconds_range(last.low or 0.0, last.high or 0.0),
            f"{now[-1][1][name] / 2**20:,.0f} MiB",
        )
    costs_now = [costs for costs, _ in now]
    for title, passes in (("before", before), ("now", costs_now)):
        drift = max(largest_ratio([one[name].median for one in passes]) for name in SHAPES)
        twins = largest_ratio([one[name].median for one in passes for name in ("LoRA 16", "LoRA 16 again")])
        table.add(
            f"{title}: largest ratio", f"of one shape {drift:.3f}", f"of LoRA 16 and its twin {twins:.3f}", "–", "–"
        )
    pairs = list(itertools.combinations(SHAPES, 2))
    for costs in costs_now:
        apart = sum(are_apart(costs[one], costs[other]) for one, other in pairs)
        twin = are_apart(costs["LoRA 16"], costs["LoRA 16 again"])
        spread = statistics.median(((c.high or 0.0) - (c.low or 0.0)) / c.median for c in costs.values())
        reason = why_not_compared(costs.values()) or "compared"
        load = next(iter(costs.values())).load
        table.add(
            "now: verdict",
            f"{apart} of {len(pairs)} pairs apart; the twins {'apart (wrong)' if twin else 'not apart'}",
            reason,
            f"median spread {100 * spread:.1f} %",
            "load unknown" if load is None else f"load {load:.2f}",
        )


def largest_ratio(values: Sequence[float]) -> float:
    """The largest value over the smallest."""
    return max(values) / min(values)


def compute_for_ever() -> None:
    """The work of another process on this machine."""
    while True:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", nargs="+", default=["smollm2-135m", "llama-3.2-1b"])
    parser.add_argument("--mode", nargs="+", default=["eager", "graph"], choices=["eager", "graph"])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8, help="rows of a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--rounds", type=int, default=5, help="steps of each shape that are timed in turns")
    parser.add_argument("--passes", type=int, default=3, help="measurements of everything")
    parser.add_argument("--load", type=int, default=0, help="processes that compute meanwhile")
    parser.add_argument("--out", type=Path, help="a folder for the tables")
    options = parser.parse_args()
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=compute_for_ever, daemon=True) for _ in range(options.load)]
    for other in others:
        other.start()
    try:
        for model, mode in itertools.product(options.model, options.mode):
            setting = Setting(
                model=model,
                mode=mode,
                num_rows=options.rows,
                length=options.length,
                device=torch.device(options.device),
                num_rounds=options.rounds,
            )
            path = None if options.out is None else options.out / f"solo_costs_{model}_{mode}.md"
            compare_procedures(setting, options.passes, path)
            if setting.device.type == "cuda":
                torch.cuda.empty_cache()
    finally:
        for other in others:
            other.terminate()


if __name__ == "__main__":
    main()
