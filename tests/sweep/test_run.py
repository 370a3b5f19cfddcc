"""A whole sweep: packs on Ray, the record in MLflow, and equal results however the work is distributed."""

import importlib.metadata
import io
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import ray
import torch
from mlflow import MlflowClient
from mlflow.entities import Run
from rich.console import Console
from torch.nn import functional

import loragrid as lg
from loragrid.comparison.data_record import data_record_of
from loragrid.comparison.sample_answers import SampleTable, load_samples
from loragrid.comparison.selection import choose
from loragrid.config.experiment import ModelConfig
from loragrid.data.dataset import load_data
from loragrid.data.record import data_figures, data_tags, trained_figures
from loragrid.models.loading import load_base, load_tokenizer
from loragrid.trials.tags import METHOD_TAG, PARENT_TAG, TRIAL_TAG
from tests.support.sweep_results import assert_succeeded

pytestmark = [pytest.mark.end_to_end, pytest.mark.usefixtures("ray_of_two_cpus")]

STEPS, EVAL_EVERY = 6, 2
FIVE_METHODS: list[Any] = [
    {"name": "lora", "grid": {"rank": [2, 4]}},
    "lora_fa",
    {"name": "vera", "rank": 8},
    {"name": "delta_lora", "start_step": 2},
    "lora_plus",
]
REFERENCES: list[Any] = [{"name": "full", "lr": 1e-3}, "frozen"]


@pytest.fixture(scope="module")
def settings(tiny_gpt2_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """An experiment's keys without name and methods. GPT-2 computes in float64 throughout, as Llama does not."""
    text = tmp_path_factory.mktemp("text") / "plain.txt"
    text.write_text("The old bridge stands near the market, and nobody knows who built it. " * 3, encoding="utf-8")
    return {
        "question": "Is it the same however it is run?",
        "model": {"name": str(tiny_gpt2_dir), "dtype": "float64"},
        "data": {"name": str(chat_jsonl), "max_length": 96, "num_train": 40, "num_eval": 10, "num_test": 7}
        | {"forgetting_name": str(text)},
        "training": {
            "steps": STEPS,
            "batch_size": 4,
            "lr": 1e-2,
            "eval_every": EVAL_EVERY,
            "measure_steps": 1,
            "loss_threshold": 5.6,
        },
        "grid": {"method.rank": [2]},
        "workers": {"cpus_per_worker": 1},
        "samples": {"num_prompts": 3, "max_new_tokens": 6},
        "storage": {"path": str(tmp_path_factory.mktemp("store"))},
    }


@pytest.fixture(scope="module")
def packed(settings: dict[str, Any]) -> lg.SweepResult:
    """All methods, as many in one pack as can be."""
    return lg.run(lg.Experiment(name="packed", methods=FIVE_METHODS + REFERENCES, **settings))


@pytest.fixture(scope="module")
def runs(packed: lg.SweepResult) -> dict[str, Run]:
    """The trials' runs by trial id, read with MLflow's own client."""
    found = [run for run in all_runs(packed) if PARENT_TAG in run.data.tags]
    return {run.data.tags[TRIAL_TAG]: run for run in found}


def all_runs(result: lg.SweepResult) -> list[Run]:
    """Every run of the one MLflow experiment of that name."""
    client = MlflowClient(tracking_uri=result.tracking_uri)
    experiments = [experiment for experiment in client.search_experiments() if experiment.name == "packed"]
    assert len(experiments) == 1
    return list(client.search_runs([experiments[0].experiment_id]))


def of_method(runs: dict[str, Run], method: str, **parameters: Any) -> Run:
    """The one run of a method with these hyperparameters."""
    wanted = {f"method.{key}": str(value) for key, value in parameters.items()}
    found = [
        run
        for run in runs.values()
        if run.data.tags[METHOD_TAG] == method and wanted.items() <= run.data.params.items()
    ]
    assert len(found) == 1, (method, parameters)
    return found[0]


def curve(result: lg.SweepResult, run: Run, key: str) -> dict[int, float]:
    points = MlflowClient(tracking_uri=result.tracking_uri).get_metric_history(run.info.run_id, key)
    return {point.step: point.value for point in points}


def curves(result: lg.SweepResult) -> dict[tuple[str, str, int], float]:
    """(trial id, key, step) -> value of every curve of a sweep."""
    table = result.comparison().curves
    return {(row.trial_id, row.key, row.step): row.value for row in table.itertuples()}  # type: ignore[misc]


def artifact(result: lg.SweepResult, run: Run, folder: Path, name: str = "adapter") -> Path:
    client = MlflowClient(tracking_uri=result.tracking_uri)
    folder.mkdir(exist_ok=True)
    return Path(client.download_artifacts(run.info.run_id, name, str(folder)))


def free_cpus() -> Iterator[float]:
    """What Ray has free, again and again for a minute: workers take a moment to go."""
    for _ in range(600):
        yield ray.available_resources().get("CPU", 0.0)  # type: ignore[no-untyped-call]
        time.sleep(0.1)


def test_every_trial_finishes_and_the_clusters_resources_are_free_again(packed: lg.SweepResult) -> None:
    assert_succeeded(packed)
    assert packed.name == "packed-1"
    assert set(packed.outcome.statuses) == {trial.trial_id for trial in packed.plan.trials}
    assert any(free == 2.0 for free in free_cpus())


def test_full_fine_tuning_has_a_pack_of_its_own(packed: lg.SweepResult, runs: dict[str, Run]) -> None:
    packs: dict[str, set[str]] = {}
    for run in runs.values():
        packs.setdefault(run.data.tags["loragrid.pack"], set()).add(run.data.tags[METHOD_TAG])
    assert sorted(packs.values(), key=len) == [
        {"full"},
        {"lora", "lora_fa", "vera", "delta_lora", "lora_plus", "frozen"},
    ]


def test_mlflow_holds_one_finished_child_run_per_trial(packed: lg.SweepResult, runs: dict[str, Run]) -> None:
    everything = all_runs(packed)
    parents = [run for run in everything if PARENT_TAG not in run.data.tags]
    assert len(everything) == 1 + len(packed.plan.trials)
    assert [(run.info.run_name, run.info.status) for run in parents] == [("packed-1", "FINISHED")]
    assert set(runs) == {trial.trial_id for trial in packed.plan.trials}
    assert {run.data.tags[PARENT_TAG] for run in runs.values()} == {parents[0].info.run_id}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert all(run.info.end_time >= run.info.start_time for run in everything)


def test_a_run_carries_parameters_card_and_versions(runs: dict[str, Run], tiny_gpt2_dir: Path) -> None:
    run = of_method(runs, "delta_lora")
    expected = {
        "method.name": "delta_lora",
        "method.rank": "2",
        "method.start_step": "2",
        "training.lr": "0.01",
        "training.steps": str(STEPS),
        "model.name": str(tiny_gpt2_dir),
        "model.dtype": "float64",
        "data.max_length": "96",
        "seed": "0",
    }
    assert expected.items() <= run.data.params.items()
    assert "Delta-LoRA" in run.data.tags["loragrid.card.title"]
    assert run.data.tags["loragrid.version.torch"] == importlib.metadata.version("torch")
    assert run.data.tags["loragrid.engine"] == "eager"
    assert run.data.tags["loragrid.engine.reason"] == "no GPU"


def test_parameters_are_counted_as_the_papers_count_them(runs: dict[str, Run], tiny_gpt2_dir: Path) -> None:
    # Two blocks with the layers 32 -> 96, 32 -> 32, 32 -> 128 and 128 -> 32: in + out is 512 in a block, out is 288.
    def trainable(method: str, **parameters: Any) -> float:
        return float(of_method(runs, method, **parameters).data.metrics["parameters/trainable"])

    assert trainable("lora", rank=2) == 2 * 512 * 2
    assert trainable("lora", rank=4) == 4 * 512 * 2
    assert trainable("lora_plus") == trainable("delta_lora") == 2 * 512 * 2
    assert trainable("lora_fa") == 2 * 288 * 2
    assert trainable("vera") == (4 * 8 + 288) * 2
    assert trainable("frozen") == 0
    base = load_base(ModelConfig(name=str(tiny_gpt2_dir)))
    assert trainable("full") == sum(parameter.numel() for parameter in base.parameters())


def test_memory_and_speed_of_every_method_are_measured(runs: dict[str, Run]) -> None:
    def figure(key: str, method: str, **parameters: Any) -> float:
        return float(of_method(runs, method, **parameters).data.metrics[key])

    for run in runs.values():
        for key in ("time/step_seconds", "throughput/tokens_per_second", "memory/peak_resident_bytes"):
            assert run.data.metrics[key] > 0, (run.info.run_name, key)
    shapes: dict[str, set[tuple[float, ...]]] = {}
    keys = ("time/step_seconds", "time/step_low_seconds", "time/step_high_seconds", "memory/saved_activation_bytes")
    for run in runs.values():
        figures = tuple(run.data.metrics[key] for key in keys)
        shapes.setdefault(run.data.tags["loragrid.cost.shape"], set()).add(figures)
    assert all(len(found) == 1 for found in shapes.values()), "trials of one shape share a measurement"
    assert 1 < len(shapes) < len(runs)
    saved = "memory/saved_activation_bytes"
    assert figure(saved, "frozen") == 0
    assert 0 < figure(saved, "lora_fa") < figure(saved, "lora", rank=2) < figure(saved, "lora", rank=4)
    assert figure(saved, "lora", rank=2) < figure(saved, "full")


def test_losses_are_recorded_per_step_and_evaluations_when_due(packed: lg.SweepResult, runs: dict[str, Run]) -> None:
    for run in runs.values():
        assert sorted(curve(packed, run, "train/loss")) == list(range(1, STEPS + 1))
        assert sorted(curve(packed, run, "train/learning_rate")) == list(range(1, STEPS + 1))
        assert sorted(curve(packed, run, "eval/loss")) == list(range(0, STEPS + 1, EVAL_EVERY))
    starts = {curve(packed, run, "eval/loss")[0] for run in runs.values()}
    assert max(starts) - min(starts) <= 1e-12
    frozen = curve(packed, of_method(runs, "frozen"), "eval/loss")
    assert max(frozen.values()) - min(frozen.values()) <= 1e-12
    for method in ("lora_fa", "vera", "delta_lora", "lora_plus", "full"):
        losses = curve(packed, of_method(runs, method), "eval/loss")
        assert losses[STEPS] < losses[0], method
        assert of_method(runs, method).data.metrics["eval/final_loss"] == losses[STEPS]


def test_steps_to_the_threshold_are_those_of_the_curve(packed: lg.SweepResult, runs: dict[str, Run]) -> None:
    crossed = 0
    for run in runs.values():
        below = [step for step, loss in sorted(curve(packed, run, "eval/loss").items()) if loss <= 5.6]
        assert run.data.metrics.get("convergence/steps_to_threshold") == (below[0] if below else None)
        assert ("convergence/seconds_to_threshold" in run.data.metrics) == bool(below)
        crossed += bool(below)
    assert 0 < crossed < len(runs)


def eval_loss(model: Any, packed: lg.SweepResult, split: str = "evaluation") -> float:
    """The mean loss over the labelled tokens of the split's rows, from the model's own logits."""
    trial = packed.plan.trials[0]
    data = load_data(trial.data, trial.model, load_tokenizer(trial.model))
    rows = getattr(data, split)
    with torch.no_grad():
        logits = model(input_ids=rows.input_ids).logits
    predicted = logits.gather(1, rows.label_positions[..., None].expand(-1, -1, logits.shape[-1]))
    return float(functional.cross_entropy(predicted.flatten(0, 1), rows.label_targets.flatten(), ignore_index=-100))


@pytest.mark.parametrize("method", ["lora_fa", "vera", "delta_lora", "lora_plus"])
def test_peft_loads_the_recorded_adapter_and_gets_the_recorded_loss(
    packed: lg.SweepResult, runs: dict[str, Run], tmp_path: Path, method: str
) -> None:
    peft = pytest.importorskip("peft")
    run = of_method(runs, method)
    base = load_base(packed.plan.trials[0].model)
    folder = artifact(packed, run, tmp_path)
    adapted = peft.PeftModel.from_pretrained(base, str(folder), autocast_adapter_dtype=False).eval()
    assert eval_loss(adapted, packed) == pytest.approx(run.data.metrics["eval/final_loss"], rel=1e-9)
    assert eval_loss(adapted, packed, "test") == pytest.approx(run.data.metrics["test/loss"], rel=1e-9)


def test_every_finished_trial_keeps_its_score_on_each_test_row(
    packed: lg.SweepResult, runs: dict[str, Run], tmp_path: Path
) -> None:
    trial = packed.plan.trials[0]
    rows = load_data(trial.data, trial.model, load_tokenizer(trial.model)).test
    assert len(runs) == len(packed.plan.trials)
    for trial_id, run in runs.items():
        file = artifact(packed, run, tmp_path / trial_id, "scores") / "test.csv"
        scores = pd.read_csv(file, dtype={"row": str, "group": str})
        assert scores["row"].tolist() == rows.digests()
        assert scores["group"].tolist() == rows.group_digests()
        assert scores["num_labels"].sum() == rows.num_labels
        assert scores["loss"].sum() / rows.num_labels == pytest.approx(run.data.metrics["test/loss"], rel=1e-12)


def test_sweep_and_trials_record_what_they_trained_on(packed: lg.SweepResult, runs: dict[str, Run]) -> None:
    trial = packed.plan.trials[0]
    data = load_data(trial.data, trial.model, load_tokenizer(trial.model))
    figures, tags = data_figures(data), data_tags(data)
    for own in packed.plan.trials:
        run = runs[own.trial_id]
        assert run.data.metrics.items() >= (figures | trained_figures(data, own.training, own.seed)).items()
        assert run.data.tags.items() >= tags.items()
    (parent,) = [run for run in all_runs(packed) if run.data.tags["loragrid.kind"] == "sweep"]
    assert parent.data.metrics.items() >= figures.items()
    assert parent.data.tags.items() >= tags.items()
    record = data_record_of(packed.comparison())
    assert record is not None
    assert record.rows == {"train": len(data.train), "eval": len(data.evaluation), "test": len(data.test)}


def test_full_fine_tuning_leaves_a_model_and_frozen_nothing(
    packed: lg.SweepResult, runs: dict[str, Run], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    run = of_method(runs, "full")
    model = AutoModelForCausalLM.from_pretrained(artifact(packed, run, tmp_path), dtype=torch.float64)
    assert eval_loss(model, packed) == pytest.approx(run.data.metrics["eval/final_loss"], rel=1e-9)
    client = MlflowClient(tracking_uri=packed.tracking_uri)
    left = client.list_artifacts(of_method(runs, "frozen").info.run_id)
    assert [entry.path for entry in left] == ["samples", "scores"]


def sampled(result: lg.SweepResult) -> SampleTable:
    comparison = result.comparison()
    samples = load_samples(comparison, choose(comparison).choices)
    assert samples is not None
    return samples


def test_every_trial_keeps_sample_answers_and_the_sweep_a_table(
    packed: lg.SweepResult, runs: dict[str, Run], tmp_path: Path
) -> None:
    for trial_id, run in runs.items():
        kept = json.loads((artifact(packed, run, tmp_path / trial_id, "samples") / "answers.json").read_text("utf-8"))
        assert kept["split"] == "test"
        assert len(kept["prompts"]) == 3
        if run.data.tags[METHOD_TAG] == "frozen":
            assert all(own["answer"] == own["base"] for own in kept["prompts"])
    samples = sampled(packed)
    assert set(samples.trial_ids) == {"lora", "lora_fa", "vera", "delta_lora", "lora_plus", "full"}
    assert all("door" in row.prompt for row in samples.rows)
    client = MlflowClient(tracking_uri=packed.tracking_uri)
    path = client.download_artifacts(packed.comparison().sweep_run_id, "samples.json", str(tmp_path))
    table = json.loads(Path(path).read_text(encoding="utf-8"))
    assert [row[0] for row in table["data"]] == [row.prompt for row in samples.rows]
    assert table["columns"] == ["prompt", "reference", "base", *samples.trial_ids]


def test_held_out_loss_and_best_step_are_those_of_the_curves(packed: lg.SweepResult, runs: dict[str, Run]) -> None:
    for run in runs.values():
        losses, held_out = (curve(packed, run, key) for key in ("eval/loss", "forgetting/loss"))
        assert sorted(held_out) == sorted(losses)
        best = min(losses, key=losses.__getitem__)
        assert run.data.metrics["eval/best_step"] == best
        assert run.data.metrics["eval/overshoot"] == losses[STEPS] - losses[best]
        assert run.data.metrics["forgetting/best_step_loss"] == held_out[best]
        assert run.data.metrics["forgetting/loss"] == held_out[STEPS]


def test_the_table_has_a_row_per_trial(packed: lg.SweepResult) -> None:
    table = packed.to_pandas()
    assert set(table["trial_id"]) == {trial.trial_id for trial in packed.plan.trials}
    assert set(table["status"]) == {"FINISHED"}
    assert {"rank", "parameters/trainable", "eval/final_loss"} <= set(table.columns)


def test_the_report_lies_in_the_storage_and_the_run(
    packed: lg.SweepResult, settings: dict[str, Any], tmp_path: Path
) -> None:
    assert packed.report == Path(settings["storage"]["path"]) / f"{packed.name}.html"
    page = packed.report.read_text(encoding="utf-8")
    assert "Is it the same however it is run?" in page
    client = MlflowClient(tracking_uri=packed.tracking_uri)
    kept = client.download_artifacts(packed.comparison().sweep_run_id, "report/report.html", str(tmp_path))
    assert Path(kept).read_text(encoding="utf-8") == page


def test_packs_of_one_have_the_same_curves_and_pass_rungs(packed: lg.SweepResult, settings: dict[str, Any]) -> None:
    experiment = lg.Experiment(
        name="alone",
        methods=[FIVE_METHODS[0], "lora_plus", {"name": "full", "grid": {"lr": [1e-6, 1e-3]}}],
        early_stopping={"grace_steps": 2, "reduction_factor": 2},
        **settings | {"pack": {"max_members": 1}},
    )
    alone = lg.run(experiment)
    assert_succeeded(alone)
    assert [len(pack.trials) for pack in alone.plan.packs] == [1] * 5
    trainers = Path(settings["storage"]["path"]) / "ray" / "alone-1"
    names = {folder.name for folder in [*trainers.glob("queue-*"), *trainers.glob("pack-*")]}
    assert names == {"queue-0", "queue-1"}, "one per place, not per pack"
    table = alone.to_pandas().set_index("method")
    assert table["status"].groupby("method").agg(lambda found: sorted(found)).to_dict() == {
        "lora": ["FINISHED", "KILLED"], "lora_plus": ["FINISHED"], "full": ["FINISHED", "KILLED"]
    }  # fmt: skip
    stopped = table[table["status"] == "KILLED"]
    for method, row in stopped.iterrows():
        assert row["reason"].endswith(f"is setting number 2 of 2 of {method}, 1 continues")
    assert stopped.loc["full"]["lr"] == 1e-6
    own, shared = curves(alone), curves(packed)
    compared = {point: value for point, value in own.items() if point in shared}
    assert len({trial_id for trial_id, _, _ in compared}) == 4, "all but one of full fine-tuning"
    assert {step for _, _, step in compared} == set(range(STEPS + 1))
    for point, value in compared.items():
        assert value == pytest.approx(shared[point], rel=1e-10), point


@pytest.mark.parametrize("strategy", ["replicate", "shard"])
def test_two_workers_give_the_curves_of_one(packed: lg.SweepResult, settings: dict[str, Any], strategy: str) -> None:
    workers = {"num_workers": 2, "cpus_per_worker": 1, "strategy": strategy}
    name = f"two-workers-{strategy}"
    deterministic = {"engine": {"deterministic": strategy == "replicate"}}  # which changes nothing on a CPU
    two = lg.run(lg.Experiment(name=name, methods=FIVE_METHODS, **settings | {"workers": workers} | deterministic))
    assert_succeeded(two)
    said = {tags["loragrid.deterministic"] for tags in two.comparison().tags.values()}
    assert said == {str(strategy == "replicate").lower()}
    held, (whole,) = (
        set(two.comparison().table["memory/base_bytes"]),
        set(packed.comparison().table["memory/base_bytes"]),
    )
    assert held == {whole / 2 if strategy == "shard" else whole}
    spread, one = curves(two), curves(packed)
    assert len(spread) == 6 * (3 * STEPS + 2 * (1 + STEPS // EVAL_EVERY))
    for point, value in spread.items():
        assert value == pytest.approx(one[point], rel=1e-8), point
    assert sampled(two).rows[0].answers.items() <= sampled(packed).rows[0].answers.items()
    assert any(free == 2.0 for free in free_cpus())


class KillsTheWorker(io.StringIO):
    """A terminal that ends the training process, as a machine short of memory would, when a line is printed."""

    def __init__(self, line: str) -> None:
        super().__init__()
        self.line, self.killed = line, 0

    def write(self, text: str) -> int:
        if self.line in text and not self.killed:
            for process in psutil.Process().children(recursive=True):
                if "RayTrainWorker" in process.name() or "RayTrainWorker" in " ".join(process.cmdline()):
                    process.kill()
                    self.killed += 1
        return super().write(text)


def test_packs_of_a_queue_are_halved_and_outlive_their_worker(
    settings: dict[str, Any],
) -> None:
    experiment = lg.Experiment(
        name="halving",
        methods=[
            {"name": "lora", "grid": {"lr": [1e-6, 1e-2, 1e-5, 1e-4]}},
            {"name": "full", "grid": {"lr": [1e-3, 2e-3]}},
        ],
        early_stopping={"grace_steps": 3, "reduction_factor": 4},
        pack={"max_members": 2},
        **settings | {"workers": {"cpus_per_worker": 2, "max_failures": 0}},
    )
    terminal = KillsTheWorker("pack-002: 1 trial")
    result = lg.run(experiment, console=Console(file=terminal, width=200))
    assert terminal.killed == 1
    table = result.to_pandas()
    trainers = Path(settings["storage"]["path"]) / "ray" / "halving-1"
    # Two LoRA packs and two of full fine-tuning in one queue; what waited at the rung or had not begun in another.
    assert {folder.name for folder in [*trainers.glob("queue-*"), *trainers.glob("pack-*")]} == {"queue-0", "queue-1"}
    assert {path.name for path in (trainers.parent.parent / "trials" / "halving-1" / ".ended").iterdir()} == set(
        table[table["status"] == "FAILED"]["trial_id"]
    ), "what is not to go on is deleted"
    lora = table[table["method"] == "lora"].set_index("lr")
    assert dict(lora["status"]) == {1e-2: "FINISHED", 1e-4: "KILLED", 1e-5: "KILLED", 1e-6: "KILLED"}
    second = lora.to_dict("index")[1e-4]
    assert second["reason"] == (
        f"stopped early at rung 1 (step 3): eval/loss {second['eval/final_loss']:.4g} is setting number 2 of 4 of "
        "lora, 1 continues"
    )
    full = table[table["method"] == "full"].set_index("lr")
    assert dict(full["status"]) == {1e-3: "FAILED", 2e-3: "FINISHED"}
    assert full["reason"].to_dict()[1e-3]
    assert not result.succeeded
    points = curves(result)
    finished = table[table["status"] == "FINISHED"]["trial_id"]
    last = {trial_id: max(step for other, _, step in points if other == trial_id) for trial_id in lora["trial_id"]}
    assert sorted(last.values()) == [3, 3, 3, STEPS]
    assert len(finished) == 2
    assert any(free == 2.0 for free in free_cpus())
