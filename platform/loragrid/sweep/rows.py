"""Tokenises a sweep's rows before Ray starts."""

from rich.console import Console

from loragrid.comparison.data_record import DataRecord
from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.data.record import data_figures
from loragrid.evaluation.task_scorer import task_scorer
from loragrid.formatting import count_of
from loragrid.models.loading import load_tokenizer
from loragrid.planning.plan import Plan


def tokenize(the_plan: Plan, console: Console) -> dict[tuple[ModelConfig, DataConfig], TokenizedData]:
    """The tokenised rows of each pair of model and data set in the plan.

    Prints their numbers, what was skipped, groups, and what evaluation and test rows share with train rows.

    Raises:
        ValueError: the data cannot be read, or the task of a trial cannot be scored on it.
    """
    tokenized: dict[tuple[ModelConfig, DataConfig], TokenizedData] = {}
    for trial in the_plan.trials:
        key = (trial.model, trial.data)
        if key in tokenized:
            continue
        data = load_data(trial.data, trial.model, load_tokenizer(trial.model))
        tokenized[key] = data
        if trial.task is not None:
            task_scorer(trial.task, trial.model, data)  # raises if no worker could score the rows
        skipped = "".join(f"; skipped {count}: {reason}" for reason, count in data.skipped.items() if count)
        tested = f", {len(data.test)} to test" if len(data.test) else ""
        console.print(
            f"data {trial.data.name}: {count_of(len(data.train), 'row')} to train on, {len(data.evaluation)} to "
            f"evaluate{tested}{skipped}",
            highlight=False,
            markup=False,
        )
        record = DataRecord.of(data_figures(data), data.skipped, read_as=data.made_from["shapes"])
        remarks = [data.remark] if data.remark else []
        for sentence in (
            *remarks,
            *record.shape_sentences(),
            *record.group_sentences(),
            *record.note_sentences(),
            *record.overlap_sentences(),
        ):
            console.print(f"data {trial.data.name}: {sentence}", highlight=False, markup=False, soft_wrap=True)
    return tokenized
