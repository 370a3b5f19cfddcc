"""Lists every MLflow metric key of a trial and of a sweep with meaning and unit, and writes the note for MLflow."""

from loragrid.tasks.discovery import task_figures
from loragrid.trials.row_notes import ROW_NOTES
from loragrid.trials.skip_reasons import KEPT_APART, UNUSABLE

# The keys are the same for every method, because MLflow's comparison page aligns runs by key.
CURVE_METRICS: dict[str, str] = {
    "train/loss": "mean cross-entropy of the step's labelled tokens, before the step (nats)",
    "eval/loss": "mean cross-entropy of the evaluation rows' labelled tokens (nats)",
    "train/grad_norm": "norm of the trial's gradient before clipping",
    "train/learning_rate": "learning rate of the step, before a method's own multipliers",
}
"""Metrics with a value for many steps."""

_EVALUATION_METRICS: dict[str, str] = {
    "eval/final_loss": "evaluation loss after the last step",
    "eval/best_loss": "lowest evaluation loss on the path, the base's before the first step included",
    "eval/best_step": "the first step with that loss; 0: no evaluation was below the base's",
    "eval/overshoot": "final evaluation loss minus the lowest (nats); 0: the last step is the best",
}
_TEST_METRICS: dict[str, str] = {
    "test/loss": "mean cross-entropy of the test rows' labelled tokens after the last step (nats)",
}
_COST_METRICS: dict[str, str] = {
    "forgetting/base_loss": "mean cross-entropy of the held-out plain text before training (nats)",
    "forgetting/loss": "held-out loss after the last step (nats), and its curve along the path; its increase measures "
    "forgetting",
    "forgetting/best_step_loss": "held-out loss at `eval/best_step` (nats)",
    "parameters/trainable": "number of values that the optimizer changes",
    "parameters/stored": "number of values in the adapter's file",
    "parameters/shared": "number of values that are frozen and shared by all layers (VeRA's projections)",
    "parameters/adapted_layers": "number of layers that the method adapts",
    "memory/base_bytes": "bytes of the base's weights (of a sharded base one worker's share) and buffers; exact",
    "memory/adapter_bytes": "bytes of the method's own tensors, trained or frozen: LoRA-FA's A, VeRA's projections "
    "once, Delta-LoRA's reference, full fine-tuning's float32 copy of a base in another type; exact, measured solo",
    "memory/gradient_bytes": "bytes of the gradients that live from step to step; exact, measured solo",
    "memory/optimizer_bytes": "bytes of AdamW's moments, and the few numbers its update reads; exact, measured solo",
    "memory/saved_activation_bytes": "bytes autograd keeps from forward to backward; exact, measured solo",
    "memory/loss_bytes": "peak bytes of the loss (logits of one chunk), without saved activations; measured solo",
    "memory/peak_allocated_bytes": "peak of the allocated GPU memory in a training step; measured solo",
    "memory/peak_reserved_bytes": "peak of the reserved GPU memory in a training step; measured solo",
    "memory/eval_peak_allocated_bytes": "peak of the allocated GPU memory in an evaluation; measured solo",
    "memory/eval_peak_reserved_bytes": "peak of the reserved GPU memory in an evaluation; measured solo",
    "memory/peak_resident_bytes": "peak of the process's resident memory in a training step, on a CPU",
    "memory/pack_estimated_bytes": "GPU memory that the trial's last pack was expected to allocate, from shapes only",
    "memory/pack_peak_bytes": "peak of the GPU memory that the trial's last pack allocated",
    "time/step_seconds": "one optimizer step: the median of several, taken in turns with trials of other shapes; "
    "measured solo, once for all trials with the same tag `loragrid.cost.shape`",
    "time/step_low_seconds": "the shortest of these steps",
    "time/step_high_seconds": "the longest of these steps",
    "time/step_cpu_seconds": "CPU time of the worker's process in one of these steps, all threads together; median",
    "time/measure_repeats": "number of these steps",
    "time/measure_load": "CPU load during these steps: the worker's threads and the cores that other processes kept "
    "busy, over the cores that the worker may use; above 1 the worker had to wait",
    "time/measure_shape_seconds": "all that measuring the trial's shape took, once in a queue of packs",
    "throughput/tokens_per_second": "non-padding tokens trained per second; measured solo",
    "throughput/model_flops_per_second": "floating-point operations per second that the base itself needs for the "
    "non-padding tokens of a step, the method's own products not counted; of one worker, measured solo",
    "throughput/device_limit_flops_per_second": "operations per second of the fastest matrix product in the "
    "base's type, measured on the device",
    "throughput/device_limit_seconds": "time of that measurement, once per process; part of time/measure_seconds",
    "throughput/fraction_of_device_limit": "model_flops_per_second over device_limit_flops_per_second",
    "convergence/area_under_eval_curve": "evaluation loss averaged over the steps, by the trapezoid rule (nats)",
    "convergence/steps_to_threshold": "steps until the evaluation loss first reached the threshold",
    "convergence/seconds_to_threshold": "training seconds until then",
    # These add up to the whole time of the trial's packs until its end is reported; a phase that never ran is missing.
    "time/setup_seconds": "loading and building before the first step of the trial's packs",
    "time/measure_seconds": "measuring memory and speed of single trials before the trial's packs",
    "time/compile_seconds": "the first step of a compiled or captured pack, which compiles, and the captures",
    "time/data_seconds": "building batches and copying them to the device",
    "time/train_seconds": "all optimizer steps of the trial's packs, without a first step that compiles",
    "time/check_seconds": "checking during training that frozen tensors and the trainable set are as declared",
    "time/eval_seconds": "all evaluations of the trial's packs",
    "time/generate_seconds": "answering the rows of the task, by generation or by likelihood, and the sample prompts",
    "time/checkpoint_seconds": "saving states, exporting adapters",
    "time/report_seconds": "reporting figures to the sweep, and waiting for other workers to report",
}

_OVERLAPS = {
    "prompts_in_train": "{rows} rows whose prompt (of a chat, all before the first answer) is also one of a train row",
    "prompts_in_train_answers": "{rows} rows whose last question is also an answer of a train row",
    "answers_in_train": "{rows} rows whose last answer is also an answer of a train row",
    "answers_in_train_prompts": "{rows} rows whose last answer is also a question of a train row",
}
_SPLITS = {"train": "train", "eval": "evaluation", "test": "test"}
_DATA_METRICS: dict[str, str] = {
    **{f"data/{split}_rows": f"number of {name} rows" for split, name in _SPLITS.items()},
    **{f"data/{split}_groups": f"number of groups among the {name} rows" for split, name in _SPLITS.items()},
    "data/skipped_rows": "rows that were read and cannot be used; the tag `loragrid.data.left_out` counts the reasons",
    "data/skipped_share": "skipped rows over the sum of skipped and used rows",
    "data/kept_apart_rows": "usable rows that belong to no split, because an earlier split has them or their group",
    **{f"data/skipped_{name}": f"rows skipped because: {reason}" for name, reason in UNUSABLE.items()},
    **{f"data/kept_apart_{name}": f"rows kept apart because: {reason}" for name, reason in KEPT_APART.items()},
    **{f"data/noted_{name}": f"used rows that {what}" for name, what in ROW_NOTES.items()},
    **{
        f"data/{split}_{name}": words.format(rows=_SPLITS[split])
        for split in ("eval", "test")
        for name, words in _OVERLAPS.items()
    },
    "data/train_tokens": "tokens of all train rows, without padding: those of one epoch",
    "data/train_labels": "labelled tokens of all train rows: those of one epoch",
}
_TRAINED_METRICS: dict[str, str] = {
    "data/trained_epochs": "passes over the train rows that all `training.steps` steps make, whole or not",
    "data/trained_tokens": "tokens that all `training.steps` steps train, with repetitions and without padding",
    "data/trained_labels": "labelled tokens that all `training.steps` steps train, with repetitions",
    "data/padding_share": "share of padding among the positions that all steps compute",
}

_TRIAL_COUNTS: dict[str, str] = {
    "sweep/trials_finished": "trials that trained to their last step",
    "sweep/trials_failed": "trials that failed; their runs hold the reason",
    "sweep/trials_stopped": "trials that fell behind and were stopped early",
    "sweep/trials_confirming": "trials of chosen settings with fresh seeds (`confirm`); the other counts include them",
}
_SWEEP_COSTS: dict[str, str] = {
    "sweep/wall_seconds": "from the start of Ray's trials to the end of the last, summed over all resumptions",
    "sweep/start_seconds": "from the start of the first queue to its workers' first report: Ray, processes, imports",
    "sweep/gpu_seconds": "seconds for which the sweep held GPUs, times their number",
    "sweep/estimated_seconds": "expected time of the sweep; `loragrid plan` lists what it leaves out",
}

NOISE_OF_SEEDS = "noise/seed_deviation"
NOISE_OF_ROWS = "noise/row_deviation"
NOISE_OF_ROWS_BY_SEED = "noise/row_seed_deviation"
NOISE_GROUPS = "noise/effective_groups"
NOISE_SEEDS = "noise/num_seeds"
NOISE_ROWS = "noise/num_rows"
NOISE_LEVEL = "noise/mean_figure"
_SWEEP_NOISE: dict[str, str] = {
    NOISE_OF_SEEDS: "standard deviation over seeds of one method's reported test figure, without what the rows add; "
    "`loragrid plan` reads it, and the other `noise/` metrics, to predict what a sweep can show",
    NOISE_OF_ROWS: "standard deviation over groups of test rows of the difference of two methods (means over seeds)",
    NOISE_OF_ROWS_BY_SEED: "standard deviation over groups of test rows of what one seed adds to one method's figure",
    NOISE_GROUPS: "independent test rows, in effect: (sum of the groups' weights)² / sum of their squares",
    NOISE_SEEDS: "seeds that all compared methods have",
    NOISE_ROWS: "test rows that all compared trials have scored",
    NOISE_LEVEL: "mean of the reported test figure over the compared methods",
}


def summary_metrics() -> dict[str, str]:
    """A trial's metrics that are no curves, including the figures of all task kinds: key -> meaning."""
    evaluation = {
        f"eval/{figure.name}": f"{figure.description.format(rows='evaluation')} (step 0: by the bare base)"
        for figure in task_figures()
    }
    test = {
        f"test/{figure.name}": f"{figure.description.format(rows='test')} after the last step"
        for figure in task_figures()
    }
    return {
        **_EVALUATION_METRICS,
        **evaluation,
        **_TEST_METRICS,
        **test,
        **_COST_METRICS,
        **_DATA_METRICS,
        **_TRAINED_METRICS,
    }


def curve_keys() -> tuple[str, ...]:
    """All metrics with values for several steps. The last values of those outside `CURVE_METRICS` are in the table."""
    return (*CURVE_METRICS, *(f"eval/{figure.name}" for figure in task_figures()), "forgetting/loss")


def best_figure_keys() -> dict[str, str]:
    """Trial metric -> sweep metric that holds its value of the best trial."""
    figures = {
        f"{split}/{figure.name}": f"sweep/best_{split}_{figure.name}"
        for figure in task_figures()
        for split in ("eval", "test")
    }
    return {**figures, "eval/final_loss": "sweep/best_eval_loss", "test/loss": "sweep/best_test_loss"}


def sweep_metrics() -> dict[str, str]:
    """Metrics of the sweep's own run: key -> meaning. Of its data, those that are the same for all its trials."""
    best: dict[str, str] = {}
    for figure in task_figures():
        best[f"sweep/best_eval_{figure.name}"] = (
            f"evaluation {figure.words} of the best trial, which the tag `loragrid.best_trial` names; the tag "
            "`loragrid.best_trial.metric` names the metric that ranks the trials"
        )
        best[f"sweep/best_test_{figure.name}"] = f"its {figure.words} on the test rows, which no choice uses"
    best["sweep/best_eval_loss"] = "its final evaluation loss, which ranks the trials of a sweep without a task"
    best["sweep/best_test_loss"] = "its loss on the test rows"
    return {**_TRIAL_COUNTS, **best, **_SWEEP_COSTS, **_SWEEP_NOISE, **_DATA_METRICS}


_EXPLAINED = ("train", "eval", "test", "forgetting", "parameters", "convergence")
"""Groups of metrics that the note explains: with question and answer, it must fit into a tag of MLflow."""
_MANY = ("data/", "noise/")
"""Groups that the note names as a whole, because they have many metrics."""


def sweep_note(question: str, experiment_name: str, *, trials: str, charts: str, answer: str = "") -> str:
    """The description on the parent run's page, in Markdown: how to read its child runs.

    trials, charts: addresses of MLflow's pages with the sweep's trials. answer: the verdict's, once the sweep ended.
    """
    everything = {**CURVE_METRICS, **summary_metrics(), **sweep_metrics()}
    explained = {key: text for key, text in everything.items() if key.partition("/")[0] in _EXPLAINED}
    glossary = "\n".join(f"| `{key}` | {text} |" for key, text in explained.items())
    unexplained = [key for key in everything if key not in explained]
    shown = [f"{key.partition('/')[0]}/*" if key.startswith(_MANY) else key for key in unexplained]
    others = ", ".join(f"`{key}`" for key in dict.fromkeys(shown))
    return (
        (f"**{question}**\n\n" if question else "")
        + (f"{answer}\n\n" if answer else "")
        + "This run is the sweep; each child run is one trial (one method, one set of hyperparameters, one seed)."
        + f" To compare, run `loragrid compare {experiment_name}`, or look here:\n\n"
        + f"* **[Table of the trials]({trials})**, lowest final loss first. Of the *Columns*, `method.name`,"
        + " `method.rank`, `training.lr`, `seed`, `eval/final_loss`, `parameters/trainable` and `time/step_seconds`"
        + " are the most useful; tick runs and press *Compare* to compare them (*Show diff only* hides equal values).\n"
        + f"* **[Charts of the trials]({charts})**: ten at first; the eye above the list shows all. *Group by* the"
        + " parameter `method.name` draws one line per method; `eval/loss` is the curve to compare.\n"
        + "* **Picture**: the artifact `figures/loss_curves.png` of this run, once the sweep has ended.\n"
        + "* **What it ran on**: the tags `loragrid.version.*`, `loragrid.device`, `loragrid.model.weights`,"
        + " `loragrid.data.digest`; `loragrid compare` reports where trials differ in them.\n\n"
        + f"| metric | meaning |\n|---|---|\n{glossary}\n\n"
        + f"The page *Metrics and tags* of the documentation explains the others: {others}.\n\n"
        + "A metric that is missing was not measured. Memory and time per method are measured in a pack of one, never"
        + " on a pack that it shared with others."
    )
