"""What one training process of a pack does, from loading the base to the exported adapters."""

import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ray.train
import ray.train.torch
import torch
import torch.distributed
from torch import Tensor
from transformers import PreTrainedModel

from loragrid.assembly import build_batches, build_model, check_logits
from loragrid.attention import use_causal_attention
from loragrid.checkpoint import load_checkpoint, save_checkpoint
from loragrid.data import TokenizedData
from loragrid.engine import Engine, compile_layers, fuse_pieces
from loragrid.engine_choice import EngineChoice, capture_obstacle, choose_mode, flops_of_step
from loragrid.export import export_member
from loragrid.grid import Trial
from loragrid.measurement import Stopwatch
from loragrid.messages import ADAPTERS, PackUpdate, WorkerTask
from loragrid.models import load_base
from loragrid.planning import Pack
from loragrid.solo import measure_solo
from loragrid.training import LoopSettings, PackModel, Report, SumOverWorkers, one_worker, train

NUM_REPORTS = 50
LOSSES = {"train_loss": "train/loss", "eval_loss": "eval/loss"}
"""Tune's key of a loss -> ours. Tune's searchers cannot read a key with a slash."""


def run_worker(task: WorkerTask) -> None:
    """Train the pack's trials in this process, together with the pack's other workers."""
    torch.set_num_threads(task.threads)
    # Members share flat buffers, so a gradient is a view with the buffer's strides: correct, and not worth a warning.
    warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
    context = ray.train.get_context()
    worker, num_workers = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device()
    trials = task.pack.trials
    training = trials[0].training
    reporter = _Reporter(task.pack, worker, hold_back=task.losses_in_every_report)
    stopwatch = Stopwatch()

    with stopwatch.phase("setup"):
        reporter.phase("loading the base")
        data: TokenizedData = ray.get(task.data)
        batches = build_batches(trials, data, device, worker=worker, num_workers=num_workers)
        base, choice = _load(task, device, data, num_workers)
        check_logits(base, batches)
    with stopwatch.phase("measure"):
        base = _measure(task, base, choice, data, num_workers, reporter)
    with stopwatch.phase("setup"):
        model = build_model(trials, base)
        if choice.mode != "eager":
            fuse_pieces(model)
        if choice.mode == "compiled":
            compile_layers(base)
        engine = Engine(choice)
        model.pack.clock.worker = worker
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                load_checkpoint(model, Path(folder))
    settings = LoopSettings(
        steps=training.steps,
        report_every=training.report_every or max(1, training.steps // NUM_REPORTS),
        eval_every=training.eval_every,
        checkpoint_every=training.checkpoint_every,
    )
    reporter.steps = training.steps
    reporter.phase("training")
    train(
        model,
        batches,
        settings,
        lambda report: reporter.training(report, model, engine.tags(), stopwatch.seconds()),
        sum_over_workers=_sum_over_workers(num_workers),
        compute=engine,
    )


def _load(
    task: WorkerTask, device: torch.device, data: TokenizedData, num_workers: int
) -> tuple[PreTrainedModel, EngineChoice]:
    """The base on its device, and how its steps will be run there."""
    trials = task.pack.trials
    base = load_base(trials[0].model)
    base.to(device)  # type: ignore[arg-type]  # transformers narrows torch's own signature
    if device.type != "cuda":
        return base, EngineChoice(mode="eager", reason="no GPU")
    obstacle = capture_obstacle((trial.method for trial in trials), num_workers)
    # Also for eager steps: no mask is built, no key or value is repeated.
    own_attention = use_causal_attention(base, data.evaluation.input_ids[:2].to(device))
    num_tokens = len(trials) * trials[0].training.batch_size * data.train.input_ids.shape[1]
    choice = choose_mode(
        task.engine_mode,
        num_steps=trials[0].training.steps,
        flops_per_step=flops_of_step(base.num_parameters(), num_tokens),
        obstacle=obstacle or own_attention,
    )
    return base, choice


def _measure(
    task: WorkerTask,
    base: PreTrainedModel,
    choice: EngineChoice,
    data: TokenizedData,
    num_workers: int,
    reporter: "_Reporter",
) -> PreTrainedModel:
    """Report the solo figures of every trial, measured once for those of equal shape; the base as it was.

    Nothing is compiled for them: a pack that will be is measured as a graph.
    """
    trials = task.pack.trials
    num_steps = trials[0].training.measure_steps
    if num_steps == 0:
        return base
    same_shape: dict[object, list[Trial]] = {}
    for trial in trials:
        # LoRA+ differs from LoRA in its learning rates alone: equal layers and sizes cost the same.
        shape = (trial.method.stack_key(), trial.method.peft_config().get("r"))
        same_shape.setdefault(shape, []).append(trial)
    for index, alike in enumerate(same_shape.values()):
        method = alike[0].method
        rank = method.hyperparameters().get("rank")
        label = method.name if rank is None else f"{method.name} rank {rank}"
        reporter.phase(f"measuring {label} alone ({index + 1} of {len(same_shape)})")
        engine = Engine(choice if choice.mode == "eager" else replace(choice, mode="graph"))
        figures = measure_solo(alike[0], base, data, num_steps=num_steps, num_workers=num_workers, engine=engine)
        reporter.send(PackUpdate(phase="measured", figures={trial.trial_id: figures for trial in alike}))
        if not method.packable:
            device = base.device
            del base
            base, _ = _load(task, device, data, num_workers)
    return base


def _sum_over_workers(num_workers: int) -> SumOverWorkers:
    if num_workers == 1:
        return one_worker

    def all_reduce(tensor: Tensor) -> None:
        torch.distributed.all_reduce(tensor)

    return all_reduce


class _Reporter:
    """Sends updates through Ray Train; every worker must send the same number of them, worker 0's arrive."""

    def __init__(self, pack: Pack, worker: int, *, hold_back: bool) -> None:
        self.pack, self.worker = pack, worker
        self.steps = pack.trials[0].training.steps
        self._hold_back = hold_back
        self._held: PackUpdate | None = None
        self._tags: Mapping[str, str] = {}
        self._latest: dict[str, dict[str, float]] = {name: {} for name in LOSSES}

    def phase(self, name: str) -> None:
        self.send(PackUpdate(phase=name, steps=self.steps))

    def training(
        self, report: Report, model: PackModel, tags: Mapping[str, str], setup_seconds: Mapping[str, float]
    ) -> None:
        ids = [trial.trial_id for trial in self.pack.trials]
        update = PackUpdate(
            phase="training",
            completed=report.completed,
            steps=self.steps,
            records=dict(zip(ids, report.records, strict=True)),
            diverged_at={
                trial_id: step for trial_id, step in zip(ids, report.diverged_at, strict=True) if step is not None
            },
            seconds={**setup_seconds, **report.seconds},
            tags={} if tags == self._tags else tags,
            finished=report.finished,
        )
        self._tags = tags
        if not report.checkpoint_due or self.worker != 0:
            self.send(update)
            return
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if report.finished:
                for member, trial in enumerate(self.pack.trials):
                    if report.diverged_at[member] is None:
                        export_member(model, member, trial.model.name, folder / ADAPTERS / trial.trial_id)
            else:
                save_checkpoint(model, folder)
            self.send(update, ray.train.Checkpoint.from_directory(folder))

    def send(self, update: PackUpdate, checkpoint: "ray.train.Checkpoint | None" = None) -> None:
        if self._held is not None:
            update, self._held = update.after(self._held), None
        losses = self._lowest_losses(update)
        if self._hold_back and checkpoint is None and losses.keys() != LOSSES.keys():
            self._held = update
            return
        ray.train.report({"update": update, "step": update.completed, **losses}, checkpoint=checkpoint)

    def _lowest_losses(self, update: PackUpdate) -> dict[str, float]:
        """What Tune's schedulers and searchers read: the lowest of the members' latest losses, by Tune's key."""
        for trial_id, records in update.records.items():
            for record in records:
                for name, key in LOSSES.items():
                    if key in record:
                        self._latest[name][trial_id] = record[key]
        for trial_id in update.diverged_at:
            for losses in self._latest.values():
                losses[trial_id] = float("inf")
        return {name: min(losses.values()) for name, losses in self._latest.items() if losses}
