"""Which rows each member of a pack answers right: by generation, or by the likeliest of all labels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loragrid.config.experiment import ModelConfig
from loragrid.config.task import TaskConfig
from loragrid.data.dataset import TokenizedData, TokenRows, pad_rows
from loragrid.data.labels import IGNORED
from loragrid.data.tokenization import LabelledTokens
from loragrid.evaluation.answers import answer_of
from loragrid.evaluation.generation import Decoding, generate
from loragrid.models.loading import load_tokenizer, max_context
from loragrid.models.sharding import is_sharded
from loragrid.training.batches import PackBatches
from loragrid.training.evaluate import score_in_chunks, score_rows_alone
from loragrid.training.step import PackModel, SumOverWorkers, one_worker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_LABELS = 256
"""More different completions than this are no labels but free text, and every row would be read as often."""

MAX_SHOWN_LABELS = 20


@dataclass(frozen=True, kw_only=True)
class Question:
    """A row of a split as a task sees it: the tokens before its last answer, and that answer's with its end."""

    key: str
    prompt: tuple[int, ...]
    reference: tuple[int, ...]


def task_scorer(task: TaskConfig, model: ModelConfig, data: TokenizedData) -> "TaskScorer":
    """The scorer of a task on tokenized rows; raises ValueError as `TaskScorer`."""
    return TaskScorer(task, load_tokenizer(model), data, max_context(model))


def questions_of(rows: TokenRows) -> list[Question]:
    """The rows' questions. The answer is the last unbroken run of labels: of a chat, the assistant's last turn."""
    questions = []
    for key, ids, positions, targets, num_tokens in zip(
        rows.digests(), rows.input_ids, rows.label_positions, rows.label_targets, rows.num_tokens.tolist(), strict=True
    ):
        tokens = ids.tolist()
        learnt = positions[targets != IGNORED].tolist()
        first = len(learnt) - 1
        while first > 0 and learnt[first - 1] == learnt[first] - 1:
            first -= 1
        start, end = learnt[first] + 1, min(learnt[-1] + 2, num_tokens)
        questions.append(Question(key=key, prompt=tuple(tokens[:start]), reference=tuple(tokens[start:end])))
    return questions


class TaskScorer:
    """Scores packs on the evaluation and the test rows of one experiment.

    Raises:
        ValueError: rows without a prompt, or without an answer that the task finds; labels that are none; prompts that
            leave no room for an answer in the model's context of `context` tokens (None: no limit).
    """

    def __init__(
        self, task: TaskConfig, tokenizer: "PreTrainedTokenizerBase", data: TokenizedData, context: int | None
    ) -> None:
        self.task, self._tokenizer = task, tokenizer
        self.questions = {"eval": questions_of(data.evaluation), "test": questions_of(data.test)}
        for split, questions in self.questions.items():
            if questions and all(len(question.prompt) == 1 for question in questions):
                what = f"the {split} rows have no prompt to answer (rows of text, or loss_on: all)"
                raise ValueError(f"task.kind: {task.kind}: {what}; allowed: rows with a prompt, or no task")
        end = tokenizer.eos_token_id
        self.end_token_ids = tuple(sorted(self._ends_of_references() | (set() if end is None else {int(end)})))
        room = task.max_new_tokens if task.kind == "exact_match" else 0
        if task.kind == "exact_match":
            self._answers = {split: self._reference_answers(split) for split in self.questions}
        else:
            self._labels = self._find_labels(questions_of(data.train))
            room = max(len(tokens) for tokens in self._labels.values())
        self.longest_prompt = max(len(question.prompt) for found in self.questions.values() for question in found)
        """in tokens"""
        self.longest_row = self.longest_prompt + room
        """a prompt and its answer, in tokens"""
        longest = self.longest_prompt
        if context is not None and self.longest_row > context:
            key = f"task.max_new_tokens: {room}" if task.kind == "exact_match" else f"task.kind: {task.kind}"
            what = f"the longest prompt has {longest} tokens, an answer up to {room}, the model's context {context}"
            raise ValueError(f"{key}: {what}; allowed: at most {context - longest}, or a smaller data.max_length")

    def tags(self) -> dict[str, str]:
        """What was done in effect, for the record."""
        ends = ", ".join(f"{self._tokenizer.convert_ids_to_tokens(end)!r}" for end in self.end_token_ids)
        stops = f", ends at {ends or 'no token'}" if self.task.kind == "exact_match" else ""
        return {"loragrid.decoding": f"{self.task.decoding}{stops}"}

    def correct(
        self,
        model: PackModel,
        batches: PackBatches,
        split: str,
        sum_over_workers: SumOverWorkers,
        *,
        frozen: bool = False,
    ) -> Tensor:
        """1 where a member answers a row of the split right, else 0: (M, N) float64; `frozen`: (1, N), the bare base.

        The same in every worker.
        """
        if self.task.kind == "label_likelihood":
            return self._score_labels(model, batches, split, sum_over_workers, frozen)
        # Who holds the whole base generates by itself.
        together = sum_over_workers if is_sharded(model.base) else one_worker
        right = score_in_chunks(
            model, batches.answering, lambda: self._score_generated(model, batches, split, together, frozen)
        )
        sum_over_workers(right)
        return right

    def _score_generated(
        self,
        model: PackModel,
        batches: PackBatches,
        split: str,
        sum_over_workers: SumOverWorkers,
        frozen: bool,
    ) -> Tensor:
        """As `correct`, zero where the row is another worker's; `sum_over_workers` is of those who must go in step."""
        decoding, num_members = self._decoding(), 1 if frozen else model.pack.num_members
        questions, answers = self.questions[split], self._answers[split]
        right = torch.zeros(num_members, len(questions), dtype=torch.float64, device=model.active.device)
        for start in batches.answering.starts(len(questions)):
            # Past the end a worker answers the first row, and nobody hears it, for all must take part.
            numbers = list(range(start, min(start + batches.answering.size, len(questions)))) or [0]
            generated = generate(
                model,
                [questions[number].prompt for number in numbers],
                [questions[number].key for number in numbers],
                decoding,
                sum_over_workers,
                frozen=frozen,
            )
            for member, rows in enumerate(generated):
                for number, tokens in zip(numbers if start < len(questions) else (), rows, strict=False):
                    right[member, number] = float(answer_of(self._text(tokens), self.task) == answers[number])
        return right

    def _score_labels(
        self,
        model: PackModel,
        batches: PackBatches,
        split: str,
        sum_over_workers: SumOverWorkers,
        frozen: bool,
    ) -> Tensor:
        questions, labels = self.questions[split], list(self._labels)
        rows = self._rows_with_labels(questions)
        losses = score_rows_alone(model, batches, rows, sum_over_workers, frozen=frozen)
        if self.task.likelihood == "per_token":
            losses /= (rows.label_targets != IGNORED).sum(1).to(losses.device)
        predicted = losses.view(len(losses), len(questions), len(labels)).argmin(-1)
        own = [labels.index(self._text(question.reference).strip()) for question in questions]
        return (predicted == torch.tensor(own, device=predicted.device)).double()

    def _decoding(self) -> Decoding:
        assert self._tokenizer.pad_token_id is not None, "load_tokenizer sees to a pad token"
        return Decoding(
            max_new_tokens=self.task.max_new_tokens,
            end_token_ids=self.end_token_ids,
            pad_token_id=int(self._tokenizer.pad_token_id),
            temperature=self.task.temperature,
            top_p=1.0 if self.task.top_p is None else self.task.top_p,
            seed=self.task.seed,
        )

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _ends_of_references(self) -> set[int]:
        """The special tokens that the references end with: some chat templates end a turn with one of their own."""
        special = set(self._tokenizer.all_special_ids)
        found: set[int] = set()
        for question in (question for questions in self.questions.values() for question in questions):
            found |= set([token for token in question.reference if token in special][-1:])
        return found

    def _reference_answers(self, split: str) -> list[str]:
        texts = [self._text(question.reference) for question in self.questions[split]]
        answers = [answer_of(text, self.task) for text in texts]
        without = [text for text, answer in zip(texts, answers, strict=True) if answer is None]
        if without:
            key = next((key for key in ("answer_after", "answer_pattern") if getattr(self.task, key)), "normalise")
            what = f"finds no answer in the completions of {len(without)} of {len(texts)} {split} rows"
            allowed = "what every completion holds"
            example = f"such as {without[0].strip()[-60:]!r}"
            raise ValueError(f"task.{key}: {getattr(self.task, key)}: {what}, {example}; allowed: {allowed}")
        return [answer for answer in answers if answer is not None]

    def _find_labels(self, train: Sequence[Question]) -> dict[str, tuple[int, ...]]:
        """Label -> its tokens with their end, as the rows have them; most frequent spelling first, in sorted order."""
        spellings: dict[str, Counter[tuple[int, ...]]] = {}
        for question in (*train, *self.questions["eval"], *self.questions["test"]):
            spellings.setdefault(self._text(question.reference).strip(), Counter())[question.reference] += 1
        found = {label: spellings[label].most_common(1)[0][0] for label in sorted(spellings)}
        if self.task.labels is not None:
            wanted = [label.strip() for label in self.task.labels]
            if unknown := [label for label in wanted if label not in found]:
                shown = _shown(list(found))
                raise ValueError(f"task.labels: {unknown[0]!r}: no row has this completion; allowed: {shown}")
            for split, questions in self.questions.items():
                for question in questions:
                    if (label := self._text(question.reference).strip()) not in wanted:
                        what = f"the completion {label!r} of a row among the {split} rows is none of the labels"
                        raise ValueError(f"task.labels: {what}; allowed: a list of all completions, or null")
            return {label: found[label] for label in wanted}
        if not 2 <= len(found) <= MAX_LABELS:
            what = f"the rows have {len(found)} different completions"
            allowed = f"from 2 to {MAX_LABELS}, task.labels, or kind: exact_match"
            raise ValueError(f"task.kind: label_likelihood: {what}; allowed: {allowed}")
        return found

    def _rows_with_labels(self, questions: Sequence[Question]) -> TokenRows:
        """Every question with every label, question by question: N * K rows, of which the label's tokens count."""
        pairs = [(question.prompt, label) for question in questions for label in self._labels.values()]
        rows = [
            LabelledTokens((*prompt, *label), tuple(range(len(prompt) - 1, len(prompt) + len(label) - 1)))
            for prompt, label in pairs
        ]
        return pad_rows(rows, int(self._tokenizer.pad_token_id or 0))


def _shown(labels: Sequence[str]) -> str:
    more = len(labels) - MAX_SHOWN_LABELS
    text = ", ".join(repr(label) for label in labels[:MAX_SHOWN_LABELS])
    return f"{text} and {more} more" if more > 0 else text
