"""Every finished trial and its base answer the same few prompts, and the answers are those of each one's own model."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM, PreTrainedModel, RwkvConfig, RwkvForCausalLM

from loragrid.config.experiment import EarlyStoppingConfig, EngineConfig, SamplesConfig
from loragrid.data.dataset import TokenizedData
from loragrid.evaluation import generation
from loragrid.evaluation import sample_answers as module
from loragrid.evaluation.kept_answers import KeptAnswers
from loragrid.evaluation.sample_answers import SampleAnswers, sample_prompts
from loragrid.models.loading import load_tokenizer
from loragrid.tasks.contract import TaskConfig
from loragrid.training.assembly import build_batches, build_model
from loragrid.training.step import one_worker
from loragrid.trials.tags import SAMPLES_PROBLEM_TAG
from loragrid.trials.trial import Trial
from tests.support.queue_runs import Seen, queue
from tests.support.small_packs import Run, Setup, make_setup, run_pack
from tests.support.sums_task import EXACT, NUM_TEST, sums

NUM_PROMPTS, NUM_TOKENS, STEPS = 3, 6, 10
WANTED = SamplesConfig(num_prompts=NUM_PROMPTS, max_new_tokens=NUM_TOKENS)


@pytest.fixture(scope="module")
def setup(tiny_gpt2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    rows = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in sums()), encoding="utf-8")
    return make_setup(tiny_gpt2_dir, rows, "float64", num_test=NUM_TEST)


def trials_of(setup: Setup, task: TaskConfig | None = None, **training: Any) -> list[Trial]:
    """One that learns, one that trains nothing, one that writes the base."""
    settings: dict[str, Any] = {"steps": STEPS, "measure_steps": 0, "batch_size": 8} | training
    trials = [
        setup.trial("lora", {"rank": 16}, lr=0.03, **settings),
        setup.trial("frozen", **settings),
        setup.trial("full", lr=0.01, **settings),
    ]
    return [replace(trial, task=task, trial_id=f"{trial.method.name}-{task is None}") for trial in trials]


def contents(seen: Seen, trial: Trial) -> dict[str, Any]:
    file = Path(seen.store.uri) / trial.trial_id / "samples" / "answers.json"
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def seen(setup: Setup) -> tuple[Seen, list[Trial]]:
    trials = trials_of(setup)
    return queue(setup, [trials[:2], trials[2:]], samples=WANTED), trials


def said_by(setup: Setup, base: Any, prompts: list[list[int]]) -> list[str]:
    """What transformers itself generates with a model."""
    tokenizer = load_tokenizer(setup.model)
    texts = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        found = base.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=NUM_TOKENS,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )[0, len(prompt) :]
        texts.append(str(tokenizer.decode(found, skip_special_tokens=True)))
    return texts


def prompts_in(setup: Setup, content: dict[str, Any]) -> list[list[int]]:
    tokenizer = load_tokenizer(setup.model)
    return [list(tokenizer(own["prompt"])["input_ids"]) for own in content["prompts"]]


def test_every_finished_trial_answers_the_same_first_test_rows(setup: Setup, seen: tuple[Seen, list[Trial]]) -> None:
    found = [contents(seen[0], trial) for trial in seen[1]]
    for content in found:
        assert content["split"] == "test"
        assert content["decoding"] == f"greedy, at most {NUM_TOKENS} new tokens"
        assert [own["row"] for own in content["prompts"]] == setup.rows.test.digests()[:NUM_PROMPTS]
        for own in content["prompts"]:
            assert own["reference"] in {row["completion"] for row in sums() if row["prompt"] == own["prompt"]}
    assert all(seen[0].ended[trial.trial_id].seconds["generate"] > 0 for trial in seen[1])


def test_answers_of_base_and_members_equal_transformers(setup: Setup, seen: tuple[Seen, list[Trial]]) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    lora, frozen, full = ([own["answer"]["text"] for own in contents(seen[0], trial)["prompts"]] for trial in seen[1])
    of_base = [[own["base"]["text"] for own in contents(seen[0], trial)["prompts"]] for trial in seen[1]]
    prompts = prompts_in(setup, contents(seen[0], seen[1][0]))
    folders = [Path(seen[0].store.uri) / trial.trial_id / "adapter" for trial in seen[1]]
    expected = said_by(setup, setup.base(), prompts)
    assert of_base == [expected] * 3, "also after a method that writes the base"
    assert frozen == expected
    adapted = PeftModel.from_pretrained(setup.base(), str(folders[0]), autocast_adapter_dtype=False).eval()
    assert lora == said_by(setup, adapted, prompts)
    written = AutoModelForCausalLM.from_pretrained(folders[2], dtype=torch.float64)
    assert full == said_by(setup, written, prompts)
    assert lora != expected
    assert full != expected


def test_samples_change_no_curve_and_can_be_switched_off(setup: Setup, seen: tuple[Seen, list[Trial]]) -> None:
    trials = trials_of(setup)
    without = queue(setup, [trials[:2], trials[2:]], samples=SamplesConfig(num_prompts=0))
    assert not list(Path(without.store.uri).glob("*/samples"))
    for trial in trials:
        assert without.records(trial) == seen[0].records(trial)
        assert "generate" not in without.ended[trial.trial_id].seconds


@pytest.mark.parametrize("num_test", [NUM_TEST, 0], ids=["test rows", "evaluation rows"])
def test_a_task_that_generates_is_not_asked_twice(setup: Setup, monkeypatch: pytest.MonkeyPatch, num_test: int) -> None:
    rows = (
        setup.rows
        if num_test
        else replace(setup.rows, test=setup.rows.test.select(torch.tensor([], dtype=torch.int64)))
    )
    setup = replace(setup, rows=rows)
    trials = trials_of(setup, EXACT)[:2]
    asked: list[bool] = []
    generate = generation.generate

    def counting(*arguments: Any, frozen: bool) -> Any:
        asked.append(frozen)
        return generate(*arguments, frozen=frozen)

    monkeypatch.setattr(module, "generate", counting)
    seen = queue(setup, [trials], samples=SamplesConfig(num_prompts=NUM_PROMPTS))
    assert asked == [True], "the base alone"
    kept = contents(seen, trials[0])
    assert kept["split"] == ("test" if num_test else "eval")
    plain = [replace(trial, task=None) for trial in trials]
    limit = SamplesConfig(num_prompts=NUM_PROMPTS, max_new_tokens=EXACT.max_new_tokens)
    again = queue(setup, [plain], samples=limit)
    assert contents(again, plain[0]) == kept


def test_workers_complete_each_others_kept_answers() -> None:
    def share_of(worker: int) -> KeptAnswers:
        kept = KeptAnswers(keys=("a", "b"))
        kept.begin(2, 3, torch.device("cpu"))
        for member in range(2):
            kept.add(member, "ab"[worker], [7 + member, 0] if worker else [])
            kept.add(member, "c", [1])
        return kept

    first, second = share_of(0), share_of(1)
    assert first.answers() is None, "half of them is missing"
    other = second.tokens
    assert other is not None
    first.share(lambda tensor: tensor.add_(other))
    assert first.answers() == [[[], [7, 0]], [[], [8, 0]]]


def test_rows_of_one_group_or_prompt_are_shown_once(setup: Setup) -> None:
    order = torch.tensor([2, 2, 0, 2, 1, 0, 3])
    test = setup.rows.test.select(order)
    digests = setup.rows.test.digests()
    for groups, expected in ((test.groups, (2, 0, 1, 3)), (torch.tensor([5, 6, 7, 8, 7, 9, 10]), (2, 0, 3))):
        data: TokenizedData = replace(setup.rows, test=replace(test, groups=groups))
        found = sample_prompts(SamplesConfig(num_prompts=9), setup.model, data, None)
        assert [question.key for question in found.questions] == [digests[index] for index in expected]


def test_text_is_continued_from_its_first_half(tiny_gpt2_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("".join(json.dumps({"text": f"Line {n}: the market has a door."}) + "\n" for n in range(30)))
    setup = make_setup(tiny_gpt2_dir, file, "float64", num_eval=4)
    found = sample_prompts(WANTED, setup.model, setup.rows, None)
    assert found.split == "eval"
    for question, ids, length in zip(
        found.questions, setup.rows.evaluation.input_ids, setup.rows.evaluation.num_tokens.tolist(), strict=False
    ):
        assert [*question.prompt, *question.reference] == ids[:length].tolist()
        assert len(question.prompt) == length // 2


def test_a_short_context_and_references_limit_the_answers(setup: Setup) -> None:
    def limit_of(wanted: int | None, data: TokenizedData = setup.rows) -> int:
        config = SamplesConfig(num_prompts=NUM_PROMPTS, max_new_tokens=wanted)
        return sample_prompts(config, setup.model, data, None).decoding.max_new_tokens

    longest = sample_prompts(WANTED, setup.model, setup.rows, None)
    references = max(len(question.reference) for question in longest.questions)
    assert 16 < 2 * references < 64
    assert limit_of(None) == 2 * references
    assert limit_of(5) == 5
    assert limit_of(1000) == 128 - max(len(question.prompt) for question in longest.questions)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (lambda: RwkvForCausalLM(RwkvConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)), "padding in front"),
        (
            lambda: MambaForCausalLM(MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2)),
            "a cache of the prompt",
        ),
    ],
    ids=["rwkv", "mamba"],
)
def test_a_model_that_cannot_answer_is_no_failure(
    setup: Setup, tiny_gpt2_dir: Path, tmp_path: Path, model: Callable[[], PreTrainedModel], why: str
) -> None:
    folder = Path(shutil.copytree(tiny_gpt2_dir, tmp_path / "model"))
    (folder / "model.safetensors").unlink()
    model().save_pretrained(folder)
    other = make_setup(folder, Path(setup.data.name), "float32", num_test=NUM_TEST)
    trials = [other.trial("full", steps=2, lr=1e-4, measure_steps=0)]
    seen = queue(other, [trials], samples=WANTED)
    assert seen.ended[trials[0].trial_id].status == "FINISHED", seen.ended
    assert why in seen.tags(trials[0])[SAMPLES_PROBLEM_TAG]
    assert not list(Path(seen.store.uri).glob("*/samples"))


def test_trials_stopped_at_a_rung_answer_no_samples(setup: Setup) -> None:
    trials = trials_of(setup)[:2]
    seen = queue(
        setup, [trials], EarlyStoppingConfig(grace_steps=4, reduction_factor=2, within="sweep"), samples=WANTED
    )
    finished = [trial for trial in trials if seen.ended[trial.trial_id].status == "FINISHED"]
    assert len(finished) == 1
    assert {path.parent.name for path in Path(seen.store.uri).glob("*/samples")} == {finished[0].trial_id}


def test_answers_do_not_depend_on_how_many_are_asked_at_once(setup: Setup, trained: Run) -> None:
    trials = trials_of(setup)[:2]
    answers = []
    for rows in (8, 1):
        small = [replace(t, training=t.training.model_copy(update={"micro_batch_size": rows})) for t in trials]
        batches = build_batches(small, setup.rows, trained.model.base.device)
        samples = SampleAnswers(sample_prompts(SamplesConfig(max_new_tokens=60), setup.model, setup.rows, None))
        samples.ask_base(trained.model, batches, one_worker)
        found = samples.ask(trained.model, batches, one_worker, None)
        assert found is not None
        assert samples._at_once(batches) == (5 if rows == 8 else 1)
        answers.append([own.content for own in found])
    assert answers[0] == answers[1]


@pytest.fixture(scope="module")
def trained(setup: Setup) -> Run:
    return run_pack(setup, trials_of(setup)[:2])


def test_only_the_first_of_several_replicas_answers(setup: Setup) -> None:
    trials = trials_of(setup)[:2]
    model = build_model(trials, setup.base())
    batches = build_batches(trials, setup.rows, model.base.device, worker=1, num_workers=2)
    samples = SampleAnswers(sample_prompts(WANTED, setup.model, setup.rows, None))
    samples.ask_base(model, batches, one_worker)
    assert samples.ask(model, batches, one_worker, None) is None
    assert samples.tags() == {}


@pytest.mark.heavy
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: only there are steps captured or compiled")
@pytest.mark.parametrize("mode", ["graph", "compiled"])
def test_captured_and_compiled_packs_answer_as_eager_ones(
    tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path, mode: Literal["graph", "compiled"]
) -> None:
    (tmp_path / "plain.txt").write_text("The old bridge stands near the market. " * 20, encoding="utf-8")
    keys: dict[str, Any] = {"num_test": NUM_TEST, "forgetting_name": str(tmp_path / "plain.txt")}
    setup = make_setup(tiny_llama_dir, chat_jsonl, "float32", **keys)
    trials = trials_of(setup, steps=20, eval_every=5)
    seen = {}
    for engine in ("eager", mode):
        config = EngineConfig(mode=engine)
        seen[engine] = queue(setup, [trials[:2], trials[2:]], device="cuda", engine=config, samples=WANTED)
    for trial in trials:
        assert seen[mode].tags(trial)["loragrid.engine"] == mode
        assert SAMPLES_PROBLEM_TAG not in seen[mode].tags(trial)
        ours, theirs = (contents(seen[engine], trial)["prompts"] for engine in (mode, "eager"))
        assert [own["base"] for own in ours] == [own["base"] for own in theirs]
        same = [own["answer"] == other["answer"] for own, other in zip(ours, theirs, strict=True)]
        assert sum(same) >= NUM_PROMPTS - 1, "compiled kernels round differently"
        held_out = [
            {step: record["forgetting/loss"] for step, record in seen[engine].records(trial).items() if step % 5 == 0}
            for engine in (mode, "eager")
        ]
        assert sorted(held_out[0]) == [0, 5, 10, 15, 20]
        assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)
