"""The figures of rows are exact, have known names, and count every row that was read."""

import json
from pathlib import Path

import pytest
import torch

from loragrid.config.experiment import DataConfig, TrainingConfig
from loragrid.data.dataset import TokenizedData, load_data
from loragrid.data.record import common_record, data_figures, data_tags, trained_figures
from loragrid.models.loading import load_tokenizer
from loragrid.training.batches import PackBatches
from loragrid.trials.metrics import summary_metrics, sweep_metrics
from loragrid.trials.row_notes import ROW_NOTES
from loragrid.trials.skip_reasons import KEPT_APART, UNUSABLE
from tests.support.small_packs import Setup, make_setup


@pytest.fixture(scope="module")
def tested(tiny_gpt2_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_gpt2_dir, chat_jsonl, "float64", num_test=11)


@pytest.fixture
def with_skips(tested: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenizedData:
    """40 rows: 20 prompts twice, of which every second row of five prompts cannot be used."""
    monkeypatch.setenv("LORAGRID_CACHE", str(tmp_path / "cache"))
    completions = [" word" * 200] * 3 + [""] * 2 + [" yes"] * 15 + [" no"] * 20
    rows = [{"prompt": f"Question {n % 20}", "completion": text} for n, text in enumerate(completions)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataConfig(name=str(path), max_length=64, num_eval=3, num_test=3)
    return load_data(data, tested.model, load_tokenizer(tested.model))


def test_every_row_that_was_read_is_counted_once(with_skips: TokenizedData) -> None:
    figures = data_figures(with_skips)
    used = sum(figures[f"data/{split}_rows"] for split in ("train", "eval", "test"))
    assert used + figures["data/skipped_rows"] + figures["data/kept_apart_rows"] == 40
    assert figures["data/skipped_rows"] <= 5
    assert figures["data/skipped_share"] == figures["data/skipped_rows"] / (figures["data/skipped_rows"] + used)
    parts = {key: value for key, value in figures.items() if key.startswith(("data/skipped_", "data/kept_apart_"))}
    totals = {"data/skipped_rows", "data/skipped_share", "data/kept_apart_rows"}
    assert sum(parts[key] for key in parts.keys() - totals) == 40 - used
    assert json.loads(data_tags(with_skips)["loragrid.data.left_out"]) == with_skips.skipped


def test_every_figure_and_reason_has_a_documented_name(with_skips: TokenizedData) -> None:
    figures = data_figures(with_skips)
    assert figures.keys() <= sweep_metrics().keys()
    trained = trained_figures(with_skips, TrainingConfig(steps=3), seed=0)
    assert (figures | trained).keys() <= summary_metrics().keys()
    for name in UNUSABLE:
        assert f"data/skipped_{name}" in summary_metrics()
    for name in KEPT_APART:
        assert f"data/kept_apart_{name}" in summary_metrics()


def test_notes_are_counted_over_all_splits_and_recorded(tested: Setup, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {n}: ", "completion": "yes<|end|>" if n % 2 else "no"} for n in range(12)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = DataConfig(name=str(path), max_length=64, num_eval=3, num_test=3)
    loaded = load_data(data, tested.model, load_tokenizer(tested.model))
    assert loaded.notes["end_not_doubled"] == 6
    assert data_figures(loaded)["data/noted_end_not_doubled"] == 6
    assert {f"data/noted_{name}" for name in ROW_NOTES} <= summary_metrics().keys()
    assert loaded.notes.keys() <= ROW_NOTES.keys()


def test_a_reason_outside_the_tables_is_an_error(with_skips: TokenizedData) -> None:
    with_skips.skipped["out of the blue"] = 1
    with pytest.raises(AssertionError, match="out of the blue"):
        data_figures(with_skips)


@pytest.mark.parametrize(("steps", "batch_size"), [(3, 4), (31, 7), (1, 200)])
def test_trained_tokens_are_those_of_the_batches(tested: Setup, steps: int, batch_size: int) -> None:
    training = TrainingConfig(steps=steps, batch_size=batch_size)
    figures = trained_figures(tested.rows, training, seed=5)
    batches = PackBatches(tested.rows, [5], batch_size)
    assert figures["data/trained_tokens"] == sum(batches.tokens(step, 0) for step in range(steps))
    rows = [batches.rows(step) for step in range(steps)]
    assert figures["data/trained_labels"] == sum(int(batch.num_labels) for batch in rows)
    positions = sum(batch.input_ids.numel() for batch in rows)
    assert figures["data/padding_share"] == pytest.approx(1 - figures["data/trained_tokens"] / positions)


def test_one_epoch_trains_all_tokens_of_the_rows(tested: Setup) -> None:
    num_rows = len(tested.rows.train)
    figures = trained_figures(tested.rows, TrainingConfig(steps=1, batch_size=num_rows), seed=0)
    assert figures["data/trained_tokens"] == data_figures(tested.rows)["data/train_tokens"]
    assert figures["data/trained_tokens"] == int(torch.sum(tested.rows.train.num_tokens))


def test_a_sweep_records_what_its_data_sets_share(tested: Setup, with_skips: TokenizedData) -> None:
    figures, tags = common_record([tested.rows])
    assert (figures, tags) == (data_figures(tested.rows), data_tags(tested.rows))
    figures, tags = common_record([tested.rows, with_skips])
    assert "data/train_rows" not in figures
    assert figures["data/test_prompts_in_train"] == 0
    assert "loragrid.data.digest" not in tags
