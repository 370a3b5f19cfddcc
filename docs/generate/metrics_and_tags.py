"""The reference of every metric and tag that a run in MLflow can have, made from the tables that name them."""

from docs.generate.markdown import page, table
from loragrid.comparison.fingerprint import PARTS
from loragrid.trials.metrics import CURVE_METRICS, summary_metrics, sweep_metrics

INTRODUCTION = """
One experiment is one MLflow experiment. Its sweeps are parent runs; each trial is a child run. Metric keys are
`group/name`, with the unit in the name where there is one. The keys are the same for every method, so MLflow's
comparison page lines them up. A metric that is missing was not measured or does not apply; there are no placeholder
values. A trial's parameters are the dotted keys of the [experiment file](experiment_file.md).

[What the figures mean](../figures.md) explains how they are measured and compared.
"""

BEARINGS = {
    "results": "results: losses and scores can differ",
    "speed": "speed: times and memory can differ, losses only by rounding",
    "neither": "neither",
}

OTHER_TAGS: dict[str, str] = {
    "loragrid.kind": "`sweep` or `trial`",
    "loragrid.sweep": "name of the sweep that the run belongs to",
    "loragrid.trial_id": "identity of the trial, a digest of its settings; the same settings have the same id",
    "loragrid.trial_id.in_epochs": "of a training in epochs: its identity before the epochs were steps of these rows",
    "loragrid.method": "name of the method",
    "loragrid.label": "name of the method in the comparison, where a block of the file sets `label`",
    "loragrid.phase": "`tune` for a trial of the grid, `confirm` for a chosen setting with a fresh seed",
    "loragrid.confirm.choice": "of a sweep: the ids of the settings that it confirms, and the fresh seeds",
    "loragrid.question": "the question of the experiment",
    "loragrid.data.left_out": "rows that were read and not used, as JSON: reason -> number",
    "loragrid.data.left_out.examples": "what is wrong with skipped bad rows, as JSON: reason -> its most frequent "
    "faults, each as the number of rows and one row's fault in words",
    "loragrid.data.made_from": "what the rows depend on, as JSON: digests of data and tokenizer, and the keys that "
    "split them; a sweep on other rows is not resumed",
    "loragrid.parameters.found": "the parameters that the experiment leaves open and the rows gave a value (such as "
    "`training.steps` of a training in epochs), as a JSON list of keys",
    "loragrid.adapted_layers": "number and names of the layers that the trial adapts, and of those that its settings "
    "name and that training on text cannot change",
    "loragrid.model.location": "where the worker found the base: an absolute folder, a hub id, or a package",
    "loragrid.model.files": "digests of the files of a base in a folder, as JSON; an export compares them",
    "loragrid.model.config": "the config.json of a base in a folder; a merged export is written with it",
    "loragrid.model.unused_weights": "weights of the base's checkpoint that its architecture does not use; absent "
    "without such weights",
    "loragrid.reason": "why a trial failed or was stopped",
    "loragrid.out_of_memory": "set if the trial ran out of memory",
    "loragrid.rung": "the rung of successive halving at which the trial's setting was stopped",
    "loragrid.pack": "the pack that trained the trial last",
    "loragrid.pack.split": "why the pack was halved",
    "loragrid.cost.shape": "equal for trials that cost the same in a pack of one and are measured once (LoRA, LoRA+)",
    "loragrid.pack.shape": "shape of the pack, under which its timing is reused by later plans",
    "loragrid.scoring.rows_at_once": "rows scored at once, where memory allowed fewer than a step trains",
    "loragrid.scoring.prompts_at_once": "prompts answered at once, where memory allowed fewer than a step trains",
    "loragrid.samples.problem": "why a finished trial has no sample answers",
    "loragrid.samples.prompts_at_once": "sample prompts answered at once, where memory allowed fewer",
    "loragrid.checkpoint.damaged": "set if a damaged state was found and the one before it was used",
    "loragrid.engine.reason": "why the engine runs the steps in this mode",
    "loragrid.engine.attention": "set if the base keeps its own attention on a GPU, with the reason",
    "loragrid.engine.evaluation": "set if steps are captured and evaluation is not, with the reason",
    "loragrid.estimate.source": "what the time estimate of the sweep rests on",
    "loragrid.git.dirty": "`true` if the code had changes that no commit holds",
    "loragrid.trials": "the trials that the sweep was started with",
    "loragrid.resumed": "how the sweep was resumed",
    "loragrid.answer": "of a sweep: the first sentence of its verdict",
    "loragrid.best_trial": "of a sweep: the trial to export, of the recommended method if there is one",
    "loragrid.best_trial.metric": "of a sweep: the metric by which this trial is the best of its setting",
    "loragrid.writes_base": "`true` if the method trains the base itself, so that its result is a whole model",
    "loragrid.summary.problem": "why the summary of a sweep could not be computed",
}
"""Tags that are no part of the fingerprint -> meaning. A test compares this with the tags in the code."""

PREFIXES: dict[str, str] = {
    "loragrid.before.": "`loragrid.before.TAG`: value under which a trial began, if it was resumed under another one",
    "loragrid.card.": "`loragrid.card.FIELD`: the card of the method: title, authors, year, paper, update rule, ...",
    "loragrid.decoding": "`loragrid.decoding`, `loragrid.decoding.*`: how answers are generated; bears on results",
    "loragrid.version.": "`loragrid.version.PACKAGE`: installed versions",
}


def metrics_and_tags_page() -> str:
    """The page, in Markdown."""
    summary: dict[str, list[tuple[str, str]]] = {}
    for key, meaning in summary_metrics().items():
        summary.setdefault(key.partition("/")[0], []).append((f"`{key}`", meaning))
    groups = [f"### {group}\n\n{table(['metric', 'meaning'], rows)}" for group, rows in summary.items()]
    return page(
        "Metrics and tags",
        INTRODUCTION,
        [
            "## Curves of a trial",
            "These have a value per reported step.",
            table(["metric", "meaning"], [(f"`{key}`", meaning) for key, meaning in CURVE_METRICS.items()]),
            "## Figures of a trial",
            "These have one value. The figures of a task on the evaluation rows, such as `eval/accuracy`, are also "
            "recorded before the first step and every `task.every` steps; `forgetting/loss` also at every evaluation.",
            *groups,
            "## Figures of a sweep",
            table(["metric", "meaning"], [(f"`{key}`", meaning) for key, meaning in sweep_metrics().items()]),
            "## Fingerprint tags",
            "They identify what a trial ran on. `loragrid compare` reports where trials of a sweep differ in a part "
            "that bears on results; `--strict` refuses such a sweep.",
            table(
                ["tag", "what it names", "a difference bears on"],
                [(f"`{part.tag}`", part.name, BEARINGS[part.bearing]) for part in PARTS],
            ),
            "## Other tags",
            table(["tag", "meaning"], [(f"`{tag}`", meaning) for tag, meaning in OTHER_TAGS.items()]),
            "## Groups of tags",
            "\n".join(f"* {meaning}" for meaning in PREFIXES.values()),
        ],
    )
