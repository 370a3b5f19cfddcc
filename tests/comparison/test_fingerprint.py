"""Mixed fingerprints are announced, their trials are marked, and --strict refuses them."""

import importlib.metadata
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from loragrid.cli import main as cli
from loragrid.comparison.fingerprint import changes_on_the_way, fingerprint_of, refuse_mixed
from loragrid.comparison.table import Comparison, load_comparison
from loragrid.config.experiment import EngineConfig
from loragrid.models.cache import cache_folder
from loragrid.models.file_hash import file_sha256, remembered_sha256
from loragrid.planning.timing import SHAPE_TAG, pack_shape
from loragrid.report.terminal import render_table
from loragrid.sweep.callback import RecordingCallback
from loragrid.tracking.previous_run import find_previous
from loragrid.tracking.recorder import Recorder
from loragrid.tracking.store_uri import Scalar, default_tracking_uri
from loragrid.trials.packing import Pack, PackQueue
from loragrid.trials.tags import DEVICE_TAG
from loragrid.worker.checkpoints import TrialStore
from loragrid.worker.messages import PackUpdate
from loragrid.worker.process_group import ProcessGroup
from loragrid.worker.queue import run_queue
from loragrid.worker.queue_worker import build_worker
from loragrid.worker.worker_tags import WorkerEnvironment, arithmetic_tags, input_tags
from tests.support.small_packs import make_setup

TAGS = {
    "mlflow.source.git.commit": "a" * 40,
    "loragrid.git.dirty": "false",
    "loragrid.version.torch": "2.13.0",
    "loragrid.version.transformers": "5.23.0",
    "loragrid.device": "NVIDIA H200",
    "loragrid.model.weights": "sha256:" + "1" * 64,
    "loragrid.data.digest": "sha256:" + "2" * 64,
    "loragrid.engine": "compiled",
    "loragrid.pack": "pack-000",
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One storage folder for all tests; every test has its own experiment."""
    return tmp_path_factory.mktemp("store")


def record(
    store: Path,
    name: str,
    changes: Sequence[Mapping[str, str]],
    parameters: Sequence[Mapping[str, Scalar]] | None = None,
) -> Comparison:
    """A sweep of finished trials `lora-0`, ... with `TAGS` and the given changes; "" removes a tag."""
    recorder = Recorder(name, default_tracking_uri(str(store), None))
    recorder.start_sweep("only", {}, {})
    for index, changed in enumerate(changes):
        own = {"method.name": "lora", "seed": index, **(parameters[index] if parameters else {})}
        recorder.start_trial(f"lora-{index}", own, {key: v for key, v in {**TAGS, **changed}.items() if v})
        recorder.log_summary(f"lora-{index}", {"eval/final_loss": 2.0 + index})
        recorder.end_trial(f"lora-{index}", "FINISHED")
    recorder.end_sweep("FINISHED")
    return load_comparison(name, recorder.tracking_uri)


def text_of(comparison: Comparison) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(render_table(comparison, 200))
    return capture.get()


def one_line(text: str) -> str:
    return " ".join(text.split())


def test_one_fingerprint_is_said_by_silence(store: Path) -> None:
    comparison = record(store, "one", [{}, {}, {}])
    report = fingerprint_of(comparison)
    assert report.sentences() == []
    assert report.marked == {}
    refuse_mixed(report)
    (torch_row,) = (row for row in report.rows if row.part.name == "torch")
    assert torch_row.values == {"2.13.0": ("lora-0", "lora-1", "lora-2")}
    assert "†" not in text_of(comparison)


@pytest.mark.parametrize(
    ("tag", "value", "told"),
    [
        ("loragrid.version.torch", "2.11.0", "torch 2.11.0, the others with 2.13.0"),
        ("loragrid.version.transformers", "5.22.0", "transformers 5.22.0, the others with 5.23.0"),
        ("mlflow.source.git.commit", "b" * 40, f"commit {'b' * 12}, the others with {'a' * 12}"),
        ("loragrid.git.dirty", "true", "uncommitted changes some, the others with none"),
        ("loragrid.device", "NVIDIA H100", "device NVIDIA H100, the others with NVIDIA H200"),
        ("loragrid.model.weights", "sha256:" + "3" * 64, "weights sha256:333333333333, the others with sha256:11111"),
        (
            "loragrid.data.digest",
            "sha256:" + "4" * 64,
            "rows sha256:444444444444, the others with sha256:222222",
        ),
        ("loragrid.decoding.do_sample", "true", "decoding do_sample true, the others with not recorded"),
        ("loragrid.version.torch", "", "torch not recorded, the others with 2.13.0"),
    ],
)
def test_mixed_fingerprints_are_announced_marked_and_refused_by_strict(
    store: Path, tag: str, value: str, told: str
) -> None:
    comparison = record(store, f"mixed-{tag}-{value[:9]}", [{}, {tag: value}, {}])
    report = fingerprint_of(comparison)
    assert list(report.marked) == ["lora-1"]
    assert told in report.marked["lora-1"]
    text = text_of(comparison)
    assert "mixed fingerprints" in text.partition("method")[0]
    (marked_row,) = (line for line in text.splitlines() if line.startswith("lora †"))
    assert "3.0000" in marked_row, "the mark is in the row of the trial that differs"
    assert f"† lora-1 ran with {told}" in one_line(text)
    with pytest.raises(ValueError, match=r"lora-1 ran with"):
        refuse_mixed(report)


@pytest.mark.parametrize("tag", ["loragrid.engine", "loragrid.cpu.num_cores", "loragrid.gpu.driver"])
def test_what_changes_times_alone_is_said_and_not_refused(store: Path, tag: str) -> None:
    report = fingerprint_of(record(store, f"speed-{tag}", [{tag: "1"}, {tag: "2"}]))
    assert report.marked == {}
    refuse_mixed(report)
    (sentence,) = report.sentences()
    assert sentence.startswith("times and memory are not like for like")


@pytest.mark.parametrize("tag", ["loragrid.pack", "loragrid.version.mlflow", "loragrid.system"])
def test_what_changes_nothing_is_not_mentioned(store: Path, tag: str) -> None:
    assert fingerprint_of(record(store, f"nothing-{tag}", [{tag: "1"}, {tag: "2"}])).sentences() == []


def test_what_an_axis_changes_on_purpose_is_no_difference(store: Path) -> None:
    weights = [{"loragrid.model.weights": f"sha256:{digit * 64}"} for digit in "1133"]
    models: list[Mapping[str, Scalar]] = [{"model.name": name} for name in ("small", "small", "large", "large")]
    assert fingerprint_of(record(store, "two-models", weights, models)).marked == {}
    within = record(store, "one-model-changed", weights, [{"model.name": name} for name in ("s", "s", "s", "l")])
    assert list(fingerprint_of(within).marked) == ["lora-2"]


def test_a_dirty_working_tree_shared_by_all_is_announced(store: Path) -> None:
    dirty = {"loragrid.git.dirty": "true", "loragrid.git.changes": "sha256:" + "5" * 64}
    comparison = record(store, "dirty", [dirty, dirty])
    assert fingerprint_of(comparison).marked == {}
    assert "dirty working tree: all trials ran code that is not committed" in one_line(text_of(comparison))


def test_a_trial_that_no_worker_began_has_no_fingerprint(store: Path) -> None:
    recorder = Recorder("unbegun", default_tracking_uri(str(store), None))
    recorder.start_sweep("only", {}, {})
    recorder.start_trial("lora-0", {"method.name": "lora", "seed": 0}, TAGS)
    recorder.end_trial("lora-0", "FINISHED")
    recorder.start_trial("lora-1", {"method.name": "lora", "seed": 1}, {"loragrid.version.torch": "2.11.0"})
    recorder.end_trial("lora-1", "FAILED", "its process could not be started")
    recorder.end_sweep("FAILED")
    report = fingerprint_of(load_comparison("unbegun", recorder.tracking_uri))
    assert report.num_trials == 1
    assert report.marked == {}


def test_a_resumed_sweep_shows_trials_that_changed_machines(store: Path) -> None:
    uri = default_tracking_uri(str(store), None)
    recorder = Recorder("resumed", uri)
    recorder.start_sweep("resumed-1", {}, {})
    for index in range(3):
        recorder.start_trial(f"lora-{index}", {"method.name": "lora", "seed": index}, TAGS)
    for index in range(2):
        recorder.end_trial(f"lora-{index}", "FINISHED")
    recorder.end_sweep("KILLED")
    elsewhere = TAGS | {"loragrid.version.torch": "2.11.0"}
    recorder = Recorder("resumed", uri)
    recorder.resume_sweep("resumed-1", {})
    recorder.resume_trial("lora-2", {})
    recorder.tag_trial("lora-2", {**elsewhere, **changes_on_the_way(TAGS, elsewhere)})
    recorder.start_trial("lora-3", {"method.name": "lora", "seed": 3}, elsewhere)
    for index in (2, 3):
        recorder.end_trial(f"lora-{index}", "FINISHED")
    recorder.end_sweep("FINISHED")
    assert fingerprint_of(load_comparison("resumed", uri)).marked == {
        "lora-2": "ran with torch 2.13.0, then 2.11.0, the others with 2.13.0",
        "lora-3": "ran with torch 2.11.0, the others with 2.13.0",
    }


def test_driver_tags_before_the_first_worker_are_no_change() -> None:
    driver = {"loragrid.version.torch": "2.11.0"}
    assert changes_on_the_way(driver, TAGS) == {}
    twice = TAGS | changes_on_the_way(TAGS, {"loragrid.device": "NVIDIA H100"}) | {"loragrid.device": "NVIDIA H100"}
    assert changes_on_the_way(twice, {"loragrid.device": "NVIDIA A100"}) == {
        "loragrid.before.loragrid.device": "NVIDIA H200, then NVIDIA H100"
    }


def test_compare_strict_ends_with_code_two_and_names_what_differs(
    store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record(store, "refused", [{}, {}, {"loragrid.version.torch": "2.11.0"}])

    def compare(*options: str) -> int:
        monkeypatch.setattr(sys, "argv", ["loragrid", "compare", "refused", "--storage", str(store), *options])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0)

    assert compare() == 0
    assert "mixed fingerprints" in capsys.readouterr().out
    assert compare("--strict") == 2
    streams = capsys.readouterr()
    assert "lora-2 ran with torch 2.11.0, the others with 2.13.0" in streams.err
    assert not streams.out


def test_a_worker_reports_its_hardware_weights_and_rows(tiny_llama_dir: Path, chat_jsonl: Path) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "float32")
    tags = WorkerEnvironment(torch.device("cpu"), 2)(setup.trial("lora"), setup.rows)
    assert tags["loragrid.data.digest"] == setup.rows.digest
    assert tags["loragrid.model.weights"].startswith("sha256:")
    assert tags["loragrid.model.dtype"] == "float32"
    assert tags["loragrid.workers"] == "2 × the whole base"
    assert tags["loragrid.version.torch"] == importlib.metadata.version("torch")  # torch itself adds "+cu130"
    assert torch.backends.cpu.get_cpu_capability() in tags["loragrid.device"]
    assert "loragrid.version.cuda" not in tags, "a worker without a GPU runs no CUDA"
    torch.set_float32_matmul_precision("high")
    try:
        assert arithmetic_tags(torch.device("cpu"))["loragrid.precision.float32_matmul"] == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_a_workers_fingerprint_reaches_all_its_trials(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "float32")
    told: dict[str, dict[str, str]] = {}

    def send(update: PackUpdate) -> None:
        for trial_id, tags in update.tags.items():
            told.setdefault(trial_id, {}).update(tags)

    device = torch.device("cpu")
    worker = build_worker(
        lambda model, data: setup.rows,
        send,
        TrialStore(str(tmp_path)),
        ProcessGroup(device=device, isolate_failures=True),
        describe=WorkerEnvironment(device, 1),
    )
    good = [setup.trial("lora", seed=seed, steps=2, measure_steps=0) for seed in (0, 1)]
    bad = setup.trial("lora", {"target_modules": ("no_such_layer",)}, steps=2, measure_steps=0)
    packs = [Pack(pack_id="pack-000", trials=tuple(good)), Pack(pack_id="pack-001", trials=(bad,))]
    run_queue(packs, worker, None)
    for trial in (*good, bad):
        assert told[trial.trial_id]["loragrid.data.digest"] == setup.rows.digest
        assert DEVICE_TAG in told[trial.trial_id]
    assert {told[trial.trial_id][SHAPE_TAG] for trial in good} == {pack_shape(good, EngineConfig())}
    assert SHAPE_TAG not in told[bad.trial_id], "it has no time"


def test_a_continued_trial_keeps_its_first_fingerprint(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    setup = make_setup(tiny_llama_dir, chat_jsonl, "float32")
    trial = setup.trial("lora")
    queue = PackQueue(queue_id="queue-0", packs=(Pack(pack_id="pack-000", trials=(trial,)),))
    uri = default_tracking_uri(str(tmp_path), None)
    for version in ("2.11.0", "2.13.0"):
        recorder = Recorder("again", uri)
        earlier = find_previous("again", uri, None)
        if earlier is None:
            recorder.start_sweep("again-1", {}, {})
        else:
            recorder.resume_sweep("again-1", {})
        store = TrialStore(str(tmp_path / "trials"))
        callback = RecordingCallback(recorder, store, lambda config, _: queue, {}, previous=earlier)
        tune_trial = SimpleNamespace(trial_id="a", config={}, pickled_error_file=None)
        callback.on_trial_start(0, [], tune_trial)
        tags = {trial.trial_id: TAGS | {"loragrid.version.torch": version}}
        update = PackUpdate(pack_id="pack-000", trial_ids=(trial.trial_id,), phase="training", tags=tags)
        callback.on_trial_result(0, [], tune_trial, {"update": update})
        callback.close()  # interrupted
    (tags_of,) = load_comparison("again", uri).tags.values()
    assert tags_of["loragrid.version.torch"] == "2.13.0"
    assert tags_of["loragrid.before.loragrid.version.torch"] == "2.11.0"
    assert "loragrid.before.loragrid.device" not in tags_of, "it stayed the same"


def test_the_revision_of_a_hub_model_is_its_commit() -> None:
    tags = input_tags("some/model@" + "c" * 40, "sha256:rows")
    assert tags["loragrid.model.revision"] == "c" * 40
    assert "loragrid.model.revision" not in input_tags("sha256:" + "1" * 64, "sha256:rows")


def test_a_large_file_is_hashed_once_until_it_changes(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"one")
    remembered_sha256(file)
    notes = cache_folder() / "hashes"
    young = set(notes.glob("*")) if notes.is_dir() else set()
    file.write_bytes(b"two")
    assert remembered_sha256(file) == file_sha256(file), "a file that may still change is not remembered"
    os.utime(file, (1_000_000_000, 1_000_000_000))
    digest = remembered_sha256(file)
    (note,) = set(notes.glob("*")) - young
    assert note.read_text() == digest == file_sha256(file)
    note.write_text("read from the note")
    assert remembered_sha256(file) == "read from the note", "the file is not read a second time"
    file.write_bytes(b"six")
    assert remembered_sha256(file) == file_sha256(file)
