"""The `task:` section is read, refused if it is impossible, and is part of a trial's identity."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from loragrid.config.experiment import DataConfig, ExperimentError, ModelConfig
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.evaluation.questions import questions_of
from loragrid.evaluation.task_scorer import TaskScorer
from loragrid.models.loading import load_tokenizer
from loragrid.tasks.discovery import read_task
from loragrid.tasks.kinds.exact_match import ExactMatch
from loragrid.trials.expand import expand
from loragrid.trials.load import experiment_from_mapping
from loragrid.trials.packing import sharing_key

PAIRS = [{"prompt": f"Is {number} even?", "completion": " no" if number % 2 else " yes"} for number in range(20)]
EXPERIMENT: dict[str, Any] = {
    "name": "small",
    "model": {"name": "some-model"},
    "data": {"name": "some-data"},
    "training": {"steps": 20},
    "methods": ["lora"],
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def model(tiny_llama_dir: Path) -> ModelConfig:
    return ModelConfig(name=str(tiny_llama_dir))


@pytest.fixture
def tokenizer(model: ModelConfig) -> PreTrainedTokenizerBase:
    return load_tokenizer(model)


@pytest.fixture
def load(tmp_path: Path, model: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Any:
    def load_rows(rows: Sequence[object], **keys: Any) -> TokenizedData:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        data = DataConfig.model_validate({"name": str(path), "max_length": 100, "num_eval": 6, "num_test": 4} | keys)
        return load_data(data, model, tokenizer)

    return load_rows


def with_task(task: Mapping[str, Any] | None, **sections: Any) -> Any:
    return experiment_from_mapping(EXPERIMENT | {"task": task} | sections, source="small.yaml")


def exact(**fields: Any) -> ExactMatch:
    return ExactMatch.model_validate(fields)


@pytest.mark.parametrize(
    ("fields", "text", "answer"),
    [
        ({"answer_after": "####"}, "2 + 2 = 4\n#### 4 apples\nyes", "4 apples"),
        ({"answer_after": "####"}, "#### 1\n#### 2", "2"),
        ({"answer_after": "####", "answer_at": "first"}, "#### 1\n#### 2", "1"),
        ({"answer_after": "####"}, "no answer 4", None),
        ({"answer_after": "####"}, "it ends here ####", None),
        ({"answer_after": "####", "normalise": "number"}, "#### $1,250.50.", "1250.5"),
        ({"answer_after": "####", "normalise": "number"}, "#### 1250.5", "1250.5"),
        ({"answer_after": "####", "normalise": "number"}, "#### -007", "-7"),
        ({"answer_after": "####", "normalise": "number"}, "#### -$3", "-3"),
        ({"answer_after": "####", "normalise": "number"}, "#### -0.0", "0"),
        ({"answer_after": "####", "normalise": "number"}, "#### 100", "100"),
        ({"answer_after": "####", "normalise": "number"}, "#### many", None),
        ({"answer_pattern": r"\b([A-D])\b"}, "A or B, so C.", "C"),
        ({"answer_pattern": r"\b([A-D])\b", "answer_at": "first"}, "A or B, so C.", "A"),
        ({"answer_pattern": r"(?:is|are) (\d+)|nothing"}, "nothing is 3, nothing", "3"),
        ({"answer_pattern": r"is (\d+)"}, "none", None),
        ({}, "  two   words\n", "two words"),
        ({}, "Two Words", "Two Words"),
        ({}, " \n", None),
        ({"normalise": "number"}, "about 3 or 4", "3"),
    ],
)
def test_an_answer_is_found_and_written_as_it_is_compared(fields: dict[str, Any], text: str, answer: str) -> None:
    assert exact(**fields).answer_of(text) == answer


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ({}, ["task.kind: is missing", "exact_match, label_likelihood"]),
        ({"kind": "bleu"}, ['task.kind: "bleu"', "exact_match, label_likelihood"]),
        ({"kind": "exact_match", "answer_afer": "#"}, ["task.answer_afer", "did you mean 'answer_after'"]),
        ({"kind": "exact_match", "answer_pattern": "(a"}, ["task.answer_pattern", "is not a valid regular expression"]),
        ({"kind": "exact_match", "answer_pattern": "a"}, ["task.answer_pattern", "has 0 groups"]),
        ({"kind": "exact_match", "answer_pattern": "(a)(b)"}, ["task.answer_pattern", "has 2 groups"]),
        ({"kind": "exact_match", "answer_pattern": "(a)", "answer_after": "#"}, ["one of the two"]),
        ({"kind": "exact_match", "answer_at": "first"}, ["task.answer_at", "answer_after or answer_pattern set"]),
        ({"kind": "exact_match", "max_new_tokens": 0}, ["task.max_new_tokens: 0", "from 1 to"]),
        ({"kind": "exact_match", "max_new_tokens": 10**9}, ["task.max_new_tokens: 1000000000", "from 1 to"]),
        ({"kind": "exact_match", "temperature": 0}, ["task.temperature: 0", "above 0, or null"]),
        ({"kind": "exact_match", "top_p": 0.9}, ["task.top_p: 0.9", "greedy", "temperature set"]),
        ({"kind": "exact_match", "seed": 3}, ["task.seed: 3", "greedy"]),
        ({"kind": "exact_match", "temperature": 1, "top_p": 1.5}, ["task.top_p: 1.5", "up to 1"]),
        ({"kind": "exact_match", "labels": ["a", "b"]}, ["task.labels", "belongs to kind: label_likelihood"]),
        ({"kind": "label_likelihood", "labels": ["a", "a "]}, ["task.labels", "occurs twice"]),
        ({"kind": "label_likelihood", "labels": ["a"]}, ["task.labels", "at least two"]),
        ({"kind": "label_likelihood", "max_new_tokens": 8}, ["task.max_new_tokens: 8", "belongs to kind: exact_match"]),
    ],
)
def test_an_impossible_task_is_refused_with_key_and_remedy(task: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ExperimentError) as caught:
        with_task(task)
    for part in ["small.yaml: ", *parts]:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("sections", "key"),
    [
        ({"data": {"name": "d", "loss_on": "all"}}, "data.loss_on"),
        ({"grid": {"data.loss_on": ["completion", "all"]}}, "data.loss_on"),
        ({"data": {"name": "d", "columns": {"text": "body"}}}, "data.columns"),
    ],
)
def test_a_task_without_prompts_is_refused_in_the_file(sections: dict[str, Any], key: str) -> None:
    with pytest.raises(ExperimentError, match=rf"{key}: .*no task"):
        with_task({"kind": "exact_match"}, **sections)
    with_task(None, **sections)


def test_the_task_but_not_its_schedule_identifies_a_trial() -> None:
    def trial(task: Mapping[str, Any] | None) -> Any:
        (only,) = expand(with_task(task))
        return only

    plain = {"kind": "exact_match", "answer_after": "####"}
    ids = {
        trial(task).trial_id
        for task in (None, plain, plain | {"max_new_tokens": 7}, plain | {"temperature": 1}, {"kind": "exact_match"})
    }
    assert len(ids) == 5
    assert trial(plain | {"every": 5}).trial_id == trial(plain | {"base": False}).trial_id == trial(plain).trial_id
    assert sharing_key(trial(plain)) != sharing_key(trial(plain | {"every": 5}))
    assert sharing_key(trial(plain)) == sharing_key(trial(plain))


@pytest.mark.parametrize(
    ("task", "trial_id"),
    [
        ({"kind": "exact_match", "answer_after": "####", "normalise": "number"}, "lora-67faa5c2"),
        ({"kind": "exact_match", "temperature": 0.7, "top_p": 0.9, "seed": 3, "every": 5}, "lora-755516ba"),
        ({"kind": "label_likelihood"}, "lora-5684b78d"),
        ({"kind": "label_likelihood", "labels": ["yes", "no"], "likelihood": "per_token"}, "lora-dcf35ab2"),
    ],
)
def test_ids_from_before_kinds_had_own_keys_stay(task: dict[str, Any], trial_id: str) -> None:
    (trial,) = expand(with_task(task))
    assert trial.trial_id == trial_id


def test_a_dump_from_before_kinds_had_own_keys_loads() -> None:
    foreign = {"answer_after": None, "answer_at": "last", "max_new_tokens": 256, "seed": 0, "temperature": None}
    assert with_task({"kind": "label_likelihood"} | foreign) == with_task({"kind": "label_likelihood"})
    with pytest.raises(ExperimentError, match=r"task\.seed: 1: belongs to kind: exact_match"):
        with_task({"kind": "label_likelihood"} | foreign | {"seed": 1})


def test_the_decoding_in_effect_is_a_part_of_the_record() -> None:
    (greedy,) = expand(with_task({"kind": "exact_match", "answer_after": "####"}))
    recorded = {key: value for key, value in greedy.parameters().items() if key.startswith("task.")}
    assert recorded["task.temperature"] is None
    assert recorded["task.max_new_tokens"] == 256
    assert "task.labels" not in recorded
    assert greedy.task is not None
    assert greedy.task.decoding == "greedy, at most 256 new tokens"
    assert exact(temperature=0.7, seed=3).decoding == (
        "sampled at temperature 0.7, top_p 1, seed 3, at most 256 new tokens"
    )
    (none,) = expand(with_task(None))
    assert not any(key.startswith("task.") for key in none.parameters())


def test_an_experiment_with_a_task_survives_a_round_trip() -> None:
    for task in ({"kind": "exact_match"}, {"kind": "label_likelihood", "labels": ["a", "b"]}):
        experiment = with_task(task)
        assert experiment_from_mapping(experiment.model_dump(), source="dump") == experiment


def test_the_prompt_is_what_precedes_the_completion(load: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    data = load(PAIRS)
    for question in questions_of(data.evaluation):
        prompt, reference = (
            str(tokenizer.decode(list(question.prompt))),
            str(tokenizer.decode(list(question.reference))),
        )
        number = int(prompt.removeprefix("Is ").removesuffix(" even?"))
        assert reference == PAIRS[number]["completion"] + "<|end|>"
        assert question.prompt == tuple(tokenizer(prompt)["input_ids"])
    assert [question.key for question in questions_of(data.test)] == data.test.digests()


def test_a_chats_question_ends_before_the_last_assistant_turn(load: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    roles = ("user", "assistant", "user", "assistant")
    turns = [
        [{"role": role, "content": f"{role} {turn} {row}"} for turn, role in enumerate(roles)] for row in range(12)
    ]
    data = load([{"messages": messages} for messages in turns])
    by_row = {str(tokenizer.decode(list(question.prompt))): question for question in questions_of(data.evaluation)}
    rendered = {
        tokenizer.apply_chat_template(messages[:3], tokenize=False, add_generation_prompt=True): messages
        for messages in turns
    }
    assert len(by_row) == 6
    for prompt, question in by_row.items():
        assert tokenizer.decode(list(question.reference)) == rendered[prompt][3]["content"] + "<|end|>"
        assert list(question.prompt) == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    ("rows", "keys", "task", "context", "message"),
    [
        ([{"text": f"text {n}"} for n in range(12)], {}, {"kind": "exact_match"}, None, "eval rows have no prompt"),
        (PAIRS, {"loss_on": "all"}, {"kind": "exact_match"}, None, "eval rows have no prompt"),
        (
            PAIRS,
            {},
            {"kind": "exact_match", "answer_after": "####"},
            None,
            r"task\.answer_after: ####: finds no answer in the completions of 6 of 6 eval rows, such as '(yes|no)'",
        ),
        (
            PAIRS,
            {},
            {"kind": "exact_match", "normalise": "number"},
            None,
            r"task\.normalise: number: finds no answer",
        ),
        (
            PAIRS,
            {},
            {"kind": "exact_match", "max_new_tokens": 100},
            105,
            r"task\.max_new_tokens: 100: the longest prompt has (\d+) tokens, .*context 105; allowed: at most",
        ),
        (
            [{"prompt": f"word {n}", "completion": f" answer {n}"} for n in range(300)],
            {},
            {"kind": "label_likelihood"},
            None,
            r"300 different completions; allowed: from 2 to 256, task\.labels, or a kind that generates answers",
        ),
        (
            PAIRS,
            {},
            {"kind": "label_likelihood", "labels": ["yes", "maybe"]},
            None,
            r"task\.labels: 'maybe': no row has this completion; allowed: 'no', 'yes'",
        ),
        (
            [*PAIRS, *({"prompt": f"Or {n}?", "completion": " perhaps"} for n in range(20))],
            {},
            {"kind": "label_likelihood", "labels": ["yes", "no"]},
            None,
            r"the completion 'perhaps' of a row among the (eval|test) rows is none of the labels",
        ),
        (PAIRS, {}, {"kind": "label_likelihood"}, 8, r"task\.kind: label_likelihood: the longest prompt has"),
    ],
)
def test_unscorable_rows_are_refused_with_key_and_remedy(
    load: Any,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Any],
    keys: dict[str, Any],
    task: dict[str, Any],
    context: int | None,
    message: str,
) -> None:
    data = load(rows, **keys)
    with pytest.raises(ValueError, match=message):
        TaskScorer(read_task(task), tokenizer, data, context)


def test_an_answer_ends_at_the_references_end_token_too(load: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    assert TaskScorer(exact(), tokenizer, load(PAIRS), None).end_token_ids == (tokenizer.eos_token_id,)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|turn|>"]})
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<|turn|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chats = [
        {"messages": [{"role": "user", "content": f"hi {n}"}, {"role": "assistant", "content": f"ho {n}"}]}
        for n in range(12)
    ]
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    scorer = TaskScorer(exact(), tokenizer, load(chats), None)
    assert set(scorer.end_token_ids) == {tokenizer.eos_token_id, turn}
    assert scorer.tags()["loragrid.decoding"] == "greedy, at most 256 new tokens, ends at '<|end|>', '<|turn|>'"
