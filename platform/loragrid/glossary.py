"""Every metric key that a trial has in MLflow, with what it is and its unit, and the note that explains them there."""

# The keys are the same for every method: MLflow's comparison page lays runs side by side by key.
CURVE_METRICS: dict[str, str] = {
    "train/loss": "mean cross-entropy of the step's labelled tokens, before the step (nats)",
    "eval/loss": "mean cross-entropy of the evaluation rows' labelled tokens (nats)",
    "train/grad_norm": "norm of the trial's gradient before clipping",
    "train/learning_rate": "learning rate of the step, before a method's own multipliers",
}
SUMMARY_METRICS: dict[str, str] = {
    "eval/final_loss": "evaluation loss after the last step",
    "eval/best_loss": "lowest evaluation loss",
    "eval/accuracy": "share of the evaluation rows that are answered right (step 0: by the bare base)",
    "test/loss": "mean cross-entropy of the test rows' labelled tokens after the last step (nats)",
    "test/accuracy": "share of the test rows that are answered right after the last step",
    "forgetting/base_loss": "mean cross-entropy of the held-out plain text before training (nats)",
    "forgetting/loss": "the same after the last step: what it lies higher is what the adapter forgot",
    "parameters/trainable": "numbers that the optimizer changes",
    "parameters/stored": "numbers that the adapter's file holds",
    "parameters/shared": "numbers that are frozen and shared by all layers (VeRA's projections)",
    "memory/base_bytes": "bytes of the base's weights that one worker holds: all, or its share of a sharded base",
    "memory/saved_activation_bytes": "bytes autograd keeps from forward to backward; exact, measured alone",
    "memory/peak_allocated_bytes": "peak of the allocated GPU memory; measured alone",
    "memory/peak_reserved_bytes": "peak of the reserved GPU memory; measured alone",
    "memory/peak_resident_bytes": "peak of the process's resident memory",
    "memory/pack_estimated_bytes": "GPU memory that the trial's last pack was expected to allocate, from shapes alone",
    "memory/pack_peak_bytes": "peak of the GPU memory that it did allocate",
    "time/step_seconds": "one optimizer step; measured alone",
    "throughput/tokens_per_second": "non-padding tokens trained per second; measured alone",
    "convergence/steps_to_threshold": "steps until the evaluation loss first reached the threshold",
    "convergence/seconds_to_threshold": "training seconds until then",
    "time/setup_seconds": "loading and building before the first step of the trial's packs",
    "time/measure_seconds": "measuring memory and speed of single trials before the trial's packs",
    "time/data_seconds": "putting batches together; on a GPU also waiting for the step before",
    "time/train_seconds": "all optimizer steps of the trial's packs, compiling included",
    "time/eval_seconds": "all evaluations of the trial's packs",
    "time/generate_seconds": "answering the rows of the task, by generation or by likelihood, in the trial's packs",
}

SWEEP_METRICS: dict[str, str] = {
    "sweep/trials_finished": "trials that came to their last step",
    "sweep/trials_failed": "trials that failed; their runs say why",
    "sweep/trials_stopped": "trials that fell behind and were stopped early",
    "sweep/best_eval_loss": "lowest final evaluation loss; the tag `loragrid.best_trial` names the trial",
    "sweep/best_test_loss": "loss of that trial, chosen by its evaluation loss, on the test rows",
    "sweep/wall_seconds": "from the start of Ray's trials to the end of the last, over all resumptions",
    "sweep/start_seconds": "from the start of the first lane to its workers' first word: Ray, processes, imports",
    "sweep/gpu_seconds": "seconds for which the sweep held GPUs, times their number",
    "sweep/estimated_seconds": "what the sweep was expected to take; `loragrid plan` says what that leaves out",
}
"""What the sweep's own run has."""

DIVERGED = "diverged: loss or gradient not finite"
"""How the reason of a trial begins whose numbers left the finite ones: the same would happen again."""

STOPPED_EARLY = "stopped early"
"""How the reason of a trial begins that fell behind and was stopped, which MLflow calls KILLED."""


def sweep_note(question: str, experiment_name: str, *, trials: str, charts: str) -> str:
    """The description on the parent run's page, in Markdown: how to read what lies below it.

    trials, charts: addresses of MLflow's pages with the sweep's trials.
    """
    everything = {**SUMMARY_METRICS, **CURVE_METRICS, **SWEEP_METRICS}
    glossary = "\n".join(f"| `{key}` | {text} |" for key, text in everything.items())
    return (
        (f"**{question}**\n\n" if question else "")
        + "This run is the sweep; each child run is one trial (one method, one set of hyperparameters, one seed)."
        + f" To compare, run `loragrid compare {experiment_name}`, or look here:\n\n"
        + f"* **[Table of the trials]({trials})**, lowest final loss first. Of the *Columns*, `method.name`,"
        + " `method.rank`, `training.lr`, `seed`, `eval/final_loss`, `parameters/trainable` and `time/step_seconds`"
        + " tell most; tick runs and press *Compare* to lay them side by side (*Show diff only* hides what is equal).\n"
        + f"* **[Charts of the trials]({charts})**: ten at first, the eye above the list shows all. *Group by* the"
        + " parameter `method.name` draws one line per method; `eval/loss` is the curve to compare.\n"
        + "* **Picture**: the artifact `figures/loss_curves.png` of this run, once the sweep has ended.\n"
        + "* **What it ran on**: the tags `loragrid.version.*`, `loragrid.device`, `loragrid.model.weights`,"
        + " `loragrid.data.digest`; `loragrid compare` says where trials differ in them.\n\n"
        + f"| metric | is |\n|---|---|\n{glossary}\n\n"
        + "A metric that is missing was not measured. Memory and time per method are measured on the trial alone, never"
        + " on a pack that it shared with others."
    )
