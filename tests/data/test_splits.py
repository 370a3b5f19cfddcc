"""No row is in two of the train, evaluation and test splits, whatever the data holds."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from loragrid.config.experiment import DataConfig, ModelConfig
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.evaluation.row_scores import RowScores
from loragrid.models.loading import load_tokenizer
from loragrid.training.assembly import build_batches
from loragrid.training.evaluate import evaluate, score_row_by_row
from loragrid.training.step import one_worker
from tests.support.small_packs import Setup, make_setup, mixed_trials, run_pack

PAIRS = [{"prompt": f"Question {number}:", "completion": f" answer {number}"} for number in range(20)]
SPLITS = ("train", "evaluation", "test")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def load(tmp_path: Path, tiny_llama_dir: Path) -> Any:
    """Loads rows, written to a file, as they are split with some `data` keys."""

    def load_rows(rows: Sequence[object], **keys: Any) -> TokenizedData:
        model = ModelConfig(name=str(tiny_llama_dir))
        data = DataConfig(name=write(tmp_path / "rows.jsonl", rows), max_length=64, **keys)
        return load_data(data, model, load_tokenizer(model))

    return load_rows


def write(path: Path, rows: Sequence[object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def digests(data: TokenizedData) -> dict[str, list[str]]:
    return {split: getattr(data, split).digests() for split in SPLITS}


def all_digests(data: TokenizedData) -> list[str]:
    return [digest for found in digests(data).values() for digest in found]


def no_row_in_two_splits(data: TokenizedData) -> bool:
    train, evaluation, test = (set(found) for found in digests(data).values())
    return not (train & evaluation or train & test or evaluation & test)


@pytest.mark.parametrize("copies", [1, 2, 5])
def test_a_repeated_row_is_in_one_split_only(load: Any, copies: int) -> None:
    data = load(PAIRS * copies, num_eval=5, num_test=4)
    assert (len(data.evaluation), len(data.test)) == (5, 4)
    assert no_row_in_two_splits(data)
    assert len(data.train) + 9 + sum(data.skipped.values()) == len(PAIRS) * copies
    assert (sum(data.skipped.values()) > 0) == (copies > 1)


def test_splits_from_separate_files_share_no_row(load: Any, tmp_path: Path) -> None:
    eval_name, test_name = write(tmp_path / "e.jsonl", PAIRS[:6]), write(tmp_path / "t.jsonl", PAIRS[4:12])
    data = load(PAIRS, eval_name=eval_name, test_name=test_name, num_eval=6, num_test=6)
    assert [len(getattr(data, split)) for split in SPLITS] == [8, 6, 6]
    assert no_row_in_two_splits(data)
    assert data.skipped == {"in the group of an eval row": 2 + 6, "in the group of a test row": 6}


def test_a_separate_test_file_changes_no_other_split(load: Any, tmp_path: Path) -> None:
    without = load(PAIRS, num_eval=5)
    others = [{"prompt": "Another:", "completion": f" {number}"} for number in range(3)]
    data = load(PAIRS, num_eval=5, num_test=3, test_name=write(tmp_path / "t.jsonl", others))
    assert digests(data)["evaluation"] == digests(without)["evaluation"]
    assert digests(data)["train"] == digests(without)["train"]
    assert digests(without)["test"] == []


def test_test_rows_depend_on_neither_num_train_nor_padding(load: Any) -> None:
    few, many = load(PAIRS, num_eval=5, num_test=4, num_train=2), load(PAIRS, num_eval=5, num_test=4)
    assert digests(few)["test"] == digests(many)["test"]
    long = [*PAIRS, {"prompt": "A long one, " * 3, "completion": " yes"}]
    longer = load(long, num_eval=5, num_test=4)
    known = set(all_digests(many))
    assert known <= set(all_digests(longer))


def test_rows_that_differ_in_what_is_learnt_have_different_digests(load: Any) -> None:
    prompt_longer = [{"prompt": "a b", "completion": " c"}, {"prompt": "a", "completion": " b c"}]
    data = load([*prompt_longer, *PAIRS[:2]], num_eval=1, num_test=1)
    found = all_digests(data)
    assert len(found) == len(set(found)) == 4


def test_too_few_test_rows_are_refused_with_the_key(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.num_test: 17: .*rows\.jsonl has only 15 test rows"):
        load(PAIRS, num_eval=5, num_test=17)
    with pytest.raises(ValueError, match=r"5 eval rows \(data\.num_eval\) and 15 test rows \(data\.num_test\)"):
        load(PAIRS, num_eval=5, num_test=15)
    with pytest.raises(ValueError, match=r"data\.test_name: nowhere\.jsonl: there is no such file"):
        load(PAIRS, num_eval=5, num_test=1, test_name="nowhere.jsonl")


@pytest.mark.parametrize("key", ["test_name", "test_split"])
def test_a_test_source_without_num_test_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"{key}.*num_test"):
        DataConfig.model_validate({"name": "some/data", key: "test.jsonl"})


@pytest.fixture(scope="module")
def tested(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64", num_test=11)


def test_row_scores_add_up_to_the_evaluation_loss(tested: Setup) -> None:
    trials = mixed_trials(tested, steps=4)
    run = run_pack(tested, trials)
    batches = build_batches(trials, tested.rows, run.model.base.device)
    whole = evaluate(run.model, batches, one_worker)
    scores = score_row_by_row(run.model, batches, tested.rows.evaluation, one_worker)
    for member in range(len(trials)):
        own = RowScores.of(tested.rows.evaluation, scores[member])
        assert own.figures("eval")["eval/loss"] == pytest.approx(whole[member].item(), rel=1e-13)  # added up otherwise
        assert own.columns["num_labels"] == (tested.rows.evaluation.label_targets >= 0).sum(1).tolist()


def test_a_row_scores_the_same_in_any_pack(tested: Setup) -> None:
    trials = mixed_trials(tested, steps=3)
    packed = run_pack(tested, trials)
    scores = score_row_by_row(
        packed.model, build_batches(trials, tested.rows, packed.model.base.device), tested.rows.test, one_worker
    )
    assert scores.shape == (len(trials), 11)
    for member in (0, len(trials) - 1):
        alone = run_pack(tested, [trials[member]])
        batches = build_batches([trials[member]], tested.rows, alone.model.base.device)
        own = score_row_by_row(alone.model, batches, tested.rows.test, one_worker)
        assert scores[member].tolist() == pytest.approx(own[0].tolist(), rel=1e-10)


def test_workers_that_share_the_rows_give_the_scores_of_one(tested: Setup) -> None:
    trials = mixed_trials(tested, steps=3)
    model = run_pack(tested, trials).model
    one = score_row_by_row(model, build_batches(trials, tested.rows, model.base.device), tested.rows.test, one_worker)
    shares = [
        score_row_by_row(
            model,
            build_batches(trials, tested.rows, model.base.device, worker=worker, num_workers=4),
            tested.rows.test,
            one_worker,
        )
        for worker in range(4)
    ]
    assert all(((share != 0).sum(1) > 0).all() for share in shares[:3])
    torch.testing.assert_close(torch.stack(shares).sum(0), one, rtol=1e-10, atol=0.0)
    assert all(sum((share[0] != 0).tolist()[row] for share in shares) == 1 for row in range(11))


def test_scores_read_back_as_the_numbers_they_were(tested: Setup, tmp_path: Path) -> None:
    import pandas

    trials = mixed_trials(tested, steps=3)
    model = run_pack(tested, trials).model
    scores = score_row_by_row(
        model, build_batches(trials, tested.rows, model.base.device), tested.rows.test, one_worker
    )
    RowScores.of(tested.rows.test, scores[0]).write("test", tmp_path)
    table = pandas.read_csv(tmp_path / "test.csv", float_precision="round_trip", dtype={"row": str, "group": str})
    assert list(table) == ["row", "group", "num_labels", "loss"]
    assert table["row"].tolist() == tested.rows.test.digests()
    assert table["group"].tolist() == tested.rows.test.group_digests()
    assert table["loss"].tolist() == scores[0].tolist()
