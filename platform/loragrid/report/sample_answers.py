"""Prepares sample answers for a report: one line per cell, long texts cut, nothing that changes the page."""

import unicodedata

from loragrid.comparison.metric_text import MISSING
from loragrid.comparison.sample_answers import Answer, SampleTable
from loragrid.report.tables import Cell, PageTable

MOST_CHARACTERS = 280
"""Longest text of a cell; the middle of a longer prompt and the end of a longer answer are left out."""

EMPTY = "(empty)"
_ROWS = {"test": "test rows", "eval": "evaluation rows"}


def sample_table(samples: SampleTable) -> PageTable:
    """One row per prompt: the prompt, the reference, the base's answer, and a column per choice that has answers.

    Cells are plain text, to be escaped by the template. They have no control, format or line-breaking characters.
    """
    names = tuple(samples.trial_ids)
    rows = tuple(
        (
            Cell(text=_cut_in_the_middle(one_line(row.prompt)) or EMPTY),
            Cell(text=_cut(one_line(row.reference)) or EMPTY),
            _answer_cell(row.base),
            *(_answer_cell(row.answers.get(name)) for name in names),
        )
        for row in samples.rows
    )
    return PageTable(header=("prompt", "reference", "base", *(one_line(name) for name in names)), rows=rows)


def sample_sentences(samples: SampleTable) -> list[str]:
    """What the table shows, and why a choice is not in it."""
    sentences = []
    if samples.rows:
        rows = _ROWS.get(samples.split, samples.split)
        sentences.append(
            f"The first {rows} of different groups, the same for all trials, answered by the base and by each "
            f"method's chosen setting (lowest seed): {samples.decoding}. “…” marks what is cut off."
        )
    sentences += [f"{name} has no sample answers: {one_line(why)}" for name, why in samples.problems.items()]
    return sentences


def one_line(text: str) -> str:
    """The text with single blanks for white space, and without control and format characters (such as U+202E)."""
    spaced = " ".join(text.split())
    return "".join(char for char in spaced if unicodedata.category(char) not in ("Cc", "Cf", "Cs", "Zl", "Zp"))


def _answer_cell(answer: Answer | None) -> Cell:
    if answer is None:
        return Cell(text=MISSING)
    text = one_line(answer.text)
    if len(text) > MOST_CHARACTERS:
        return Cell(text=_cut(text))
    return Cell(text=(text or EMPTY) if answer.is_complete else f"{text} …".strip())


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 2].rstrip()} …"


def _cut_in_the_middle(text: str) -> str:
    half = MOST_CHARACTERS // 2 - 2
    return text if len(text) <= MOST_CHARACTERS else f"{text[:half].rstrip()} … {text[-half:].lstrip()}"
