"""A task kind is one file: a third kind, written here, is accepted, scored, ranked, recorded and compared."""

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from pydantic import ValidationError
from typer.testing import CliRunner

from loragrid.cli.main import app
from loragrid.comparison.item_scores import load_scores
from loragrid.comparison.ranking import ranking_metric
from loragrid.comparison.table import load_comparison
from loragrid.comparison.verdict import judge
from loragrid.config.experiment import ExperimentError
from loragrid.sweep.summary import BEST_METRIC_TAG, SweepCost, record_summary
from loragrid.tasks import kinds
from loragrid.tasks.contract import Figure
from loragrid.tasks.discovery import task_figures, task_kinds
from loragrid.tracking.recorder import Recorder
from loragrid.trials.load import load_experiment
from loragrid.trials.trial import Trial
from tests.support.queue_runs import Seen, queue
from tests.support.small_packs import Setup, make_setup

ROOT = Path(__file__).resolve().parents[2]
STEPS = 12

KIND = '''
"""length_error: how far a generated answer's length is from the reference's."""

from typing import ClassVar, Literal

from loragrid.tasks.contract import Figure, Rows, Scorer
from loragrid.tasks.generation import GeneratingTask


class LengthError(GeneratingTask):
    figures: ClassVar[tuple[Figure, ...]] = (
        Figure(
            name="length_error",
            description="mean difference in length over the {rows} rows (characters)",
            axis="characters",
            higher_is_better=False,
            column="difference",
        ),
    )
    kind: Literal["length_error"] = "length_error"
    longest: int = 50

    def scorer(self, rows: Rows) -> "LengthErrorScorer":
        return LengthErrorScorer(self, rows)


class LengthErrorScorer(Scorer):
    def __init__(self, task: LengthError, rows: Rows) -> None:
        self.task, self.rows, self.answer_tokens = task, rows, task.max_new_tokens

    def score(self, members, split):
        questions = self.rows.questions[split]
        lengths = [min(self.task.longest, len(self.rows.text(question.reference))) for question in questions]

        def difference(number, text):
            return {"difference": abs(len(text) - lengths[number]) + 0.5}

        return members.generate(questions, self.task.generation, difference, ("difference",))

    def tags(self):
        return {"loragrid.length.unit": "character"}
'''

FILE = """
name: lengths
model: {{name: {model}, dtype: float64}}
data: {{name: {rows}, max_length: 96, num_eval: 10, num_test: 6}}
training: {{steps: 12, batch_size: 4, lr: 0.02, measure_steps: 0}}
task: {task}
methods: [lora, vera, frozen]
"""


@pytest.fixture
def third_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    folder = tmp_path / "kinds"
    folder.mkdir()
    (folder / "length_error.py").write_text(KIND, encoding="utf-8")
    monkeypatch.setattr(kinds, "__path__", [*kinds.__path__, str(folder)])
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    yield
    del sys.modules[f"{kinds.__name__}.length_error"]


@pytest.fixture
def setup(tiny_gpt2_dir: Path, tmp_path: Path) -> Setup:
    rows = tmp_path / "rows.jsonl"
    pairs = [{"prompt": f"Count to {n}:", "completion": f" {'#' * (n % 7 + 1)}"} for n in range(40)]
    rows.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")
    return make_setup(tiny_gpt2_dir, rows, "float64", num_test=6)


def trials_of(setup: Setup, folder: Path, task: str) -> list[Trial]:
    file = folder / "lengths.yaml"
    file.write_text(FILE.format(model=setup.model.name, rows=setup.data.name, task=task), encoding="utf-8")
    task_config = load_experiment(file).task
    small: dict[str, Any] = {"steps": STEPS, "batch_size": 4, "lr": 0.02, "measure_steps": 0}
    trials = [setup.trial(name, {"rank": 4}, seed=seed, **small) for name in ("lora", "vera") for seed in (0, 1)]
    return [
        replace(t, task=task_config, trial_id=f"{t.method.name}-{t.seed}")
        for t in [*trials, setup.trial("frozen", **small)]
    ]


def record(seen: Seen, trials: list[Trial], uri: str) -> Recorder:
    recorder = Recorder("lengths", uri)
    recorder.start_sweep("lengths-1", {}, {})
    for trial in trials:
        recorder.start_trial(trial.trial_id, trial.parameters(), seen.tags(trial))
        recorder.log_records(trial.trial_id, list(seen.records(trial).values()))
        recorder.log_summary(trial.trial_id, seen.figures[trial.trial_id])
        recorder.log_artifacts(trial.trial_id, Path(seen.store.uri) / trial.trial_id / "scores", "scores")
        recorder.end_trial(trial.trial_id, "FINISHED")
    assert recorder.deliver(60)
    record_summary(recorder, "lengths-1", SweepCost())
    recorder.end_sweep("FINISHED")
    assert recorder.deliver(60)
    return recorder


@pytest.mark.usefixtures("third_kind")
def test_a_kind_is_one_file_from_yaml_to_compare(setup: Setup, tmp_path: Path) -> None:
    trials = trials_of(setup, tmp_path, "{kind: length_error, max_new_tokens: 9, longest: 5, every: 6}")
    assert trials[0].parameters()["task.longest"] == 5
    seen = queue(setup, [trials])
    assert {end.status for end in seen.ended.values()} == {"FINISHED"}
    for trial in trials:
        found = {step: r["eval/length_error"] for step, r in seen.records(trial).items() if "eval/length_error" in r}
        assert found.keys() == {0, 6, STEPS}
        assert seen.tags(trial)["loragrid.length.unit"] == "character"
        assert seen.tags(trial)["loragrid.decoding"].startswith("greedy, at most 9 new tokens")
        with (Path(seen.store.uri) / trial.trial_id / "scores" / "test.csv").open(encoding="utf-8") as file:
            differences = [float(row["difference"]) for row in csv.DictReader(file)]
        assert all(difference % 1 == 0.5 for difference in differences)
        assert seen.figures[trial.trial_id]["test/length_error"] == pytest.approx(sum(differences) / 6)

    recorder = record(seen, trials, f"sqlite:///{tmp_path}/mlflow.db")
    comparison = load_comparison("lengths", recorder.tracking_uri)
    assert ranking_metric(comparison.table) == "eval/length_error"
    table = comparison.table.set_index("trial_id")["eval/length_error"]
    parent = MlflowClient(recorder.tracking_uri).get_run(recorder.sweep_run_id).data
    assert table[parent.tags["loragrid.best_trial"]] == table.min() < table.max()
    assert parent.tags[BEST_METRIC_TAG] == "eval/length_error"
    assert parent.metrics["sweep/best_eval_length_error"] == table.min()
    assert "mean difference in length over the test rows" in parent.tags["mlflow.note.content"]
    verdict = judge(comparison, load_scores(comparison))
    assert (verdict.metric, verdict.higher_is_better) == ("test/length_error", False)
    assert verdict.result is not None
    assert verdict.result.num_rows > 1
    assert verdict.sentences[0].startswith("No claim about methods: the methods share 1 seed")

    shown = CliRunner().invoke(app, ["compare", "lengths", "--tracking-uri", recorder.tracking_uri])
    assert shown.exit_code == 0, shown.output
    assert "lowest evaluation length error of a single trial" in " ".join(shown.output.split())
    assert f", {table.min():.4f})" in " ".join(shown.output.split()), "no percentage"
    page = tmp_path / "report.html"
    done = CliRunner().invoke(app, ["report", "lengths", "--tracking-uri", recorder.tracking_uri, "--out", str(page)])
    assert done.exit_code == 0, done.output
    assert "Evaluation length error over steps" in page.read_text(encoding="utf-8")


@pytest.mark.usefixtures("third_kind")
@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ("{kind: bleu}", ["task.kind", "allowed: exact_match, label_likelihood, length_error"]),
        ("{kind: length_error, longst: 3}", ["task.longst", "did you mean 'longest'"]),
        ("{kind: length_error, labels: [a, b]}", ["belongs to kind: label_likelihood", "or no labels"]),
        ("{kind: exact_match, longest: 3}", ["belongs to kind: length_error", "no effect with exact_match"]),
        ("{kind: label_likelihood, max_new_tokens: 3}", ["belongs to kind: exact_match, length_error"]),
        ("{kind: length_error, top_p: 0.5}", ["task.top_p", "temperature set"]),
    ],
)
def test_refusals_know_the_keys_of_a_third_kind(setup: Setup, tmp_path: Path, task: str, parts: list[str]) -> None:
    with pytest.raises(ExperimentError) as caught:
        trials_of(setup, tmp_path, task)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.usefixtures("third_kind")
def test_two_kinds_cannot_differ_in_one_figure(tmp_path: Path) -> None:
    assert [figure.name for figure in task_figures()] == ["accuracy", "length_error"]
    (tmp_path / "kinds" / "length_error.py").write_text(
        KIND.replace('name="length_error",\n', 'name="accuracy",\n'), encoding="utf-8"
    )
    kinds.__path__.append(str(tmp_path))  # the kinds found before are cached by path
    sys.modules.pop(f"{kinds.__name__}.length_error", None)
    with pytest.raises(AssertionError, match="different figures named accuracy"):
        task_figures()


@pytest.mark.parametrize("kind", task_kinds())
def test_a_kind_declares_a_figure_and_is_named_once(kind: str) -> None:
    assert all(isinstance(figure, Figure) for figure in task_kinds()[kind].figures)
    assert task_kinds()[kind].figures, "trials are ranked by the first figure"
    platform = ROOT / "platform" / "loragrid"
    naming = [
        str(file.relative_to(platform))
        for file in sorted(platform.rglob("*.py"))
        if kind in file.read_text(encoding="utf-8")
    ]
    assert naming == [f"tasks/kinds/{kind}.py"]


@pytest.mark.parametrize("kind", task_kinds())
def test_a_kind_refuses_unknown_keys_in_python(kind: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs"):
        task_kinds()[kind].model_validate({"nothing": 1})


def test_the_kinds_are_read_without_torch() -> None:
    code = "import sys; from loragrid.tasks.discovery import task_kinds; print(*task_kinds(), 'torch' in sys.modules)"
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == [*task_kinds(), "False"], done.stderr
