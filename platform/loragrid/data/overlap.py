"""Counts the evaluation and test rows whose prompt or answer also stands in the train rows."""

from collections.abc import Mapping, Sequence

from loragrid.data.groups import RowTexts


def overlap_with_train(texts: Mapping[str, Sequence[RowTexts]]) -> dict[str, int]:
    """Name of a count -> rows, for the splits `evaluation` and `test` against `train`; texts: split -> its rows' texts.

    A row's own texts are its prompt, its last question and its last answer. They are looked up among the prompts, and
    among all questions and all answers, of the train rows. The names are those of the metrics `data/*_in_train*`.
    """
    prompts = {row.prompt for row in texts["train"]} - {None}
    questions = {question for row in texts["train"] for question in row.questions}
    answers = {answer for row in texts["train"] for answer in row.answers}
    found: dict[str, int] = {}
    for name, rows in (("eval", texts["evaluation"]), ("test", texts["test"])):
        found |= {
            f"{name}_prompts_in_train": sum(row.prompt in prompts for row in rows),
            f"{name}_prompts_in_train_answers": sum(_last_in(row.questions, answers) for row in rows),
            f"{name}_answers_in_train": sum(_last_in(row.answers, answers) for row in rows),
            f"{name}_answers_in_train_prompts": sum(_last_in(row.answers, questions) for row in rows),
        }
    return found


def _last_in(own: Sequence[int], others: set[int]) -> bool:
    return bool(own) and own[-1] in others
