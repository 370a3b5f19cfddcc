"""What a sweep recorded about its rows, in figures and in sentences."""

import json
from typing import Any

import pandas as pd
import pytest

from loragrid.comparison.data_record import DataRecord, data_record_of, data_records_of
from loragrid.comparison.table import Comparison
from loragrid.trials.row_notes import ROW_NOTES
from tests.support.comparisons import made_up_comparison

FIGURES: dict[str, float] = {
    "data/train_rows": 6000,
    "data/eval_rows": 64,
    "data/test_rows": 256,
    "data/train_groups": 5000,
    "data/eval_groups": 64,
    "data/test_groups": 151,
    "data/skipped_rows": 1204,
    "data/skipped_share": 1204 / 7524,
    "data/kept_apart_rows": 22,
    "data/test_prompts_in_train": 0,
    "data/test_answers_in_train_prompts": 26,
    "data/test_answers_in_train": 25,
    "data/train_tokens": 90_000,
    "data/train_labels": 40_000,
    "data/padding_share": 0.4,
}
LEFT_OUT = {"longer than max_length": 1200, "empty prompt": 4, "in the group of a test row": 22}


def recorded(figures: dict[str, Any], left_out: dict[str, int], **fields: Any) -> Comparison:
    rows = [{"method": "lora", "seed": seed, **figures, "data/trained_tokens": 500 + seed} for seed in (0, 1)]
    tags = {f"lora-{index}": {"loragrid.data.left_out": json.dumps(left_out)} for index in (0, 1)}
    parameters = {"data.max_length": "320"}
    return made_up_comparison(rows, {"seed": "seed"}, tags=tags, sweep_parameters=parameters, **fields)


def test_the_record_holds_what_the_trials_recorded() -> None:
    record = data_record_of(recorded(FIGURES, LEFT_OUT))
    assert record is not None
    assert record.rows == {"train": 6000, "eval": 64, "test": 256}
    assert record.groups == {"train": 5000, "eval": 64, "test": 151}
    assert record.skipped == {"longer than max_length": 1200, "empty prompt": 4}
    assert record.kept_apart == {"in the group of a test row": 22}
    assert record.overlap["test_answers_in_train_prompts"] == 26
    assert (record.trained_tokens, record.padding_share) == ((500, 501), (0.4, 0.4))
    assert json.loads(json.dumps(record.to_dict()))["train_tokens"] == 90_000


def test_sentences_say_what_was_left_out_and_shared() -> None:
    record = data_record_of(recorded(FIGURES, LEFT_OUT))
    assert record is not None
    assert record.sentences() == [
        "16 % of the rows read were left out: 1,200 longer than max_length (320 tokens), 4 empty prompt.",
        "The verdict speaks of the rows that remain.",
        "The 256 test rows form 151 groups.",
        "22 usable rows belong to no split, because the evaluation or test rows hold the same row or others of its "
        "group.",
        "Of the 256 test rows, 25 have an answer that is an answer in train and 26 have an answer that is a question "
        "in train.",
    ]


def test_what_was_noticed_about_used_rows_is_said() -> None:
    noted = {"data/noted_boundary_moved": 1200, "data/noted_end_not_doubled": 0, "data/noted_of_a_later_version": 4}
    record = data_record_of(recorded(FIGURES | noted, {}))
    assert record is not None
    assert record.note_sentences() == [
        f"Noticed about 1,200 of the 6,320 rows used: they {ROW_NOTES['boundary_moved']}."
    ]
    assert record.note_sentences()[0] in record.sentences()
    before = data_record_of(recorded(FIGURES, {}))
    assert before is not None
    assert before.note_sentences() == []


def test_one_row_has_and_several_have() -> None:
    one = FIGURES | {"data/eval_prompts_in_train": 1, "data/eval_answers_in_train": 2}
    sentence = DataRecord.of(one, {}).overlap_sentences()[0]
    assert sentence == (
        "Of the 64 evaluation rows, 1 has a prompt of a train row and 2 have an answer that is an answer in train."
    )


@pytest.mark.parametrize(("share", "is_partial"), [(0.05, False), (0.051, True)])
def test_few_skipped_rows_limit_no_claim(share: float, is_partial: bool) -> None:
    record = DataRecord.of(FIGURES | {"data/skipped_share": share}, LEFT_OUT)
    assert record.is_partial == is_partial
    assert ("The verdict speaks of the rows that remain." in record.sentences()) == is_partial
    assert record.sentences()[0].startswith("5 % of the rows read were left out: 1,200 longer than max_length, ")


def test_nothing_left_out_needs_no_sentence() -> None:
    clean = {"data/skipped_share": 0, "data/skipped_rows": 0, "data/test_groups": 256}
    figures = {key: value for key, value in FIGURES.items() if "_in_train" not in key}
    assert DataRecord.of(figures | clean, {}).sentences() == []


def test_an_old_record_has_no_record_of_rows() -> None:
    old = made_up_comparison([{"method": "lora", "seed": 0}], {"seed": "seed"})
    assert data_record_of(old) is None
    assert data_records_of(old) == {}
    mixed = recorded(FIGURES | {"data/train_rows": None}, {})
    assert data_record_of(mixed) is None


def test_every_data_set_has_its_own_record() -> None:
    one, two = recorded(FIGURES, LEFT_OUT), recorded(FIGURES | {"data/train_rows": 10}, {})
    table = pd.concat([one.table.assign(max_length=64), two.table.assign(max_length=128, trial_id=["a", "b"])])
    both = recorded(FIGURES, LEFT_OUT).__class__(
        **{
            **vars(one),
            "table": table,
            "axes": {"seed": "seed", "max_length": "data.max_length"},
            "sweep_parameters": {},
        }
    )
    records = data_records_of(both)
    assert {label: record.rows["train"] for label, record in records.items()} == {
        "max_length 64": 6000,
        "max_length 128": 10,
    }
    assert records["max_length 64"].max_length == 64
    assert data_record_of(both) is None
