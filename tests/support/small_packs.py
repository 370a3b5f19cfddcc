"""Shared by the training tests: trials on a tiny model, and packs of them in the real loop."""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from transformers import PreTrainedModel

from loragrid.config.experiment import DataConfig, ModelConfig, PackConfig, TrainingConfig
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.models.attention import use_causal_attention
from loragrid.models.loading import load_base, load_tokenizer
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.loop import LoopSettings, Report, train
from loragrid.training.member_state import put_member
from loragrid.training.meters import Stopwatch
from loragrid.training.step import ComputeStep, PackModel, SumOverWorkers, compute_step, one_worker
from loragrid.trials.packing import group_into_packs
from loragrid.trials.trial import Trial
from loragrid.worker.checkpoints import TrialStore
from loragrid_methods import get_method, method_names

torch.set_num_threads(1)

NUM_EVAL = 10
"""Not a multiple of any batch size in use: the last evaluation batch is always padded."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A tiny base and its rows. GPT-2 is exact in float64; Llama computes its norms in float32."""

    model: ModelConfig
    data: DataConfig
    rows: TokenizedData
    _base: PreTrainedModel

    def base(self) -> PreTrainedModel:
        """A fresh copy of the base."""
        return copy.deepcopy(self._base)

    def trial(self, name: str, fields: Mapping[str, Any] | None = None, *, seed: int = 0, **training: Any) -> Trial:
        """A trial of a method with these hyperparameters (small by default) and training settings."""
        method = get_method(name)
        small = {"rank": 3, "start_step": 1} | dict(fields or {})
        return Trial(
            trial_id=f"{name}-{sorted((fields or {}).items())}-{seed}-{sorted(training.items())}",
            method=method(**{key: value for key, value in small.items() if key in method.field_names()}),
            seed=seed,
            model=self.model,
            data=self.data,
            training=TrainingConfig(**{"steps": 8, "batch_size": 4, "lr": 0.01} | training),
        )


def make_setup(model_folder: Path, rows_file: Path, dtype: str, **data: Any) -> Setup:
    """The base in `model_folder` and the rows in `rows_file`, tokenized."""
    model = ModelConfig(name=str(model_folder), dtype=dtype)  # type: ignore[arg-type]
    config = DataConfig.model_validate({"name": str(rows_file), "max_length": 96, "num_eval": NUM_EVAL} | data)
    rows = load_data(config, model, load_tokenizer(model))
    return Setup(model=model, data=config, rows=rows, _base=load_base(model))


def fastest(name: str) -> float:
    """The largest learning-rate factor of a method's tensors. At 16 x 0.01 rounding errors grow with each step."""
    method = get_method(name)()
    return max((method.learning_rate_multiplier(tensor) for tensor in method.trained), default=1.0)


def mixed_trials(setup: Setup, **training: Any) -> list[Trial]:
    """Trials of all packable methods, no two with equal settings, in the order of the one pack that they form."""
    choices: list[tuple[str, dict[str, Any]]] = [
        (name, {"rank": rank}) for name in method_names() if get_method(name).packable for rank in (2, 5)
    ]
    choices += [("lora", {"rank": rank, "dropout": 0.3}) for rank in (3, 4)]
    trials = [
        setup.trial(
            name,
            fields,
            **{
                "seed": index % 3,
                "lr": 0.002 * (1 + index % 5) / fastest(name),
                "schedule": ("cosine", "linear", "constant")[index % 3],
                "warmup_steps": index % 4,
                "weight_decay": 0.1 * (index % 3),
                "clip_norm": (0.05, None, 1.0, 0.2)[index % 4],
            }
            | training,
        )
        for index, (name, fields) in enumerate(choices)
    ]
    (pack,) = group_into_packs(trials, PackConfig(max_members=len(trials)))
    return list(pack.trials)


@dataclass(kw_only=True)
class Run:
    """The result of a run of the loop: the model, every report, and the records of every member by step."""

    model: PackModel
    reports: list[Report] = field(default_factory=list)
    records: list[dict[int, dict[str, float]]] = field(default_factory=list)

    def curve(self, member: int, key: str) -> dict[int, float]:
        """Step -> figure, for the steps that have it."""
        return {step: record[key] for step, record in self.records[member].items() if key in record}

    def weights(self, member: int) -> dict[str, Tensor]:
        """`layer.tensor` -> a copy of the tensor, for one member."""
        stacks, index = self.model.pack.member_stacks(member)
        return {
            f"{layer}.{name}": tensor.clone()
            for layer, stack in stacks.items()
            for name, tensor in stack.member_tensors(index).items()
        }


def run_pack(
    setup: Setup,
    trials: Sequence[Trial],
    *,
    base: PreTrainedModel | None = None,
    prepare: Callable[[PackModel], None] = lambda model: None,
    on_report: Callable[[Report, PackModel], None] = lambda report, model: None,
    report_every: int = 3,
    eval_every: int | None = 3,
    checkpoint_every: int | None = None,
    worker: int = 0,
    num_workers: int = 1,
    sum_over_workers: SumOverWorkers = one_worker,
    compute: ComputeStep = compute_step,
    stopwatch: Stopwatch | None = None,
    check: Callable[[PackModel], Callable[[], object]] | None = None,
    check_every: int | None = None,
) -> Run:
    """Train the trials as one pack to their end; `prepare` may change the model first."""
    run = Run(model=build_model(trials, setup.base() if base is None else base), records=[{} for _ in trials])
    run.model.pack.clock.worker = worker
    prepare(run.model)

    def keep(report: Report) -> None:
        run.reports.append(report)
        for by_step, records in zip(run.records, report.records, strict=True):
            for record in records:
                assert int(record["step"]) not in by_step, "a step is reported once"
                by_step[int(record["step"])] = record
        on_report(report, run.model)

    train(
        run.model,
        build_batches(trials, setup.rows, run.model.base.device, worker=worker, num_workers=num_workers),
        LoopSettings(
            steps=trials[0].training.num_steps,
            report_every=report_every,
            eval_every=eval_every,
            checkpoint_every=checkpoint_every,
            check_every=check_every,
        ),
        keep,
        sum_over_workers=sum_over_workers,
        compute=compute,
        check=None if check is None else check(run.model),
        stopwatch=stopwatch,
    )
    return run


def resume(setup: Setup, trials: Sequence[Trial], folder: Path) -> Run:
    """Continue trials from their checkpoints in a new pack; the checkpoints may come from other packs."""

    def put(model: PackModel) -> None:
        for member, trial in enumerate(trials):
            saved, spoiled = TrialStore(str(folder)).load(trial.trial_id)
            assert saved is not None
            assert not spoiled
            put_member(model, member, saved.state)
            model.completed = saved.state.completed
        model.pack.after_load()

    return run_pack(setup, trials, prepare=put)


def largest_difference(ours: Mapping[Any, Any], theirs: Mapping[Any, Any], *, relative: bool = False) -> float:
    """The largest difference between figures or tensors of equal names; infinity if one is not finite."""
    assert ours.keys() == theirs.keys()
    largest = 0.0
    for key in ours:
        a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (ours[key], theirs[key]))
        difference = ((a - b).abs() / (b.abs() if relative else 1.0)).max().item() if a.numel() else 0.0
        largest = max(largest, difference if math.isfinite(difference) else math.inf)
    return largest


def bit_equal(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    """Whether all tensors are the same to the bit; the names must be the same."""
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def look_at_values(model: PackModel) -> None:
    """Make the model's forward copy a value to the CPU, which cannot be captured."""
    model.base.base_model.register_forward_pre_hook(
        lambda module, arguments, keywords: (keywords["input_ids"].sum().item(), None)[1], with_kwargs=True
    )


def base_on(setup: Setup, device: torch.device) -> PreTrainedModel:
    """A base on the device; on a GPU with the attention that builds no mask, because only that can be captured."""
    base = setup.base()
    base.to(device)  # type: ignore[arg-type]  # transformers narrows torch's own signature
    if device.type == "cuda":
        assert use_causal_attention(base, setup.rows.evaluation.input_ids[:2].to(device)) == ""
    return base


def worker_packs(setup: Setup, micro_batch_size: int | None = None) -> list[list[Trial]]:
    """Two packs with eight rows per step over all workers: all packable methods without dropout, and `full`."""
    # Dropout draws its masks per worker and micro batch: results would depend on their number.
    rows: dict[str, Any] = {"batch_size": 8, "micro_batch_size": micro_batch_size}
    mixed = [trial for trial in mixed_trials(setup, **rows) if not trial.method.hyperparameters().get("dropout")]
    return [mixed, [setup.trial("full", lr=0.001, **rows)]]
