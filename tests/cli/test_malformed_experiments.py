"""A malformed experiment file is refused with exit code 2 and the key; nothing is started or written."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.refusals import Refuses, changed, refuses_in_a_process

VALID: dict[str, Any] = {
    "name": "valid",
    "model": {"name": "/no/such/model"},
    "data": {"name": "no_such_rows.jsonl"},
    "training": {"steps": 20, "batch_size": 4},
    "methods": ["lora", {"name": "lora_plus", "rank": 4}],
    "early_stopping": {"grace_steps": 5},
    "confirm": {"seeds": 3},
}

# Key -> whether 0 is allowed.
NUMBERS = {
    "training.steps": False,
    "training.batch_size": False,
    "training.lr": False,
    "training.warmup_steps": True,
    "training.weight_decay": True,
    "training.clip_norm": False,
    "training.beta1": True,
    "training.beta2": True,
    "training.epsilon": False,
    "training.micro_batch_size": False,
    "training.eval_every": False,
    "training.report_every": False,
    "training.checkpoint_every": False,
    "training.loss_threshold": False,
    "training.measure_steps": True,
    "data.max_length": False,
    "data.num_train": False,
    "data.num_eval": False,
    "workers.num_workers": False,
    "workers.cpus_per_worker": False,
    "pack.max_members": False,
    "early_stopping.grace_steps": False,
    "early_stopping.reduction_factor": False,
    "confirm.seeds": False,
    "methods.1.rank": False,
    "methods.1.alpha": False,
    "methods.1.dropout": True,
    "methods.1.lr_ratio": False,
    "methods.1.lr": False,
}
NO_NUMBERS: list[Any] = [math.nan, math.inf, -math.inf, -1, True, "8", [8], {"a": 8}, 10**400]
TEXTS = (
    "name",
    "question",
    "model.name",
    "model.revision",
    "data.name",
    "data.revision",
    "data.subset",
    "data.split",
    "data.eval_name",
    "data.eval_split",
    "tracking.uri",
    "storage.path",
)
NO_TEXTS: list[Any] = [3, ["a"], {"a": "b"}, True, "a\0b", "a\x1b[31mb", "a" * 5000]
CHOICES = (
    "model.dtype",
    "model.trust_remote_code",
    "data.loss_on",
    "training.schedule",
    "training.activation_checkpointing",
    "workers.use_gpu",
    "engine.mode",
    "engine.deterministic",
    "early_stopping.kind",
    "early_stopping.metric",
    "early_stopping.within",
    "methods.1.rslora",
)
NO_CHOICES: list[Any] = ["x", 1, ["auto"], {}]
SECTIONS = (
    "model",
    "data",
    "training",
    "workers",
    "pack",
    "engine",
    "early_stopping",
    "confirm",
    "tracking",
    "storage",
)
NO_PATHS = [
    "../../x",
    "/etc/x",
    "a/b",
    "..",
    ".",
    "",
    "-rf",
    "a\n",
    "a\0",
    " a",
    "a" * 101,
    "~root",
    "a\\b",
    "a\u202eb",
]
NO_REVISIONS = ["..", "../../x", "/etc/x", "a//b", "a/../b", "a b", "", ".hidden", "main/"]
NO_METHODS: list[Any] = [3, "lora", {}, [], [3], [["lora"]], [None], [{}], [{"name": 3}]]
NO_GRIDS: list[Any] = [3, "seed", [1], {"seed": 3}, {"seed": "12"}, {"seed": {"a": 1}}]
NO_COLUMNS: list[Any] = [3, "text", [1], {"text": 3}, {"text": "a\0"}]
NO_SEEDS: list[Any] = [-1, math.nan, True, "8", 1.5, 2**32, None, [1]]

MUTATIONS: list[tuple[str, object, str]] = [
    *((key, value, key) for key in NUMBERS for value in NO_NUMBERS),
    *((key, 0, key) for key, has_zero in NUMBERS.items() if not has_zero),
    *((key, value, key) for key in TEXTS for value in NO_TEXTS),
    *((key, value, key) for key in CHOICES for value in NO_CHOICES),
    *((section, value, section) for section in SECTIONS for value in (3, "text", [1])),
    *(("methods", value, "methods") for value in NO_METHODS),
    *(("grid", value, "grid") for value in NO_GRIDS),
    *((f"{section}.no_such_key", 1, f"{section}.no_such_key") for section in SECTIONS),
    *((key, 1, key) for key in ("no_such_key", "methods.1.no_such_key", "methods.1.grid.rank", "grid.model.name")),
    *((key, [1], key) for key in ("grid.no_such_axis", "grid.method.no_such", "methods.1.grid.no_such")),
    *(("name", name, "name") for name in NO_PATHS),
    *((key, name, key) for key in ("model.revision", "data.revision") for name in NO_REVISIONS),
    *(("grid.seed", [seed], "grid.seed") for seed in NO_SEEDS),
    *(("data.columns", {key: "a"}, f"data.columns.{key}") for key in ("../x", "no_such")),
    *(("data.columns", value, "data.columns") for value in NO_COLUMNS),
    ("methods.1.target_modules", 3, "methods.1.target_modules"),
    ("methods.1.target_modules", [3], "methods.1.target_modules"),
    ("methods.1.name", "os.system", "methods.1.name"),
    ("methods.1.name", "../lora", "methods.1.name"),
    ("grid", {"seed": list(range(10_001))}, "grid.seed"),
    ("grid", {f"training.{key}": [*range(1, 100)] for key in ("lr", "epsilon", "clip_norm", "weight_decay")}, "grid"),
]


def write(folder: Path, content: str | bytes) -> Path:
    file = folder / "experiment.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def test_the_mapping_that_is_made_wrong_is_right(refuses: Refuses, tmp_path: Path) -> None:
    refuses(write(tmp_path, yaml.safe_dump(VALID)), "model.name: /no/such/model: unknown model")
    assert len(MUTATIONS) > 400


@pytest.mark.parametrize(
    "place", range(len(MUTATIONS)), ids=[f"{key}-{str(value)[:20]!a}" for key, value, _ in MUTATIONS]
)
def test_a_value_that_cannot_be_is_refused_with_its_key(refuses: Refuses, tmp_path: Path, place: int) -> None:
    key, value, named = MUTATIONS[place]
    file = write(tmp_path, yaml.safe_dump(changed(VALID, key, value)))
    refuses(file, f"error: {file}: {named}")


@pytest.mark.parametrize("key", ["name", "model", "data", "training", "methods", "model.name", "training.steps"])
def test_a_key_that_is_missing_is_refused_by_name(refuses: Refuses, tmp_path: Path, key: str) -> None:
    section, _, field = key.partition(".")
    mapping = {name: dict(value) if isinstance(value, dict) else value for name, value in VALID.items()}
    del (mapping[section] if field else mapping)[field or section]
    refuses(write(tmp_path, yaml.safe_dump(mapping)), f"{key}: is missing")


LAUGHS = "a: &a [x, x]\n" + "".join(f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))


@pytest.mark.parametrize(
    ("content", "part"),
    [
        pytest.param(LAUGHS, "line 2: not valid YAML: aliases", id="billion-laughs"),
        pytest.param("name: &a [*a]\n", "line 1: not valid YAML: aliases", id="endless-alias"),
        pytest.param("name: a\n<<: {name: b}\n", "line 2: not valid YAML", id="merge-key"),
        pytest.param("x: !!python/object/apply:os.system ['touch ran']\n", "line 1: not valid YAML", id="apply"),
        pytest.param("x: !!python/object/new:os.mkdir ['ran']\n", "line 1: not valid YAML", id="new"),
        pytest.param("x: !!python/name:os.system\n", "line 1: not valid YAML", id="python-name"),
        pytest.param("x: !!python/module:antigravity\n", "line 1: not valid YAML", id="python-module"),
        pytest.param("x: !no_such_tag 3\n", "line 1: not valid YAML", id="unknown-tag"),
        pytest.param("name: a\nname: b\n", "line 2: not valid YAML: the key 'name' occurs twice", id="twice"),
        pytest.param("model: {name: a, name: b}\n", "the key 'name' occurs twice", id="twice-inside"),
        pytest.param("name: a\n---\nname: b\n", "not valid YAML", id="two-documents"),
        pytest.param("name:\ta\n\t- b\n", "line 1: not valid YAML", id="tabs"),
        pytest.param("[" * 100_000, "nested too deeply", id="deep-lists"),
        pytest.param("{a: " * 50_000, "nested too deeply", id="deep-mappings"),
        pytest.param("x: " + "y" * 300_000, "too large for an experiment file", id="too-large"),
        pytest.param(b"\0" * 300_000, "too large for an experiment file", id="too-large-of-nothing"),
        pytest.param(bytes(range(256)) * 9, "not a text file in UTF-8 (byte 128)", id="binary"),
        pytest.param("name: ä".encode("utf-16"), "not a text file in UTF-8 (byte 0)", id="utf-16"),
        pytest.param(b"name: \xe4\n", "not a text file in UTF-8 (byte 6)", id="latin-1"),
        pytest.param("name: a\0b\n", "not valid YAML", id="nul"),
        pytest.param('question: "\\ud800"\n', "line 1: not valid YAML: '\\ud800' is not text", id="half-character"),
        pytest.param('"\\udfff": 1\n', "line 1: not valid YAML: '\\udfff' is not text", id="half-character-in-key"),
        pytest.param('"\\e]0;owned\\a": 1\n', "unknown key", id="terminal-codes"),
        pytest.param("x: 0x" + "f" * 9000, "x: a value of type int that is too large to show", id="large-number"),
        pytest.param("".join(f"key_{n}: 1\n" for n in range(15_000)), "more", id="many-unknown-keys"),
        pytest.param("methods: [" + "lroa, " * 15_000 + "]", "did you mean 'lora'?", id="many-unknown-methods"),
        pytest.param("? [a, b]\n: 1\n", "not text", id="list-as-key"),
        pytest.param("x: 2001-99-99\n", 'x: "2001-99-99": unknown key', id="date-that-is-none"),
        pytest.param("", "null: is not an experiment", id="empty"),
        pytest.param("just text\n", "is not an experiment", id="text"),
        pytest.param("- name: a\n", "is not an experiment", id="list"),
    ],
)
@pytest.mark.timeout(60)
def test_yaml_that_is_not_plain_is_refused_and_never_run(
    refuses: Refuses, tmp_path: Path, content: str | bytes, part: str
) -> None:
    file = write(tmp_path, content)
    refuses(file, str(file), part)


@pytest.mark.parametrize(
    ("make", "part"),
    [
        pytest.param(lambda path: None, "no such file", id="missing"),
        pytest.param(Path.mkdir, "is not a file", id="folder"),
        pytest.param(os.mkfifo, "is not a file", id="pipe"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), "is not a file", id="device"),
        pytest.param(lambda path: path.symlink_to(path), "cannot be read", id="link-to-itself"),
    ],
)
def test_what_is_no_file_is_refused_by_name(
    refuses: Refuses, tmp_path: Path, make: Callable[[Path], object], part: str
) -> None:
    path = tmp_path / "experiment.yaml"
    make(path)
    refuses(path, str(path), part)


@pytest.mark.heavy
def test_a_real_process_neither_runs_nor_keeps_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "x: !!python/object/apply:os.system ['touch ran']\n")
    refuses_in_a_process(tmp_path, file, f"error: {file}: line 1: not valid YAML")
