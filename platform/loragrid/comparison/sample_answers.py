"""Reads the answers of the chosen trials to a few fixed prompts, beside the references and the base's answers."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from loragrid.comparison.choice import Choice
from loragrid.comparison.sweep_record import read_artifact
from loragrid.comparison.table import Comparison
from loragrid.trials.tags import SAMPLES_PROBLEM_TAG

SAMPLES_ARTIFACT = "samples/answers.json"
SAMPLES_TABLE = "samples.json"
"""The artifact of the sweep's run that MLflow shows as a table."""

_FIXED_COLUMNS = ("prompt", "reference", "base")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A generated text. is_complete: whether the model ended it; otherwise it was cut at the most tokens allowed."""

    text: str
    is_complete: bool = True

    def __str__(self) -> str:
        return self.text if self.is_complete else f"{self.text} …"


@dataclass(frozen=True, kw_only=True)
class SampleRow:
    """One prompt. row: the digest of its row. base: None if it was not asked. answers: choice's name -> answer."""

    row: str
    prompt: str
    reference: str
    base: Answer | None
    answers: Mapping[str, Answer] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class SampleTable:
    """The answers of each choice's reported trial with the lowest seed that has any.

    split: where the rows come from, `test` or `eval`. decoding: how answers are made, in words. trial_ids: choice's
    name -> the trial that answered. problems: choice's name -> why its trials have no answers.
    """

    split: str
    decoding: str
    trial_ids: Mapping[str, str]
    rows: tuple[SampleRow, ...]
    problems: Mapping[str, str]


def load_samples(comparison: Comparison, choices: Sequence[Choice]) -> SampleTable | None:
    """The sample answers of the choices; None if no trial has answers or a reason for having none.

    Lines that all prompts share at their beginning or end (a system prompt, role names) are left out of the prompts.

    Raises:
        ValueError: a trial's answers are not as LoraGrid writes them.
    """
    found: dict[str, dict[str, SampleRow]] = {}
    trial_ids: dict[str, str] = {}
    problems: dict[str, str] = {}
    split = decoding = ""
    for choice in choices:
        trials = choice.reported_trials or choice.setting.trial_ids
        for _, trial_id in sorted(trials.items()):
            text = _read(comparison, trial_id)
            if text is not None:
                split, decoding, found[choice.name] = _parse(text, trial_id, choice.name)
                trial_ids[choice.name] = trial_id
                break
        else:
            reasons = (comparison.tags.get(key, {}) for key in trials.values())
            reason = next((tags[SAMPLES_PROBLEM_TAG] for tags in reasons if SAMPLES_PROBLEM_TAG in tags), "")
            if reason:
                problems[choice.name] = reason
    if not found and not problems:
        return None
    return SampleTable(
        split=split,
        decoding=decoding,
        trial_ids=trial_ids,
        rows=_without_shared_lines(_merged(list(found.values()))),
        problems=problems,
    )


def as_mlflow_table(tables: Mapping[str, SampleTable]) -> tuple[list[str], list[list[str | None]]]:
    """(Columns, rows) of one table with a column per choice; tables by the label of their task, as `tasks_of`.

    A column `task` comes first if there are several tasks.
    """
    names = list(dict.fromkeys(name for table in tables.values() for name in table.trial_ids))
    first = ["task"] if len(tables) > 1 else []
    columns = [*first, *_FIXED_COLUMNS]
    columns += [f"method {name}" if name in columns else name for name in names]
    rows: list[list[str | None]] = []
    for label, table in tables.items():
        for row in table.rows:
            answers = [row.base, *(row.answers.get(name) for name in names)]
            texts = [None if answer is None else str(answer) for answer in answers]
            rows.append([*([label] if first else []), row.prompt, row.reference, *texts])
    return columns, rows


def _read(comparison: Comparison, trial_id: str) -> str | None:
    table = comparison.table
    run_id = str(table.loc[table["trial_id"] == trial_id, "run_id"].iloc[0])
    return read_artifact(comparison.tracking_uri, run_id, SAMPLES_ARTIFACT)


def _parse(text: str, trial_id: str, name: str) -> tuple[str, str, dict[str, SampleRow]]:
    """Split, decoding, and row digest -> prompt with the answer of the choice `name`."""
    try:
        content = json.loads(text)
        rows = {
            str(own["row"]): SampleRow(
                row=str(own["row"]),
                prompt=str(own["prompt"]),
                reference=str(own["reference"]),
                base=_answer(own["base"]),
                answers={name: _answer(own["answer"])},
            )
            for own in content["prompts"]
        }
        return str(content["split"]), str(content["decoding"]), rows
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{trial_id}: its artifact {SAMPLES_ARTIFACT} is not as LoraGrid writes it: {error!r}"
        ) from None


def _answer(content: Mapping[str, object]) -> Answer:
    return Answer(text=str(content["text"]), is_complete=bool(content["is_complete"]))


def _merged(tables: Sequence[Mapping[str, SampleRow]]) -> list[SampleRow]:
    """One row per prompt with the answers of all; trials that were run with other `samples` keys have other rows."""
    merged: dict[str, SampleRow] = {}
    for table in tables:
        for key, row in table.items():
            known = merged.get(key, row)
            merged[key] = SampleRow(
                row=key,
                prompt=known.prompt,
                reference=known.reference,
                base=known.base,
                answers={**known.answers, **row.answers},
            )
    return list(merged.values())


def _without_shared_lines(rows: Sequence[SampleRow]) -> tuple[SampleRow, ...]:
    lines = [row.prompt.strip().splitlines() for row in rows]
    shortest = min((len(own) for own in lines), default=0)
    if len(rows) < 2 or not shortest:
        return tuple(rows)
    start = next((i for i in range(shortest) if len({own[i] for own in lines}) > 1), shortest)
    end = next((i for i in range(shortest - start) if len({own[-1 - i] for own in lines}) > 1), shortest - start)
    cut = ["\n".join(own[start : len(own) - end]).strip() for own in lines]
    if not all(cut):  # one prompt is the beginning of the others
        return tuple(rows)
    return tuple(
        SampleRow(row=row.row, prompt=prompt, reference=row.reference, base=row.base, answers=row.answers)
        for row, prompt in zip(rows, cut, strict=True)
    )
