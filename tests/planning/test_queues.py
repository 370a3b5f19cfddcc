"""The estimate of a sweep uses the same packs and queues as the sweep itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import loragrid as lg
from loragrid.planning.placement import Node, place
from loragrid.planning.plan import Plan, plan
from loragrid.planning.queues import queues_on
from loragrid.planning.time_estimate import estimate_time, plan_on
from loragrid.sweep.progress import SweepProgress
from loragrid.sweep.record import Sweep
from loragrid.sweep.run import cut_plans
from loragrid.sweep.tune_runner import TuneRunner
from loragrid.tracking.recorder import Recorder
from loragrid.trials.packing import PackQueue
from loragrid.worker.checkpoints import TrialStore

NODES = {
    "one CPU": Node(num_cpus=1, num_gpus=0),
    "four CPUs": Node(num_cpus=4, num_gpus=0),
    "no room": Node(num_cpus=0.5, num_gpus=0),
    "one GPU": Node(num_cpus=8, num_gpus=1),
    "three GPUs": Node(num_cpus=12, num_gpus=3),
}
SECTIONS: dict[str, dict[str, Any]] = {
    "packed": {},
    "alone": {"pack": {"max_members": 1}},
    "pairs": {"pack": {"max_members": 2}},
    "halving": {"early_stopping": {"grace_steps": 1}},
    "halving alone": {"early_stopping": {"grace_steps": 1}, "pack": {"max_members": 1}},
    "two workers": {"workers": {"num_workers": 2, "cpus_per_worker": 1}},
}


def plan_of(model: Path, rows: Path, folder: Path, sections: dict[str, Any]) -> Plan:
    return plan(
        lg.Experiment(
            name="cut",
            model={"name": str(model)},
            data={"name": str(rows), "max_length": 96, "num_eval": 8},
            training={"steps": 2, "batch_size": 4},
            methods=["lora", "vera", "full"],
            grid={"seed": [0, 1, 2, 3]},
            storage={"path": str(folder)},
            **{"workers": {"cpus_per_worker": 1}} | sections,
        )
    )


def tuned_queues(whole_plan: Plan, node: Node, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[PackQueue]:
    """The queues of the first round that a sweep on this node tunes over, as `run` prepares it."""
    placement = place(whole_plan.experiment.workers, [node])
    _, the_plan = cut_plans(whole_plan, None, placement)
    recorder = Recorder("cut", f"sqlite:///{folder / 'mlflow.db'}")
    recorder.start_sweep("cut-1", {}, {})
    store = TrialStore(str(folder / "trials"))
    sweep = Sweep(name="cut-1", experiment=whole_plan.experiment, recorder=recorder, store=store)
    runner = TuneRunner(sweep, the_plan, {}, placement, SweepProgress(1, Console(quiet=True)))
    tuned: list[Sequence[PackQueue]] = []
    monkeypatch.setattr(TuneRunner, "_tune", lambda self, queues, number: tuned.append(queues))
    monkeypatch.setattr(runner.callback, "fail_unbegun", lambda packs, failure: None)
    runner.run()
    return list(tuned[0])


@pytest.mark.heavy
@pytest.mark.parametrize("sections", SECTIONS.values(), ids=SECTIONS)
def test_a_sweep_trains_the_queues_that_its_estimate_counted(
    tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path, sections: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole_plan = plan_of(tiny_gpt2_dir, chat_jsonl, tmp_path, sections)
    for name, node in NODES.items():
        folder = tmp_path / name
        folder.mkdir()
        planned, placement = plan_on(whole_plan, node)
        estimated = estimate_time(planned, placement, {}).queues
        tuned = tuned_queues(whole_plan, node, folder, monkeypatch)
        assert [tuple(pack.pack_id for pack in queue.packs) for queue in tuned] == list(estimated), name
        members = {pack.pack_id: [trial.trial_id for trial in pack.trials] for pack in planned.packs}
        assert {p.pack_id: [t.trial_id for t in p.trials] for q in tuned for p in q.packs} == members, name


def test_places_of_the_cluster_decide_the_number_of_queues(
    tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path
) -> None:
    def num_queues(node: str, sections: str) -> int:
        planned, placement = plan_on(plan_of(tiny_gpt2_dir, chat_jsonl, tmp_path, SECTIONS[sections]), NODES[node])
        return len(queues_on(planned.packs, planned.experiment, placement))

    assert num_queues("one CPU", "pairs") == 1
    assert num_queues("four CPUs", "pairs") == 4
    assert num_queues("no room", "pairs") == 8, "one queue per pack: the cluster will grow"
    assert num_queues("one CPU", "alone") == 12
    for sections in ("halving", "halving alone"):
        assert num_queues("one CPU", sections) == 1
        assert num_queues("four CPUs", sections) == num_queues("no room", sections) == 3, "one queue per method"
    assert num_queues("four CPUs", "two workers") == 5, "one queue per pack: one failure stops all of its workers"


def test_packs_are_cut_for_gpus_only(tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    whole_plan = plan_of(tiny_gpt2_dir, chat_jsonl, tmp_path, {})
    on_cpus, _ = plan_on(whole_plan, NODES["four CPUs"])
    assert on_cpus is whole_plan
    on_gpus, _ = plan_on(whole_plan, NODES["three GPUs"])
    assert len(on_gpus.packs) > len(whole_plan.packs)
