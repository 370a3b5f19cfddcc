"""A base sharded over two workers trains, measures and exports as a whole base, with half of the weights per worker."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from torch import nn
from torch.multiprocessing.spawn import start_processes
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loragrid.config.experiment import ModelConfig
from loragrid.data.dataset import TokenRows
from loragrid.data.labels import IGNORED
from loragrid.models.loading import load_base, load_meta_model
from loragrid.models.sharding import gathered_bytes, share_bytes, whole_head
from loragrid.worker.export import export_merged
from loragrid_methods import get_method, method_names
from tests.support.sharded_packs import WorkerResult, packs_of, train_on_whole_and_sharded
from tests.support.small_packs import Setup, largest_difference, make_setup

pytestmark = pytest.mark.heavy  # real processes train the same packs on a whole and on a sharded base

NUM_WORKERS = 2
SHARDABLE = {name for name in method_names() if not get_method(name).sharding_obstacle}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What all workers kept, and the elements they gather: of embeddings and head, of a layer, of what is around them.

    What is gathered has rows that all workers can share; `filling` counts, in (each end, a layer), those beyond the
    weights' own.
    """

    setup: Setup
    folder: Path
    whole: list[WorkerResult]
    sharded: list[WorkerResult]
    ends: list[int]
    layer: int
    around: int
    filling: tuple[int, int]
    tolerance: float


@pytest.fixture(scope="module")
def uneven_llama_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    """A random Llama with a head of its own, and weights with an odd number of rows."""
    config = LlamaConfig(
        vocab_size=len(tiny_tokenizer) + 1,
        hidden_size=40,
        intermediate_size=63,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        pad_token_id=tiny_tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("uneven-llama")
    model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


# The weights that are gathered have the bits of those that were sharded. What may round otherwise is a matrix product,
# by the place of its operands in memory: 1e-12 and 1e-6 are a few thousand and a few times the two types' precision.
@pytest.fixture(scope="module", params=["tied", "untied"])
def trained(
    request: pytest.FixtureRequest,
    tiny_gpt2_dir: Path,
    uneven_llama_dir: Path,
    chat_jsonl: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trained:
    """GPT-2's head is its embeddings; its float64 is exact."""
    tied = request.param == "tied"
    model, dtype = (tiny_gpt2_dir, "float64") if tied else (uneven_llama_dir, "float32")
    folder = tmp_path_factory.mktemp(request.param)
    arguments = (NUM_WORKERS, str(model), str(chat_jsonl), dtype, str(folder))
    start_processes(train_on_whole_and_sharded, arguments, nprocs=NUM_WORKERS, start_method="spawn")
    # Our own results, with our own classes in them.
    workers = [torch.load(folder / f"{worker}.pt", weights_only=False) for worker in range(NUM_WORKERS)]
    # d = 32: four weights with biases, two norms; d = 40: q and o, k and v, gate and up (63 rows), down, two norms.
    gpt2 = (32 + 1) * 96 + (32 + 1) * 32 + (32 + 1) * 128 + (128 + 1) * 32 + 4 * 32
    llama = 2 * 40 * 40 + 2 * 20 * 40 + 2 * 64 * 40 + 40 * 63 + 2 * 40
    return Trained(
        setup=make_setup(model, chat_jsonl, dtype),
        folder=folder,
        whole=[results["whole"] for results in workers],
        sharded=[results["sharded"] for results in workers],
        ends=[300 * 32] if tied else [302 * 40, 302 * 40],
        layer=gpt2 if tied else llama,
        around=128 * 32 + 2 * 32 if tied else 40,
        filling=(0, 0) if tied else (40, 2 * 40),
        tolerance=1e-12 if tied else 1e-6,
    )


def test_a_sharded_base_trains_to_the_whole_bases_curves(trained: Trained) -> None:
    packs = packs_of(trained.setup)
    assert {trial.method.name for trial in packs[0][0]} == SHARDABLE
    for whole, sharded in zip(trained.whole, trained.sharded, strict=True):
        assert len(whole.packs) == len(sharded.packs) == len(packs)
        for (trials, _), ours, theirs in zip(packs, sharded.packs, whole.packs, strict=True):
            for member, trial in enumerate(trials):
                records, expected = ours.records[member], theirs.records[member]
                assert records.keys() == expected.keys() == set(range(trial.training.num_steps + 1))
                for step, record in records.items():
                    assert largest_difference(record, expected[step]) <= trained.tolerance, (trial.trial_id, step)
                difference = largest_difference(ours.weights[member], theirs.weights[member])
                assert difference <= trained.tolerance, trial.trial_id


def test_every_worker_holds_only_its_share_of_every_weight(trained: Trained) -> None:
    itemsize = trained.setup.base().dtype.itemsize
    in_end, in_layer = trained.filling
    shared = itemsize * (sum(trained.ends) + 2 * trained.layer + trained.around)
    whole = shared - itemsize * (len(trained.ends) * in_end + 2 * in_layer)
    meta = load_meta_model(trained.setup.model)
    buffers = sum(buffer.untyped_storage().nbytes() for buffer in meta.buffers())
    for worker in range(NUM_WORKERS):
        assert trained.whole[worker].resident_bytes == whole
        assert trained.whole[worker].solo["memory/base_bytes"] == whole + buffers
        assert trained.sharded[worker].resident_bytes == shared // NUM_WORKERS
        assert trained.sharded[worker].solo["memory/base_bytes"] == shared // NUM_WORKERS + buffers
    assert share_bytes(meta, NUM_WORKERS) == shared // NUM_WORKERS + buffers


def test_a_step_sums_gradients_once_and_gathers_units(
    trained: Trained,
) -> None:
    # Layers and what is around them for forward and for backward, embeddings and head once; rows rounded up.
    once = [*trained.ends, trained.around, trained.around, *[trained.layer] * 4]
    for whole, sharded in zip(trained.whole, trained.sharded, strict=True):
        for num_micro_batches, ours, theirs in zip((1, 2), sharded.packs, whole.packs, strict=True):
            assert len(ours.collectives) == len(theirs.collectives) == 4
            for step in theirs.collectives:
                assert step == {"allreduce_": theirs.reduced}
            for step in ours.collectives:
                assert step.keys() == {"allreduce_", "_allgather_base_"}
                assert step["allreduce_"] == ours.reduced
                assert sorted(step["_allgather_base_"]) == sorted(num_micro_batches * once)


def test_gathered_weights_do_not_count_as_saved_bytes(trained: Trained) -> None:
    for whole, sharded in zip(trained.whole, trained.sharded, strict=True):
        key = "memory/saved_activation_bytes"
        assert whole.solo[key] == sharded.solo[key] > 0
        assert whole.solo.keys() == sharded.solo.keys()


@torch.no_grad()
def evaluation_loss(model: Callable[..., object], rows: TokenRows) -> float:
    """The mean loss over the labels, from the model's own logits."""
    logits = model(input_ids=rows.input_ids).logits  # type: ignore[attr-defined]
    chosen = logits.gather(1, rows.label_positions.unsqueeze(-1).expand(-1, -1, logits.shape[-1]))
    targets = rows.label_targets.flatten()
    return float(nn.functional.cross_entropy(chosen.flatten(0, 1).double(), targets, ignore_index=IGNORED))


def test_exports_from_a_sharded_base_keep_their_loss(trained: Trained, tmp_path: Path) -> None:
    setup, ((trials, _), *_) = trained.setup, packs_of(trained.setup)
    seen = set()
    for member, trial in enumerate(trials):
        if trial.method.name in seen or not trial.method.peft_config():
            continue
        seen.add(trial.method.name)
        expected = trained.sharded[0].packs[0].records[member][trial.training.num_steps]["eval/loss"]
        adapter = trained.folder / "0" / f"{member}"
        loaded = PeftModel.from_pretrained(setup.base(), adapter, autocast_adapter_dtype=False).to(setup.base().dtype)
        assert evaluation_loss(loaded, setup.rows.evaluation) == pytest.approx(expected, rel=10 * trained.tolerance)
        export_merged(setup.model, adapter, type(trial.method), tmp_path / trial.method.name)
        merged = load_base(ModelConfig(name=str(tmp_path / trial.method.name), dtype=setup.model.dtype))
        assert evaluation_loss(merged, setup.rows.evaluation) == pytest.approx(expected, rel=10 * trained.tolerance)
    assert seen == {name for name in SHARDABLE if get_method(name)().peft_config()}


def test_two_layers_and_the_ends_are_whole_at_most(trained: Trained) -> None:
    meta = load_meta_model(trained.setup.model)
    in_end, in_layer = trained.filling
    layers, end = 2 * (trained.layer - in_layer), trained.ends[0] - in_end
    # A head that is the embeddings stays whole from before the layers; another comes when they are gone.
    largest = layers + end if len(trained.ends) == 1 else max(layers, end)
    assert gathered_bytes(meta) == meta.dtype.itemsize * (largest + trained.around)


def test_the_head_of_an_unsharded_base_is_unchanged(tiny_llama_dir: Path) -> None:
    base = load_base(ModelConfig(name=str(tiny_llama_dir), dtype="float32"))
    with whole_head(base) as head:
        assert head is base.get_output_embeddings()
    assert head.weight is base.get_input_embeddings().weight
