"""exact_match: a generated answer is right if it equals the answer in the row's completion."""

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from loragrid.schema.errors import Problem
from loragrid.schema.fields import Allowed, OptionalText
from loragrid.tasks.contract import ACCURACY, Figure, Members, Rows, Scorer
from loragrid.tasks.generation import GeneratingTask

if TYPE_CHECKING:
    from torch import Tensor

NUMBER = re.compile(r"-?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")


class ExactMatch(GeneratingTask):
    """The prompt is answered by generation; an answer is right if it equals the answer in the row's completion.

    The answer is the rest of the line after `answer_after`, or the group of `answer_pattern`; without either it is the
    whole text.
    """

    figures: ClassVar[tuple[Figure, ...]] = (ACCURACY,)
    former_keys: ClassVar[Mapping[str, object]] = {"labels": None, "likelihood": "summed"}

    kind: Literal["exact_match"] = Field(
        default="exact_match",
        description="A generated answer is right if it equals the answer in the completion.",
        examples=["exact_match"],
    )
    answer_after: OptionalText = Field(
        default=None, description="Text before the answer; the answer is the rest of that line.", examples=["####"]
    )
    answer_pattern: OptionalText = Field(
        default=None,
        description="Regular expression whose one group is the answer.",
        examples=[r"answer is \(([A-D])\)"],
    )
    answer_at: Annotated[Literal["last", "first"], Allowed("last, first")] = Field(
        default="last", description="Which match of `answer_after` or `answer_pattern` counts.", examples=["first"]
    )
    normalise: Annotated[Literal["text", "number"], Allowed("text, number")] = Field(
        default="text",
        description="How answers are compared: text without outer and repeated blanks, or the value of the first "
        "number, without commas.",
        examples=["number"],
    )

    def answer_problems(self) -> Iterator[Problem]:
        """As `GeneratingTask`."""
        if self.answer_after is not None and self.answer_pattern is not None:
            what = f"the answer is already what follows answer_after ({self.answer_after})"
            yield Problem(key="answer_pattern", value=self.answer_pattern, what=what, allowed="one of the two")
        if self.answer_pattern is not None:
            key, value, allowed = "answer_pattern", self.answer_pattern, "a regular expression with one group"
            try:
                num_groups = re.compile(self.answer_pattern).groups
            except (re.error, RecursionError, OverflowError) as error:
                yield Problem(key=key, value=value, what=f"is not a valid regular expression: {error}", allowed=allowed)
                return
            if num_groups != 1:
                what = f"has {num_groups} groups, but exactly one must hold the answer"
                yield Problem(key=key, value=value, what=what, allowed=f"{allowed}; (?:...) is no group")
        if self.is_changed("answer_at") and self.answer_after is None and self.answer_pattern is None:
            what = "the whole text is the answer, so there is no first or last match"
            yield Problem(
                key="answer_at", value=self.answer_at, what=what, allowed="answer_after or answer_pattern set"
            )

    def scorer(self, rows: Rows) -> "ExactMatchScorer":
        """As `TaskConfig`."""
        return ExactMatchScorer(self, rows)

    def answer_of(self, text: str) -> str | None:
        """The answer in the text, in the form in which answers are compared; None if there is none."""
        found = self._find(text)
        return None if found is None else self._normalised(found)

    def _find(self, text: str) -> str | None:
        if self.answer_after is not None:
            places = text.split(self.answer_after)[1:]
            if not places:
                return None
            place = places[-1 if self.answer_at == "last" else 0]
            return (place.strip().splitlines() or [""])[0]
        if self.answer_pattern is not None:
            matches = [match for match in re.finditer(self.answer_pattern, text) if match.group(1) is not None]
            return matches[-1 if self.answer_at == "last" else 0].group(1) if matches else None
        return text

    def _normalised(self, answer: str) -> str | None:
        """The first number's value (1,250.50 -> 1250.5), or the words with single blanks; None if there is none."""
        if self.normalise == "text":
            return " ".join(answer.split()) or None
        number = NUMBER.search(answer.replace("$", ""))
        return None if number is None else f"{Decimal(number.group().replace(',', '')).normalize() + 0:f}"


class ExactMatchScorer(Scorer):
    """Compares generated answers with the references' answers.

    Raises:
        ValueError: completions in which the task finds no answer.
    """

    def __init__(self, task: ExactMatch, rows: Rows) -> None:
        self._task, self._questions = task, rows.questions
        self.answer_tokens = task.max_new_tokens
        self._answers = {split: self._reference_answers(rows, split) for split in rows.questions}

    def score(self, members: Members, split: str) -> "Mapping[str, Tensor]":
        """As `Scorer`: the column `correct` holds 1 for a right answer, otherwise 0."""
        answers = self._answers[split]

        def score(number: int, text: str) -> Mapping[str, float]:
            return {"correct": float(self._task.answer_of(text) == answers[number])}

        return members.generate(self._questions[split], self._task.generation, score, ("correct",))

    def _reference_answers(self, rows: Rows, split: str) -> list[str]:
        texts = [rows.text(question.reference) for question in rows.questions[split]]
        answers = [self._task.answer_of(text) for text in texts]
        without = [text for text, answer in zip(texts, answers, strict=True) if answer is None]
        if without:
            key = next((key for key in ("answer_after", "answer_pattern") if getattr(self._task, key)), "normalise")
            what = f"finds no answer in the completions of {len(without)} of {len(texts)} {split} rows"
            allowed = "what every completion holds"
            example = f"such as {without[0].strip()[-60:]!r}"
            raise ValueError(f"task.{key}: {getattr(self._task, key)}: {what}, {example}; allowed: {allowed}")
        return [answer for answer in answers if answer is not None]
