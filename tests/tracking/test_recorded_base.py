"""An export compares the base with the trial's record first: changed, moved, shadowed or missing bases are noticed."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from loragrid.config.experiment import ModelConfig
from loragrid.models.base_files import TENSORS, read_json
from loragrid.models.base_record import compare, record_base
from loragrid.models.loading import model_digest
from loragrid.tracking.artifacts import PROVENANCE, export_run
from loragrid.trials.tags import MODEL_CONFIG_TAG, MODEL_FILES_TAG, MODEL_LOCATION_TAG, WEIGHTS_TAG
from tests.support.exported_trials import RecordedTrials, logits_of, record_trials, run_snippet
from tests.support.small_packs import make_setup

OLDER_TAGS = frozenset({MODEL_CONFIG_TAG, MODEL_FILES_TAG, MODEL_LOCATION_TAG})


def other_weights(folder: Path) -> None:
    """Overwrite the weights in a folder."""
    tensors = load_file(folder / "model.safetensors")
    changed = {name: tensor + 0.01 for name, tensor in tensors.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})


def in_shards(folder: Path) -> None:
    """Divide the weights of a folder into many files."""
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


def other_weights_in_shards(folder: Path) -> None:
    other_weights(folder)
    in_shards(folder)


def shards_beside_an_old_file(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "old")
    other_weights_in_shards(folder)
    (folder / "old").rename(folder / "model.safetensors")


def swap_tensors(folder: Path, one: str, other: str) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(read_json(path) | changes))


@pytest.fixture(scope="module")
def trained(
    tiny_llama_dir: Path, chat_jsonl: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, frozenset[str]], RecordedTrials]:
    """Records one LoRA trial per method and set of missing tags."""
    kept: dict[tuple[str, frozenset[str]], RecordedTrials] = {}

    def train(method: str, without_tags: frozenset[str]) -> RecordedTrials:
        if (method, without_tags) not in kept:
            folder = tmp_path_factory.mktemp("trained")
            shutil.copytree(tiny_llama_dir, folder / "base")
            setup = make_setup(folder / "base", chat_jsonl, "float32")
            trials = [replace(setup.trial(method, lr=0.02, steps=2), trial_id="trial")]
            kept[(method, without_tags)] = record_trials(setup, trials, folder, without_tags=without_tags)
        return kept[(method, without_tags)]

    return train


@pytest.fixture
def place(trained: Any, tmp_path: Path) -> Any:
    """A recorded trial and its base, which a test may change: the base is put back afterwards."""
    saved: list[tuple[Path, Path]] = []

    def give(method: str = "lora", without_tags: frozenset[str] = frozenset()) -> tuple[RecordedTrials, Path]:
        recorded = trained(method, without_tags)
        base = Path(recorded.setup.model.name)
        shutil.copytree(base, tmp_path / "kept base")
        saved.append((base, tmp_path / "kept base"))
        return recorded, base

    yield give
    for base, copy in saved:
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(copy, base)


def tokenizer_of_others(base: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["harbour"])
    tokenizer.save_pretrained(base)


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "weights": (other_weights, ["the weights (sha256:"]),
    "rope": (
        lambda base: change_json(base / "config.json", rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
        ["rope_parameters.rope_theta 10000.0 recorded, 500000.0 now"],
    ),
    "dtype": (lambda base: change_json(base / "config.json", dtype="float16"), ["dtype float32 recorded, float16 now"]),
    "a new key": (
        lambda base: change_json(base / "config.json", attention_bias=True),
        ["attention_bias False recorded, True now"],
    ),
    "tokenizer": (tokenizer_of_others, ["tokenizer.json ("]),
    "template": (lambda base: (base / "chat_template.jinja").write_text("x"), ["chat_template.jinja ("]),
    "no template": (lambda base: (base / "chat_template.jinja").unlink(), ["chat_template.jinja (", "absent now"]),
    "slow vocabulary": (
        lambda base: (base / "tokenizer.model").write_bytes(b"x"),
        ["tokenizer.model (absent when recorded"],
    ),
    "other weights in shards": (
        lambda base: other_weights_in_shards(base),
        ["the weights (sha256:"],
    ),
    "an old file beside shards": (
        lambda base: shards_beside_an_old_file(base),
        ["the weights (sha256:"],
    ),
    "swapped tensors": (
        lambda base: swap_tensors(base, "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"),
        ["the weights (sha256:"],
    ),
    "not safetensors": (lambda base: (base / "model.safetensors").write_bytes(b"x" * 99), ["the weights (sha256:"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_merging_into_a_changed_base_is_refused(place: Any, tmp_path: Path, change: str) -> None:
    recorded, base = place()
    before = model_digest(recorded.setup.model)
    apply, parts = CHANGES[change]
    apply(base)
    with pytest.raises(ValueError, match="is not the one that the trial was trained on; these differ: ") as refused:
        export_run("trial", recorded.uri, tmp_path / "out", merged=True)
    message = str(refused.value)
    assert all(part in message for part in parts), message
    assert all(remedy in message for remedy in ("--base", "--force", str(base)))
    if "the weights" in message:
        assert before in message
        assert model_digest(recorded.setup.model) in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept base"]  # nothing was begun


def test_force_exports_and_writes_down_what_differs(place: Any, tmp_path: Path) -> None:
    recorded, base = place()
    other_weights(base)
    export = export_run("trial", recorded.uri, tmp_path / "out", merged=True, force=True)
    (notice,) = export.notices
    assert "merged into another base" in notice
    assert "the weights (sha256:" in notice
    assert notice in (tmp_path / "out" / "README.md").read_text()
    content = read_json(tmp_path / "out" / PROVENANCE)
    assert content["notices"] == [notice]
    assert content["base_recorded"] != content["base_used"]
    (loaded,) = logits_of(run_snippet(export.snippet)["model"], recorded.setup)
    assert (loaded - recorded.logits(0)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "rewrite",
    [
        lambda base: change_json(base / "config.json", transformers_version="9.9.9", _name_or_path="elsewhere"),
        lambda base: (base / "config.json").write_text(json.dumps(read_json(base / "config.json"), indent=7)),
        lambda base: (base / "README.md").write_text("mine"),
        lambda base: (base / "trainer_state.json").write_text("{}"),
        lambda base: os.utime(base / "model.safetensors", (1, 1)),
        in_shards,
        lambda base: save_file(load_file(base / "model.safetensors"), base / "model.safetensors", metadata={"a": "b"}),
    ],
    ids=["library version", "layout", "readme", "trainer state", "times", "shards", "metadata"],
)
def test_a_rewritten_equal_base_is_accepted(place: Any, tmp_path: Path, rewrite: Callable[[Path], object]) -> None:
    recorded, base = place()
    rewrite(base)
    assert export_run("trial", recorded.uri, tmp_path / "out", merged=True).notices == ()


def test_an_older_record_does_not_tell_shards_from_weights(place: Any) -> None:
    recorded, base = place()
    before = record_base(recorded.setup.model)
    older = replace(before, files={name: digest for name, digest in before.files.items() if name != TENSORS})
    assert compare(older, before) == []
    in_shards(base)
    now = record_base(recorded.setup.model)
    assert compare(before, now) == []
    (difference,) = compare(older, now)
    assert "does not tell whether their tensors differ or only the shards" in difference.text


def test_another_generation_config_is_no_reason_to_refuse(place: Any, tmp_path: Path) -> None:
    recorded, base = place()
    change_json(base / "generation_config.json", max_new_tokens=5)
    (notice,) = export_run("trial", recorded.uri, tmp_path / "out", merged=True).notices
    assert notice.startswith("differs: generation_config.json")
    assert read_json(tmp_path / "out" / "generation_config.json")["max_new_tokens"] == 5


def test_an_adapter_names_a_changed_base(place: Any, tmp_path: Path) -> None:
    """Its tensors need no base, so it is written; but PEFT will load it onto other weights."""
    recorded, base = place()
    other_weights(base)
    (notice,) = export_run("trial", recorded.uri, tmp_path / "out").notices
    assert "is not the one that the adapter was trained on; these differ: the weights (sha256:" in notice
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_an_adapter_takes_no_other_tokenizer(place: Any, tmp_path: Path) -> None:
    recorded, base = place()
    tokenizer_of_others(base)
    (notice,) = export_run("trial", recorded.uri, tmp_path / "out").notices
    assert "its tokenizer is left out" in notice
    assert not (tmp_path / "out" / "tokenizer.json").exists()


def test_a_full_model_minds_the_tokenizer_only(place: Any, tmp_path: Path) -> None:
    recorded, base = place("full")
    own = read_json(base / "config.json")
    other_weights(base)
    change_json(base / "config.json", rms_norm_eps=0.5)
    export = export_run("trial", recorded.uri, tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json") == own
    (loaded,) = logits_of(run_snippet(export.snippet)["model"], recorded.setup)
    assert torch.equal(loaded, recorded.logits(0))
    tokenizer_of_others(base)
    with pytest.raises(ValueError, match=r"these differ: .*tokenizer.json"):
        export_run("trial", recorded.uri, tmp_path / "out2")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_base_that_is_gone_is_named_with_a_remedy(place: Any, tmp_path: Path, method: str) -> None:
    recorded, base = place(method)
    moved = tmp_path / "moved"
    shutil.move(base, moved)
    with pytest.raises(ValueError, match=rf"the base {base} is not found: .*; allowed: --base"):
        export_run("trial", recorded.uri, tmp_path / "out", merged=True)
    export = export_run("trial", recorded.uri, tmp_path / "out", merged=True, base=str(moved))
    assert export.notices[method == "full" :] == ()
    (loaded,) = logits_of(run_snippet(export.snippet)["model"], recorded.setup)
    assert (loaded - recorded.logits(0)).abs().max() <= 1e-5


def test_an_adapter_without_its_base_is_still_exported(place: Any, tmp_path: Path) -> None:
    recorded, base = place()
    shutil.rmtree(base)
    (notice,) = export_run("trial", recorded.uri, tmp_path / "out").notices
    assert notice.startswith("without a tokenizer: the base")
    assert read_json(tmp_path / "out" / "adapter_config.json")["base_model_name_or_path"] == str(base)


def test_another_folder_given_as_base_is_compared_too(place: Any, tmp_path: Path) -> None:
    recorded, base = place()
    other = tmp_path / "other"
    shutil.copytree(base, other)
    other_weights(other)
    with pytest.raises(ValueError, match=rf"the base in {other} is not the one"):
        export_run("trial", recorded.uri, tmp_path / "out", merged=True, base=str(other))
    with pytest.raises(ValueError, match=r"is not found: .*holds no config.json"):
        export_run("trial", recorded.uri, tmp_path / "out", merged=True, base=str(tmp_path))


@pytest.fixture
def relative(
    tiny_llama_dir: Path, chat_jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[frozenset[str]], RecordedTrials]:
    """Trains in the folder `here` on the base `models/mine`, and goes to the folder `there`."""

    def train(without_tags: frozenset[str]) -> RecordedTrials:
        here, there = tmp_path / "here", tmp_path / "there"
        there.mkdir()
        shutil.copytree(tiny_llama_dir, here / "models" / "mine")
        monkeypatch.chdir(here)
        setup = make_setup(here / "models" / "mine", chat_jsonl, "float32")
        trial = setup.trial("lora", lr=0.02, steps=2)
        model = ModelConfig(name="models/mine", dtype="float32")
        recorded = record_trials(
            setup, [replace(trial, trial_id="trial", model=model)], here, without_tags=without_tags
        )
        monkeypatch.chdir(there)
        return recorded

    return train


def test_a_relative_base_is_found_from_elsewhere(relative: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    recorded = relative(frozenset())
    shutil.copytree(tiny_llama_dir, "models/mine")
    other_weights(Path("models/mine"))  # a base of the same name, seen from here
    export = export_run("trial", recorded.uri, "out", merged=True)
    assert export.notices == ()
    (loaded,) = logits_of(run_snippet(export.snippet)["model"], recorded.setup)
    assert (loaded - recorded.logits(0)).abs().max() <= 1e-5
    export_run("trial", recorded.uri, "adapter")
    named = read_json(Path("adapter/adapter_config.json"))["base_model_name_or_path"]
    assert named == str(tmp_path / "here" / "models" / "mine")


def test_an_equal_base_from_here_replaces_a_changed_one(relative: Any, tiny_llama_dir: Path, tmp_path: Path) -> None:
    recorded = relative(frozenset())
    shutil.copytree(tiny_llama_dir, "models/mine")
    other_weights(tmp_path / "here" / "models" / "mine")
    export = export_run("trial", recorded.uri, "out", merged=True)
    assert export.notices == ()
    (loaded,) = logits_of(run_snippet(export.snippet)["model"], recorded.setup)
    assert (loaded - recorded.logits(0)).abs().max() <= 1e-5


def test_a_folder_is_never_replaced_by_a_hub_model(
    relative: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask(*_: object) -> None:
        pytest.fail("the hub was asked for a folder's name")

    recorded = relative(OLDER_TAGS)
    monkeypatch.setattr("loragrid.models.loading.resolve_commit", ask)
    with pytest.raises(ValueError, match=r"the base models/mine is not found: .*--base"):
        export_run("trial", recorded.uri, "out", merged=True)


def test_an_older_record_compares_what_it_has(place: Any, tmp_path: Path) -> None:
    recorded, base = place(without_tags=OLDER_TAGS)
    export = export_run("trial", recorded.uri, tmp_path / "out", merged=True)
    assert export.notices == (
        "the record of this trial does not identify its tokenizer, so the tokenizer was not compared",
    )
    before = model_digest(recorded.setup.model)
    other_weights(base)
    with pytest.raises(ValueError, match=r"weights or config\.json") as refused:
        export_run("trial", recorded.uri, tmp_path / "out2", merged=True)
    assert before in str(refused.value)
    assert model_digest(recorded.setup.model) in str(refused.value)


def test_a_record_without_digests_says_so(place: Any, tmp_path: Path) -> None:
    recorded, base = place(without_tags=OLDER_TAGS | {WEIGHTS_TAG})
    other_weights(base)
    export = export_run("trial", recorded.uri, tmp_path / "out", merged=True)
    assert export.notices == ("the record of this trial does not identify its base, so the base was not compared",)
