"""Time and memory: figures that can be counted are exact; figures that are only measured are recorded."""

import itertools
import statistics
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor, nn

from loragrid.planning.solo_run import SoloRun, measure_solo, take_turns
from loragrid.training.batches import PackBatches
from loragrid.training.meters import (
    Stopwatch,
    count_activation_bytes,
    free_memory,
    free_unused_memory,
    peak_memory,
    reset_peak_memory,
    wait_for,
)
from loragrid_methods import get_method, method_names
from loragrid_methods.stacks.pack import AdapterPack
from tests.support.small_packs import Setup, make_setup

CPU = torch.device("cpu")
WIDTH_IN, WIDTH_OUT, RANK, TOKENS = 40, 24, 3, 35
FLOAT32_BYTES = 4
MIB = 2**20


@pytest.fixture(scope="module")
def setup(tiny_llama_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup(tiny_llama_dir, chat_jsonl, "float32")


def solo(setup: Setup, name: str, num_steps: int = 2, num_workers: int = 1, **training: int) -> dict[str, float]:
    """Solo figures of a method on the down projections, with a clock that ticks once whenever it is asked."""
    fields = {"target_modules": ("down_proj",)} if "rank" in get_method(name).field_names() else {}
    ticks = itertools.count()
    return measure_solo(
        setup.trial(name, fields, **training),
        setup.base(),
        setup.rows,
        num_steps=num_steps,
        num_workers=num_workers,
        clock=lambda: float(next(ticks)),
    )


def test_a_stopwatch_adds_up_phases_including_failed_ones() -> None:
    now = [100.0]
    stopwatch = Stopwatch(lambda: now[0])
    with stopwatch.phase("train"):
        now[0] += 2
    now[0] += 50
    with stopwatch.phase("eval"):
        now[0] += 0.5

    def fail() -> None:
        with stopwatch.phase("train"):
            now[0] += 3
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        fail()
    assert stopwatch.seconds() == {"train": 5.0, "eval": 0.5}
    stopwatch.seconds().clear()
    assert stopwatch.seconds() == {"train": 5.0, "eval": 0.5}


def test_inner_phases_add_up_to_the_outermost_time() -> None:
    now = [0.0]
    stopwatch = Stopwatch(lambda: now[0])
    with stopwatch.phase("setup"):
        now[0] += 1
        with stopwatch.phase("measure"):
            now[0] += 2
            with stopwatch.phase("setup"):
                now[0] += 4
            now[0] += 8
            assert stopwatch.take() == {"setup": 5.0, "measure": 10.0}
            now[0] += 16
        now[0] += 32
        assert stopwatch.is_running
    now[0] += 64
    assert not stopwatch.is_running
    assert stopwatch.take() == {"setup": 32.0, "measure": 16.0}
    assert stopwatch.take() == {}


@pytest.mark.parametrize(
    ("name", "num_kept"),
    # LoRA keeps x and z = x A^T, LoRA-FA z alone, VeRA u = x A^T alone.
    [("lora", WIDTH_IN + RANK), ("lora_plus", WIDTH_IN + RANK), ("lora_fa", RANK), ("vera", RANK)],
)
def test_saved_bytes_of_a_layer_match_a_count_by_hand(name: str, num_kept: int) -> None:
    base = nn.Sequential(nn.Linear(WIDTH_IN, WIDTH_OUT))
    pack = AdapterPack(base, [(get_method(name)(rank=RANK), 0)])  # type: ignore[call-arg]
    pack.train()
    with count_activation_bytes(base) as saved:
        y = base(torch.ones(1, TOKENS, WIDTH_IN))
    assert y.requires_grad
    assert saved == [TOKENS * num_kept * FLOAT32_BYTES]


def test_a_tensor_counts_once_and_weights_do_not_count() -> None:
    layer = nn.Linear(8, 8, bias=False)
    x = torch.ones(16, 8, requires_grad=True)
    with count_activation_bytes(layer) as saved:
        hidden = layer(x)  # keeps x and the weight
        _ = hidden * hidden + hidden[:4].sum() * x.sin().sum()  # keeps `hidden` several times, x, and sin(x)'s input
    scalars = 2 * FLOAT32_BYTES
    assert saved == [2 * 16 * 8 * FLOAT32_BYTES + scalars]


def test_counting_changes_neither_values_nor_gradients() -> None:
    def gradient(counted: bool) -> Tensor:
        x = torch.linspace(-1, 1, 12).requires_grad_()
        if counted:
            with count_activation_bytes(nn.Module()):
                y = (x.exp() * x).sum()
        else:
            y = (x.exp() * x).sum()
        y.backward()
        assert x.grad is not None
        return x.grad

    assert torch.equal(gradient(True), gradient(False))


def test_what_was_counted_is_freed_with_its_graph() -> None:
    x = torch.ones(4, requires_grad=True)
    with count_activation_bytes(nn.Module()) as saved:
        y = x.exp()  # keeps its own output
    assert saved == [4 * FLOAT32_BYTES]
    freed = weakref.ref(y)
    del y
    assert freed() is None


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident set's peak is Linux's")
def test_the_process_peak_rises_and_can_be_reset() -> None:
    reset_peak_memory(CPU)
    before = peak_memory(CPU)["memory/peak_resident_bytes"]
    block = torch.ones(96 * MIB, dtype=torch.uint8)
    del block
    risen = peak_memory(CPU)["memory/peak_resident_bytes"]
    assert risen >= before + 80 * MIB
    reset_peak_memory(CPU)
    assert peak_memory(CPU)["memory/peak_resident_bytes"] <= risen - 80 * MIB


@pytest.mark.skipif(sys.platform != "linux", reason="other allocators keep other blocks")
def test_freed_main_memory_is_free_for_the_next_pack() -> None:
    process, kept = psutil.Process(), []
    for _ in range(3):
        free_unused_memory(CPU)
        before = process.memory_info().rss
        activations = [torch.ones(size * MIB, dtype=torch.uint8) for size in (1, 2, 8, 16, 1, 4) * 8]
        states = [torch.ones(3000) for _ in range(200)]
        kept.append([state.clone() for state in states])  # as members' states are
        assert process.memory_info().rss > before + 100 * MIB
        del activations, states
        free_unused_memory(CPU)
        assert process.memory_info().rss < before + 30 * MIB


def test_what_ray_keeps_of_main_memory_is_not_free() -> None:
    memory = psutil.virtual_memory()
    assert 64 * MIB < free_memory(CPU) < memory.total * 0.95
    assert free_memory(CPU) == pytest.approx(memory.available - 0.05 * memory.total, abs=512 * MIB)
    wait_for(CPU)


def test_lora_saves_more_than_lora_fa_by_its_inputs(
    setup: Setup,
) -> None:
    lora, lora_fa = solo(setup, "lora"), solo(setup, "lora_fa")
    rows, length = 4, setup.rows.train.input_ids.shape[1]
    inputs_of_two_layers = 2 * rows * length * 64 * FLOAT32_BYTES
    assert lora["memory/saved_activation_bytes"] - lora_fa["memory/saved_activation_bytes"] == inputs_of_two_layers
    assert solo(setup, "lora_plus")["memory/saved_activation_bytes"] == lora["memory/saved_activation_bytes"]
    assert solo(setup, "frozen")["memory/saved_activation_bytes"] == 0
    assert solo(setup, "full")["memory/saved_activation_bytes"] > lora["memory/saved_activation_bytes"]


def test_a_solo_figure_covers_one_workers_share(setup: Setup) -> None:
    whole, share = solo(setup, "lora", batch_size=8), solo(setup, "lora", batch_size=8, num_workers=2)
    half = solo(setup, "lora", batch_size=4)
    key = "memory/saved_activation_bytes"
    assert share[key] == half[key] < whole[key]
    assert share["throughput/tokens_per_second"] == half["throughput/tokens_per_second"]


def test_solo_activations_cover_a_micro_batch_tokens_a_batch(setup: Setup) -> None:
    whole, micro = solo(setup, "lora", batch_size=8), solo(setup, "lora", batch_size=8, micro_batch_size=4)
    half = solo(setup, "lora", batch_size=4)
    # The places of the labels are a view of the whole batch's.
    key = "memory/saved_activation_bytes"
    assert micro[key] == pytest.approx(half[key], rel=0.01)
    assert micro["throughput/tokens_per_second"] == whole["throughput/tokens_per_second"]


@pytest.mark.parametrize("num_steps", [1, 3])
def test_the_solo_throughput_counts_tokens_that_are_not_padding(setup: Setup, num_steps: int) -> None:
    figures = solo(setup, "vera", num_steps=num_steps, steps=1)
    rows = setup.rows.train
    batches = PackBatches(setup.rows, [0], 4)
    tokens = []
    for step in range(1, num_steps + 1):
        ids = batches.training(step).input_ids
        matches = (rows.input_ids.unsqueeze(0) == ids.unsqueeze(1)).all(2)
        tokens.append(int(rows.num_tokens[matches.int().argmax(1)].sum()))
    assert max(tokens) < 4 * rows.input_ids.shape[1]
    # The clock ticks once within a step, so every step takes a second.
    assert figures["time/step_seconds"] == 1.0
    assert figures["throughput/tokens_per_second"] == statistics.median(tokens)


@pytest.mark.parametrize("name", method_names())
def test_a_solo_measurement_is_complete_and_restores_the_base(setup: Setup, name: str) -> None:
    base = setup.base()
    modules = dict(base.named_modules())
    weights = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    figures = measure_solo(setup.trial(name), base, setup.rows, num_steps=2)
    assert figures.keys() - {"time/measure_load"} == {
        "memory/base_bytes",
        "memory/adapter_bytes",
        "memory/gradient_bytes",
        "memory/optimizer_bytes",
        "memory/saved_activation_bytes",
        "memory/loss_bytes",
        "memory/peak_resident_bytes",
        "time/step_seconds",
        "time/step_low_seconds",
        "time/step_high_seconds",
        "time/step_cpu_seconds",
        "time/measure_repeats",
        "time/measure_shape_seconds",
        "throughput/tokens_per_second",
        "throughput/model_flops_per_second",
        "throughput/device_limit_flops_per_second",
        "throughput/device_limit_seconds",
        "throughput/fraction_of_device_limit",
    }
    base_tensors = [*base.parameters(), *base.buffers()]
    assert figures["memory/base_bytes"] == sum(tensor.numel() * tensor.element_size() for tensor in base_tensors)
    assert figures["memory/peak_resident_bytes"] > 0
    assert figures["time/step_seconds"] > 0
    assert figures["throughput/tokens_per_second"] > 0
    assert dict(base.named_modules()) == modules
    unchanged = all(torch.equal(tensor, weights[key]) for key, tensor in base.state_dict().items())
    assert unchanged == get_method(name).packable


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident set's peak is Linux's")
def test_what_other_runs_hold_is_no_part_of_a_peak(setup: Setup) -> None:
    """The big adapter with its gradients and moments stays in memory while the small one is measured."""
    base = setup.base()

    def run(rank: int, beside: Sequence[SoloRun] = ()) -> SoloRun:
        fields = {"target_modules": ("down_proj",), "rank": rank}
        return SoloRun(setup.trial("lora", fields), base, setup.rows, beside=beside)

    def peak(one: SoloRun) -> float:
        take_turns([one], 1)
        return one.figures()["memory/peak_resident_bytes"]

    alone, big = run(4), run(100_000)
    assert big.held_bytes > 280 * MIB
    assert abs(peak(run(4, [big])) - peak(alone)) < 0.2 * big.held_bytes
    assert peak(run(4)) - peak(alone) > 0.8 * big.held_bytes  # what would be said without `beside`


def test_a_run_that_waits_for_its_turn_leaves_the_base_free(setup: Setup) -> None:
    base = setup.base()
    modules = dict(base.named_modules())
    runs = [SoloRun(setup.trial(name), base, setup.rows) for name in ("lora", "dora")]
    assert dict(base.named_modules()) == modules
    alone = SoloRun(setup.trial("lora"), setup.base(), setup.rows)
    for _ in range(3):
        for one in (*runs, alone):
            one.take_step()
        assert dict(base.named_modules()) == modules
    ours, theirs = (one.model.pack.trainable_parameters() for one in (runs[0], alone))
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_measuring_does_not_change_what_training_draws(setup: Setup) -> None:
    torch.manual_seed(1)
    expected = torch.rand(4)
    torch.manual_seed(1)
    solo(setup, "lora")
    assert torch.equal(torch.rand(4), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_peaks_are_the_allocators() -> None:
    device = torch.device("cuda")
    reset_peak_memory(device)
    before = peak_memory(device)
    block = torch.ones(64 * MIB, dtype=torch.uint8, device=device)
    del block
    after = peak_memory(device)
    assert after["memory/peak_allocated_bytes"] >= before["memory/peak_allocated_bytes"] + 64 * MIB
    assert after["memory/peak_reserved_bytes"] >= after["memory/peak_allocated_bytes"]
