"""The dry run reads and tokenises the rows: it finds what data and tokenizer show, and plans with what is there."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import loragrid as lg
from loragrid.data.files import sources
from loragrid.data.record import trained_figures
from loragrid.models import loading
from loragrid.models.hub import NotOnHubError
from loragrid.planning.dry_run import prepare
from loragrid.planning.plan import plan
from loragrid.planning.row_notes import row_notes
from loragrid.planning.rows import read_rows, said_if_slow
from loragrid.trials.expand import expand

Mapping = dict[str, Any]


def with_section(mapping: Mapping, section: str, **keys: Any) -> lg.Experiment:
    return lg.Experiment(**(mapping | {section: mapping.get(section, {}) | keys}))


def without(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_text("", encoding="utf-8")


def renamed_column(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8").replace('"prompt"', '"promt"'), encoding="utf-8")


def broken_line(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + '{"prompt": "a', encoding="utf-8")


def long_rows(path: Path) -> None:
    path.write_text(json.dumps({"prompt": "a" * 500, "completion": "b"}) + "\n", encoding="utf-8")


@pytest.fixture
def own_rows(valid_experiment: Mapping, tmp_path: Path) -> Path:
    path = tmp_path / "own.jsonl"
    path.write_bytes(Path(valid_experiment["data"]["name"]).read_bytes())
    valid_experiment["data"]["name"] = str(path)
    return path


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (without, "there is no such file"),
        (emptied, "has no rows"),
        (renamed_column, "promt"),
        (broken_line, "line 97"),
        (long_rows, "longer than max_length"),
    ],
)
def test_what_data_show_is_found_as_run_finds_it(
    valid_experiment: Mapping, own_rows: Path, spoil: Callable[[Path], None], message: str
) -> None:
    spoil(own_rows)
    found = []
    for program in (lg.plan, lg.run):
        with pytest.raises(ValueError, match=message) as error:
            program(lg.Experiment(**valid_experiment))
        found.append(str(error.value))
    assert found[0] == found[1]
    assert str(own_rows) in found[0]


@pytest.mark.parametrize(
    ("section", "keys", "message"),
    [
        ("data", {"num_eval": 97}, r"data\.num_eval: 97: .*has only"),
        ("data", {"num_train": 90}, r"data\.num_train: 90: .*has only 88 train rows"),
        ("data", {"max_length": 129}, r"data\.max_length: 129: longer than the context"),
        ("data", {"max_length": 4}, "longer than max_length"),
        ("data", {"group_by": "nowhere"}, r"data\.group_by: nowhere"),
        ("data", {"test_name": "missing.jsonl", "num_test": 1}, "there is no such file"),
        ("data", {"forgetting_name": "missing.txt"}, "there is no such file"),
        ("task", {"kind": "exact_match", "max_new_tokens": 500}, r"task\.max_new_tokens: 500: the longest prompt has"),
        ("training", {"steps": None, "epochs": 1, "warmup_steps": 23}, r"training\.warmup_steps: 23: .*22 steps"),
    ],
)
def test_what_keys_ask_of_the_data_is_found(
    valid_experiment: Mapping, section: str, keys: Mapping, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        lg.plan(with_section(valid_experiment, section, **keys))


def test_a_hub_data_set_without_network_is_refused_like_run(
    valid_experiment: Mapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(*_: object) -> None:
        raise NotOnHubError("the hub cannot be reached")

    monkeypatch.setattr(sources, "resolve_commit", unreachable)
    asked = with_section(valid_experiment, "data", name="nobody/nothing")
    for program in (lg.plan, lg.run):
        with pytest.raises(ValueError, match=r"^data\.name: nobody/nothing: unknown data: .*the hub cannot be reached"):
            program(asked)


def test_tokens_beyond_the_embedding_are_found(valid_experiment: Mapping, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "grown"
    folder.mkdir()
    for file in Path(valid_experiment["model"]["name"]).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["harbour"])  # a word of the rows, of which the base has no embedding
    tokenizer.save_pretrained(folder)
    asked = with_section(valid_experiment, "model", name=str(folder))
    with pytest.raises(ValueError, match=r"model\.name: .*a row holds the token id .*'harbour'"):
        lg.plan(asked)


def test_no_weight_is_read(valid_experiment: Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_base(model: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_base", load_base)
    assert lg.plan(lg.Experiment(**valid_experiment)).rows


def test_the_plan_holds_splits_tokens_and_padding(valid_experiment: Mapping) -> None:
    asked = with_section(valid_experiment, "data", num_test=8)
    the_plan, rows = prepare(asked)
    ((planned),) = the_plan.rows.values()
    (data,) = rows.tokenized.values()
    record = planned.record
    assert record.rows == {"train": 80, "eval": 8, "test": 8}
    assert record.train_tokens == int(data.train.num_tokens.sum())
    assert record.row_length == planned.length == data.train.input_ids.shape[1]
    # One epoch computes every row once, so its padding is that of 80 steps of one row.
    training = asked.training.model_copy(update={"steps": 80, "batch_size": 1})
    assert record.padding_share == pytest.approx((trained_figures(data, training, 0)["data/padding_share"],) * 2)
    written = json.loads(json.dumps(the_plan.to_dict()))["rows"]
    assert [(one["data"], one["rows"], one["lines"]) for one in written] == [
        (asked.data.name, record.rows, record.lines())
    ]
    first, second, *_ = record.lines()
    assert first == "80 rows to train on (83 %), 8 to evaluate (8 %), 8 to test (8 %)"
    assert second.startswith(
        f"{record.train_tokens:,} tokens to train on in an epoch, {record.train_labels:,} of them "
    )
    assert second.endswith(f"rows are padded to {planned.length} tokens: 14 % of the positions are padding")


def test_skipped_rows_are_counted_with_reasons(valid_experiment: Mapping, own_rows: Path) -> None:
    more = [{"prompt": "a" * 200, "completion": "b"}] * 3 + [{"prompt": "Who?", "completion": ""}]
    with own_rows.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in more)
    ((planned),) = lg.plan(lg.Experiment(**valid_experiment)).rows.values()
    (first, *_) = planned.record.lines()
    assert first.endswith("; skipped 1 empty completion, 3 longer than max_length (96 tokens)")


def test_several_data_sets_and_models_are_each_read(
    valid_experiment: Mapping, own_rows: Path, tiny_gpt2_dir: Path, chat_jsonl: Path
) -> None:
    own_rows.write_text("".join(own_rows.open(encoding="utf-8").readlines()[:40]), encoding="utf-8")
    models = [valid_experiment["model"]["name"], str(tiny_gpt2_dir)]
    valid_experiment["grid"] = {"data.name": [str(own_rows), str(chat_jsonl)], "model.name": models}
    valid_experiment["training"] = {"epochs": 1, "batch_size": 8}
    the_plan = lg.plan(lg.Experiment(**valid_experiment))
    num_rows = [rows.num_rows.train for rows in the_plan.rows.values()]
    assert list(zip(num_rows, [trial.training.steps for trial in the_plan.trials], strict=True)) == [
        (32, 4),
        (32, 4),
        (88, 11),
        (88, 11),
    ]


def test_memory_and_mode_follow_from_the_rows_own_length(valid_experiment: Mapping) -> None:
    asked = with_section(valid_experiment, "data", max_length=128)
    the_plan = lg.plan(asked)
    without_rows = plan(asked)
    ((planned),) = the_plan.rows.values()
    assert planned.length < 128
    at_length = plan(with_section(valid_experiment, "data", max_length=planned.length))
    pack = the_plan.packs[0]
    assert the_plan.gpu_memory(pack) == at_length.gpu_memory(at_length.packs[0])
    assert the_plan.gpu_memory(pack) != without_rows.gpu_memory(pack)
    assert the_plan.gpu_engine(pack) == at_length.gpu_engine(at_length.packs[0])


def test_the_next_reading_uses_the_kept_rows(valid_experiment: Mapping, monkeypatch: pytest.MonkeyPatch) -> None:
    trials = expand(lg.Experiment(**valid_experiment))
    (first,) = read_rows(trials).tokenized.values()

    def choose_rows(*_: object) -> None:
        raise AssertionError("rows were tokenised again")

    monkeypatch.setattr("loragrid.data.dataset.choose_rows", choose_rows)
    (again,) = read_rows(trials).tokenized.values()
    assert again.digest == first.digest
    assert torch.equal(again.train.input_ids, first.train.input_ids)


def test_only_a_long_reading_is_announced() -> None:
    said: list[str] = []
    with said_if_slow("quick", said.append, seconds=5.0):
        pass
    with said_if_slow("slow", said.append, seconds=0.01):
        for _ in range(500):
            if said:
                break
            time.sleep(0.01)
    assert said == ["slow"]


@pytest.mark.parametrize(
    ("section", "keys", "note"),
    [
        ("training", {"steps": 21}, "21 steps of 4 rows train on 84 of the 88 train rows of "),
        ("training", {"steps": 22, "batch_size": 89}, "training.batch_size: 89: more than the 88 train rows of "),
        ("confirm", {"seeds": 3}, "data.num_test: 0: the settings that confirm trains again have no test rows"),
    ],
)
def test_what_the_plan_does_with_few_rows_is_noted(
    valid_experiment: Mapping, section: str, keys: Mapping, note: str
) -> None:
    valid_experiment["training"] = {"steps": 22, "batch_size": 4}
    assert row_notes(lg.plan(lg.Experiment(**valid_experiment))) == []
    (found,) = row_notes(lg.plan(with_section(valid_experiment, section, **keys)))
    assert found.startswith(note)
