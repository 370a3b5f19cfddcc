"""Lets a base and the packs trained on it answer a few fixed prompts, so that readers see what the figures mean."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from loragrid.config.experiment import ModelConfig, SamplesConfig, TaskConfig
from loragrid.data.dataset import TokenizedData
from loragrid.evaluation.generation import NUM_TOKENS_TO_CHECK, Decoding, check_generation, generate
from loragrid.evaluation.questions import TokenizedQuestions
from loragrid.models.loading import load_tokenizer, max_context
from loragrid.models.sharding import is_sharded
from loragrid.tasks.contract import Generation, Question
from loragrid.training.batches import PackBatches
from loragrid.training.chunks import Chunks
from loragrid.training.evaluate import score_in_chunks
from loragrid.training.failure import Failure, is_out_of_memory
from loragrid.training.step import PackModel, SumOverWorkers, one_worker
from loragrid.trials.tags import SAMPLES_PROBLEM_TAG

SAMPLES_FILE = "answers.json"
AT_ONCE_TAG = "loragrid.samples.prompts_at_once"
FEWEST_NEW_TOKENS, MOST_NEW_TOKENS = 16, 64
"""Bounds of the longest answer if neither the experiment nor a task sets one: twice the longest reference."""

TOKENS_PER_TRAINED_TOKEN = 4
"""Answering holds the keys and values of this many tokens at once in less memory than a step needs for one.

A step of LoRA on Llama-3.2-1B keeps 52,600 to 79,648 bytes per token and layer (see `compile_layers`), its cache 2,048;
the cache of a model without shared keys and values of that width would take 8,192.
"""

Answers = Sequence[Sequence[Sequence[int]]]
"""[member][prompt] -> tokens of the answer, without the end token."""


@dataclass(frozen=True, kw_only=True)
class SamplePrompts:
    """The prompts that all trials on the same rows answer, and how they answer them.

    split: `test`, or `eval` if there are no test rows. words: the decoding in words. text: decodes tokens.
    is_kept: whether the task generates answers to these prompts in any case.
    """

    split: str
    questions: tuple[Question, ...]
    decoding: Decoding
    words: str
    text: Callable[[Sequence[int]], str]
    is_kept: bool


def sample_prompts(
    config: SamplesConfig, model: ModelConfig, data: TokenizedData, task: TaskConfig | None
) -> SamplePrompts:
    """The first test rows of different groups (without test rows, evaluation rows); they depend on the rows alone.

    A row without a prompt (plain text, `loss_on: all`) is cut: its first half is the prompt, its second the reference.
    """
    tokenizer, context = load_tokenizer(model), max_context(model)
    rows = TokenizedQuestions(tokenizer, data)
    split = "test" if rows.questions["test"] else "eval"
    groups = (data.test if split == "test" else data.evaluation).groups.tolist()
    questions = _of_different_groups(rows.questions[split], groups, config.num_prompts)
    own = None if task is None else task.generation
    twice = 2 * max(len(question.reference) for question in questions)
    generation = own or Generation(max_new_tokens=min(max(twice, FEWEST_NEW_TOKENS), MOST_NEW_TOKENS))
    limit = config.max_new_tokens or generation.max_new_tokens
    if context is not None:  # at least 1, because every row fits into the context with its reference
        limit = min(limit, context - max(len(question.prompt) for question in questions))
    pad = tokenizer.pad_token_id
    assert pad is not None, "load_tokenizer sets a pad token"
    decoding = Decoding(
        max_new_tokens=limit,
        end_token_ids=rows.end_token_ids(),
        pad_token_id=int(pad),
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=generation.seed,
    )
    how = "greedy" if generation.temperature is None else f"sampled at temperature {generation.temperature:g}"
    return SamplePrompts(
        split=split,
        questions=tuple(questions),
        decoding=decoding,
        words=f"{how}, at most {limit} new tokens",
        text=rows.text,
        is_kept=own is not None,
    )


def _of_different_groups(questions: Sequence[Question], groups: Sequence[int], num: int) -> list[Question]:
    """The first `num` questions with different groups and different prompts; rows of text are cut into halves."""
    if all(len(question.prompt) == 1 for question in questions):
        questions = [_halved(question) for question in questions]
    chosen: list[Question] = []
    taken: set[object] = set()
    for question, group in zip(questions, groups, strict=True):
        if len(chosen) < num and taken.isdisjoint((group, question.prompt)):
            chosen.append(question)
            taken |= {group, question.prompt}
    return chosen


def _halved(question: Question) -> Question:
    tokens = (*question.prompt, *question.reference)
    middle = max(1, len(tokens) // 2)
    return replace(question, prompt=tokens[:middle], reference=tokens[middle:])


@dataclass(frozen=True, kw_only=True)
class MemberAnswers:
    """One trial's answers beside the references and the base's answers, as JSON can hold them."""

    content: Mapping[str, object]

    def write(self, folder: Path) -> None:
        """Write `answers.json` into the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self.content, ensure_ascii=False, indent=2)
        (folder / SAMPLES_FILE).write_text(text + "\n", encoding="utf-8")


class SampleAnswers:
    """Asks one base and the packs trained on it; a model that cannot answer is no failure, but has a `problem`.

    Every replica of the base could answer, but only worker 0 does, because only its answers are written. Workers that
    share a sharded base answer together.
    """

    def __init__(self, prompts: SamplePrompts) -> None:
        self.prompts = prompts
        self.problem = ""
        """Why there are no answers; "" if there are."""
        self._of_base: Sequence[Sequence[int]] | None = None
        self._chunks: Chunks | None = None

    def tags(self) -> dict[str, str]:
        """The problem, and the number of prompts at once if memory did not allow more, as MLflow tags."""
        tags = {} if self._chunks is None else self._chunks.tags
        return tags | ({SAMPLES_PROBLEM_TAG: self.problem} if self.problem else {})

    def ask_base(self, model: PackModel, batches: PackBatches, sum_over_workers: SumOverWorkers) -> None:
        """Keep the bare base's answers, once. A method may write the base: ask before the pack's first step."""
        if self._of_base is not None or self.problem or not _takes_part(model, batches):
            return
        prompt = torch.tensor(self.prompts.questions[0].prompt[:NUM_TOKENS_TO_CHECK], device=model.active.device)

        def ask() -> Answers:
            with model.evaluating(), model.pack.disabled():
                check_generation(model.base, prompt, "samples.num_prompts from 1 on")
            return self._generate(model, batches, sum_over_workers, frozen=True)

        answers = self._attempt(model, ask)
        self._of_base = None if answers is None else answers[0]

    def ask(
        self, model: PackModel, batches: PackBatches, sum_over_workers: SumOverWorkers, kept: Answers | None
    ) -> list[MemberAnswers] | None:
        """Every member's answers; None in a worker that does not answer, and if there is a problem.

        kept: the answers that the task has already generated for these prompts.
        """
        if self.problem or self._of_base is None or not _takes_part(model, batches):
            return None
        answers = kept or self._attempt(model, lambda: self._generate(model, batches, sum_over_workers, frozen=False))
        return None if answers is None else [MemberAnswers(content=self._content(own)) for own in answers]

    def _attempt(self, model: PackModel, ask: Callable[[], Answers]) -> Answers | None:
        """The answers; None if the model fails, with the reason in `problem`."""
        try:
            return ask()
        except Exception as error:  # a model without a cache or with a cache of its own kind raises anything
            if is_sharded(model.base) and is_out_of_memory(error):
                raise  # the other workers may have had enough, and wait
            self.problem = Failure.of(error).reason
        return None

    def _generate(
        self, model: PackModel, batches: PackBatches, sum_over_workers: SumOverWorkers, *, frozen: bool
    ) -> Answers:
        """All members' (or the bare base's) answers, in chunks of prompts that fit in memory."""
        chunks = self._chunks = Chunks(self._at_once(batches), worker=0, num_workers=1, tag=AT_ONCE_TAG)
        together = sum_over_workers if is_sharded(model.base) else one_worker
        questions = self.prompts.questions

        def all_answers() -> Answers:
            answers: list[list[list[int]]] = [[] for _ in range(1 if frozen else model.pack.num_members)]
            for start in chunks.starts(len(questions)):
                part = questions[start : start + chunks.size]
                prompts, keys = [question.prompt for question in part], [question.key for question in part]
                found = generate(model, prompts, keys, self.prompts.decoding, together, frozen=frozen)
                for own, new in zip(answers, found, strict=True):
                    own += new
            return answers

        return score_in_chunks(model, chunks, all_answers)

    def _at_once(self, batches: PackBatches) -> int:
        """The prompts that each member answers at once, in no more memory than a step of the pack needs.

        Without enough memory, a GPU raises an exception, and fewer prompts are tried; on a CPU the process is killed.
        """
        step = batches.scoring.size * batches.data.train.input_ids.shape[1]
        longest = max(len(question.prompt) for question in self.prompts.questions)
        fitting = TOKENS_PER_TRAINED_TOKEN * step // (longest + self.prompts.decoding.max_new_tokens)
        return min(max(1, fitting), len(self.prompts.questions))

    def _content(self, answers: Sequence[Sequence[int]]) -> dict[str, object]:
        prompts, of_base = self.prompts, self._of_base
        assert of_base is not None, "the base was asked"
        return {
            "split": prompts.split,
            "decoding": prompts.words,
            "prompts": [
                {
                    "row": question.key,
                    "prompt": prompts.text(question.prompt),
                    "reference": prompts.text(question.reference),
                    "base": self._answer(base),
                    "answer": self._answer(answer),
                }
                for question, base, answer in zip(prompts.questions, of_base, answers, strict=True)
            ],
        }

    def _answer(self, tokens: Sequence[int]) -> dict[str, object]:
        """An answer's text, and whether the model ended it itself."""
        limit = self.prompts.decoding.max_new_tokens
        return {"text": self.prompts.text(tokens[:limit]), "is_complete": len(tokens) < limit}


def _takes_part(model: PackModel, batches: PackBatches) -> bool:
    return batches.worker == 0 or is_sharded(model.base)
