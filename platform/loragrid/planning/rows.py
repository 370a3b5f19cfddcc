"""Reads and tokenises the rows of a plan, and checks all that rows and tokenizer show; no weights are loaded."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.data.in_words import DataRecord
from loragrid.data.record import data_record
from loragrid.evaluation.task_scorer import TaskScorer, task_scorer
from loragrid.models.loading import load_config, load_tokenizer
from loragrid.models.vocabulary import check_vocabulary
from loragrid.trials.lengths import NumRows
from loragrid.trials.trial import Trial

SLOW_SECONDS = 3.0
"""After this time the user is told what is being waited for."""

RowsKey = tuple[ModelConfig, DataConfig]
"""What decides the tokenised rows of a trial."""


@dataclass(frozen=True, kw_only=True)
class PlannedRows:
    """What a plan must know of the rows of one model and data set.

    record: what is told about them. length: positions of every row that is trained, padding included. scored_length:
    of the longest row that is scored. longest_prompt: tokens of the longest prompt that a task answers, and num_prompts
    their number; 0 without a task.
    """

    record: DataRecord
    num_rows: NumRows
    length: int
    scored_length: int
    longest_prompt: int = 0
    num_prompts: int = 0
    remark: str = ""
    """What happened while the rows were loaded; see `TokenizedData.remark`."""


@dataclass(frozen=True, kw_only=True)
class ReadRows:
    """The rows of all trials. tokenized: the rows themselves; planned: what a plan must know of them."""

    tokenized: Mapping[RowsKey, TokenizedData]
    planned: Mapping[RowsKey, PlannedRows]


def read_rows(
    trials: Sequence[Trial],
    waiting: Callable[[str], None] = lambda sentence: None,
) -> ReadRows:
    """The tokenised rows of each pair of model and data set; they are kept, so that the next call is fast.

    waiting: receives a sentence if it takes long.

    Raises:
        ValueError: the data cannot be read, a token has no embedding, or a trial's task cannot be scored on the rows.
    """
    tokenized: dict[RowsKey, TokenizedData] = {}
    planned: dict[RowsKey, PlannedRows] = {}
    for trial in trials:
        key = (trial.model, trial.data)
        if key in tokenized:
            continue
        what = f"data {trial.data.name}: reading and tokenising its rows for {trial.model.name}"
        config = load_config(trial.model)  # first, because a tokenizer's loader reads it too, and names it less well
        with said_if_slow(f"{what}; they are kept for later runs", waiting):
            tokenizer = load_tokenizer(trial.model)
            data = load_data(trial.data, trial.model, tokenizer)
        check_vocabulary(config, tokenizer, data.id_bounds(), name=trial.model.name)
        # Raises if no worker could score the rows.
        scorer = None if trial.task is None else task_scorer(trial.task, trial.model, data)
        tokenized[key], planned[key] = data, _planned(data, trial.data, scorer)
    return ReadRows(tokenized=tokenized, planned=planned)


def sentences_about(planned: Mapping[RowsKey, PlannedRows]) -> list[str]:
    """What `plan` and `run` tell about the rows of each data set, and of each model if there are several."""
    several = len({model for model, _ in planned}) > 1
    found = []
    for (model, data), rows in planned.items():
        place = f"data {data.name}{f', {model.name}' if several else ''}: "
        remarks = [rows.remark] if rows.remark else []
        found += [place + sentence for sentence in (*remarks, *rows.record.lines())]
    return found


@contextmanager
def said_if_slow(sentence: str, say: Callable[[str], None], seconds: float = SLOW_SECONDS) -> Iterator[None]:
    """A context that says the sentence if it lasts longer than `seconds`."""
    timer = threading.Timer(seconds, say, [sentence])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _planned(data: TokenizedData, config: DataConfig, scorer: TaskScorer | None) -> PlannedRows:
    length = data.train.input_ids.shape[1]
    scored = [length]
    held_out = data.held_out_text
    if held_out is not None:
        scored.append(held_out.input_ids.shape[1])
    if scorer is not None and scorer.task.generation is None:
        scored.append(scorer.longest_row)
    return PlannedRows(
        record=data_record(data, config.max_length),
        num_rows=NumRows(train=len(data.train), forgetting=0 if held_out is None else len(held_out)),
        length=length,
        scored_length=max(scored),
        longest_prompt=0 if scorer is None else scorer.longest_prompt,
        num_prompts=0 if scorer is None else scorer.num_questions,
        remark=data.remark,
    )
