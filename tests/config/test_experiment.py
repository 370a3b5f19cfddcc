"""An experiment file is read correctly, or refused with file, key, value and what is allowed."""

import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from loragrid.config.experiment import (
    DataConfig,
    Experiment,
    ExperimentError,
    MethodConfig,
    ModelConfig,
    TrainingConfig,
)
from loragrid.trials.load import experiment_from_mapping, load_experiment
from loragrid_methods import get_method

EXPERIMENTS = sorted((Path(__file__).parents[2] / "experiments").glob("*.yaml"))
FILE = """\
name: small
question: Which one?
model: {name: some-model}
data: {name: chitchat}
training: {steps: 20, batch_size: 4, lr: 1e-3}
methods:
  - lora
  - {name: vera, lr: 1.0e-2, grid: {rank: [64, 256]}}
grid:
  seed: [0, 1]
  method.rank: [4, 8]
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "small.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, *overrides: str) -> str:
    with pytest.raises(ExperimentError) as caught:
        load_experiment(write(folder, FILE), overrides)
    return str(caught.value)


def test_a_file_becomes_an_experiment_with_the_defaults_filled_in(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, FILE))
    assert experiment.model == ModelConfig(name="some-model", dtype="bfloat16", revision=None, trust_remote_code=False)
    assert experiment.training.lr == 1e-3
    assert experiment.training.schedule == "cosine"
    assert [block.name for block in experiment.methods] == ["lora", "vera"]
    assert experiment.methods[1].settings == {"lr": 1e-2}
    assert experiment.methods[1].grid == {"rank": (64, 256)}
    assert experiment.pack.max_members == "auto"
    assert experiment.storage.path == "loragrid-store"


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_file_loads_and_asks_a_question(path: Path) -> None:
    experiment = load_experiment(path)
    assert experiment.name == path.stem
    assert experiment.question.endswith("?")


def test_the_experiments_of_the_project_are_found() -> None:
    expected = {"quickstart", "methods_at_equal_rank", "lora_plus_ratio", "rank_sweep", "llama_3b_gpu"}
    assert expected <= {path.stem for path in EXPERIMENTS}


def test_importing_the_configuration_loads_neither_torch_nor_ray() -> None:
    code = "import sys, loragrid.config; print([m for m in ('torch', 'ray', 'loragrid_methods') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("override", "key", "value", "rest"),
    [
        ("training.stepz=3", "training.stepz", "3", "did you mean 'steps'"),
        ("training.steps=true", "training.steps", "true", "allowed: a whole number from 1"),
        ("training.steps=0", "training.steps", "0", "allowed: a whole number from 1"),
        ("training.steps=2.5", "training.steps", "2.5", "allowed: a whole number from 1"),
        ("training.steps='20'", "training.steps", '"20"', "leave out the quotes"),
        ("training.steps=[10, 20]", "training.steps", "[10, 20]", "only inside a grid: block"),
        ("training.lr=-1", "training.lr", "-1", "allowed: a number above 0"),
        ("training.lr=.nan", "training.lr", "NaN", "allowed: a number above 0"),
        ("training.lr=.inf", "training.lr", "Infinity", "allowed: a number above 0"),
        ("training.beta1=1.0", "training.beta1", "1.0", "allowed: a number of at least 0 and below 1"),
        ("training.schedule=cosin", "training.schedule", '"cosin"', "allowed: constant, linear, cosine"),
        ("training.warmup_steps=21", "training.warmup_steps", "21", "allowed: a whole number from 0 to 20"),
        ("training=null", "training", "null", "allowed: a mapping with the keys steps"),
        ("model.dtype=float16", "model.dtype", '"float16"', "allowed: bfloat16, float32, float64"),
        ("model.revision=1234567", "model.revision", "1234567", "put it in quotes"),
        ("model.trust_remote_code=1", "model.trust_remote_code", "1", "allowed: true or false"),
        ('data.name="a\\0b"', "data.name", '"a\\u0000b"', "allowed: text on one line"),
        ("data.columns.promt=q", "data.columns.promt", '"q"', "allowed: prompt, completion, messages, text"),
        ("data.max_length=1", "data.max_length", "1", "allowed: a whole number of tokens from 2"),
        ("pack.max_members=0", "pack.max_members", "0", "allowed: auto, or a whole number from 1"),
        ("workers.use_gpu=maybe", "workers.use_gpu", '"maybe"', "allowed: auto, true, false"),
        ("workers.num_workers=3", "workers.num_workers", "3", "allowed: a divisor of 4"),
        ("workers.strategy=split", "workers.strategy", '"split"', "allowed: replicate, shard"),
        ("workers.strategy=shard", "workers.strategy", '"shard"', "allowed: replicate, or workers.num_workers from 2"),
        ("training.micro_batch_size=3", "training.micro_batch_size", "3", "allowed: a divisor of 4, or null"),
        ("training.micro_batch_size=8", "training.micro_batch_size", "8", "allowed: a divisor of 4, or null"),
        ("training.micro_batch_size=0", "training.micro_batch_size", "0", "allowed: a whole number from 1"),
        ("methods.lora.micro_batch_size=2", "methods.0.micro_batch_size", "2", "unknown setting of lora"),
        ("grid.training.micro_batch_size=[1, 2]", "grid.training.micro_batch_size", "[1, 2]", "cannot be an axis"),
        ("name=../../etc", "name", '"../../etc"', "allowed: letters, digits"),
        ("name=.", "name", '"."', "allowed: letters, digits"),
        ("methods=[lroa]", "methods.0.name", '"lroa"', "did you mean 'lora'"),
        ("methods=[]", "methods", "[]", "allowed: a list of at least one method"),
        ("methods=[3]", "methods.0", "3", "allowed: a method's name"),
        ("methods.lora.rnak=3", "methods.0.rnak", "3", "did you mean 'rank'"),
        (
            "methods.lora.lr_ratio=3",
            "methods.0.lr_ratio",
            "3",
            "unknown setting of lora, here a method's key lr_ratio (of the method lora_plus); allowed: rank",
        ),
        ("methods.lora.steps=3", "methods.0.steps", "3", "unknown setting of lora"),
        ("methods.lora.modules_to_save=[lm_head]", "methods.0.modules_to_save", '["lm_head"]', "the method full"),
        ("methods.lora.trainable_token_indices=[3]", "methods.0.trainable_token_indices", "[3]", "the method full"),
        ("methods.lora.target_parameters=[w]", "methods.0.target_parameters", '["w"]', "names of linear layers"),
        ("methods.lora.layers_to_transform=[a]", "methods.0.layers_to_transform", '["a"]', "a list of whole numbers"),
        ("methods.lora.alpha=0", "methods.0.alpha", "0.0", "allowed: a positive number"),
        ("methods.lora.rank=true", "methods.0.rank", "true", "allowed: a whole number"),
        ("methods.lora.rank=[4, 8]", "methods.0.rank", "[4, 8]", "only inside a grid: block"),
        ("methods.lora.alpha=.nan", "methods.0.alpha", "NaN", "allowed: a number"),
        ("methods.vera.lr=0", "methods.1.lr", "0", "allowed: a number above 0"),
        ("methods.lora.grid.alpha=[8, -8]", "methods.0.grid.alpha", "-8.0", "allowed: a positive number"),
        ("methods.lora.grid.rank=8", "methods.0.grid.rank", "8", "a list of its values"),
        ("methods.lora.grid.name=[vera]", "methods.0.grid.name", '"vera"', "unknown setting of lora"),
        ("grid.seed=3", "grid.seed", "3", "allowed: a list such as [1, 2]"),
        ("grid.seed=[]", "grid.seed", "[]", "allowed: at least one value"),
        ("grid.seed=[1, 1]", "grid.seed", "[1, 1]", "the value 1 occurs twice"),
        ("grid.seed=[-1]", "grid.seed", "-1", "allowed: a whole number from 0"),
        ("grid.rank=[3]", "grid.rank", "[3]", "did you mean 'method.rank'"),
        ("grid.training.stepz=[3]", "grid.training.stepz", "[3]", "did you mean 'training.steps'"),
        ("grid.training.report_every=[3]", "grid.training.report_every", "[3]", "cannot be an axis"),
        ("grid.data.columns=[a]", "grid.data.columns", '["a"]', "unknown axis"),
        ("grid.method.rank=[0]", "grid.method.rank", "0", "allowed: a whole number of at least 1"),
        ("grid.method.rank=[a]", "grid.method.rank", '"a"', "allowed: a whole number"),
        ("wrokers=3", "wrokers", "3", "did you mean 'workers'"),
    ],
)
def test_a_mistake_names_file_key_value_and_allowed(
    tmp_path: Path, override: str, key: str, value: str, rest: str
) -> None:
    message = refusal(tmp_path, override)
    assert message.startswith(f"{tmp_path / 'small.yaml'} (--set): {key}: {value}: "), message
    assert rest in message
    assert len(message.splitlines()) == 1


def test_a_base_that_a_method_writes_is_not_sharded(tmp_path: Path) -> None:
    message = refusal(tmp_path, "methods=[lora, full]", "workers.strategy=shard", "workers.num_workers=2", "grid={}")
    assert message.endswith(
        'workers.strategy: "shard": full writes the base, but only a frozen base can be sharded; '
        "allowed: replicate, or methods without full"
    )
    assert len(message.splitlines()) == 1


def test_a_method_that_declares_an_obstacle_is_not_sharded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(get_method("vera"), "sharding_obstacle", "reads whole columns, which no worker has")
    message = refusal(tmp_path, "methods=[lora, vera]", "workers.strategy=shard", "workers.num_workers=2", "grid={}")
    assert message.endswith(
        'workers.strategy: "shard": vera reads whole columns, which no worker has; '
        "allowed: replicate, or methods without vera"
    )


def test_a_micro_batch_divides_the_rows_of_one_worker(tmp_path: Path) -> None:
    overrides = ["training.micro_batch_size=4", "workers.num_workers=2"]
    with pytest.raises(ExperimentError, match=r"training\.micro_batch_size: 4: cannot cut the 2 rows"):
        load_experiment(write(tmp_path, FILE), overrides)
    experiment = load_experiment(write(tmp_path, FILE), [*overrides, "training.batch_size=16"])
    assert experiment.training.rows_at_once(experiment.workers.num_workers) == 4


def test_a_mistake_in_the_file_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(ExperimentError) as caught:
        load_experiment(write(tmp_path, FILE.replace("steps: 20", "steps: 0")), ["training.batch_size=8"])
    assert str(caught.value).startswith(f"{tmp_path / 'small.yaml'}: training.steps: 0: ")


def test_all_mistakes_are_told_at_once_one_to_a_line(tmp_path: Path) -> None:
    lines = refusal(
        tmp_path, "training.lr=-1", "methods.lora.rnak=3", "methods.vera.rnak=3", "pack.max_members=0"
    ).splitlines()
    assert [line.split(": ")[1] for line in lines] == [
        "training.lr",
        "methods.0.rnak",
        "methods.1.rnak",
        "pack.max_members",
    ]


@pytest.mark.parametrize("key", ["name", "model", "data", "training", "methods"])
def test_a_missing_section_is_named(tmp_path: Path, key: str) -> None:
    mapping = {
        "name": "x",
        "model": {"name": "m"},
        "data": {"name": "d"},
        "training": {"steps": 1},
        "methods": ["lora"],
    }
    experiment_from_mapping(mapping, "x.yaml")
    del mapping[key]
    with pytest.raises(ExperimentError, match=rf"^x\.yaml: {key}: is missing; allowed: "):
        experiment_from_mapping(mapping, "x.yaml")


def test_an_axis_that_applies_to_no_method_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "grid.method.lr_ratio=[4, 16]")
    assert "grid.method.lr_ratio: unknown axis: no method here (lora, vera) has 'lr_ratio'" in message
    own_everywhere = refusal(tmp_path, "methods.lora.rank=2")
    assert "grid.method.rank: [4, 8]: every method that has rank (lora, vera) sets its own" in own_everywhere
    own_rate = refusal(tmp_path, "methods=[{name: lora, lr: 1e-3}]", "grid.training.lr=[1e-3, 1e-4]")
    assert "grid.training.lr: [0.001, 0.0001]: every method sets its own lr" in own_rate


def test_a_value_outside_its_own_axis_is_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, "grid.training.lr=[1e-2, 1e-4]")
    assert "training.lr: 0.001: is not among the values of the axis grid.training.lr; allowed: 0.01, 0.0001" in message
    load_experiment(write(tmp_path, FILE), ["grid.training.lr=[1e-3, 1e-4]"])
    message = refusal(tmp_path, "methods.vera.rank=64")
    assert "methods.1.grid.rank: [64, 256]: is set to one value and is an axis too" in message


def test_the_same_trial_twice_is_refused_naming_both_places(tmp_path: Path) -> None:
    message = refusal(tmp_path, "methods=[lora, {name: lora, alpha: 16}]")
    expected = "lora at method.rank 4, seed 0 is the same trial as methods.0 (lora at method.rank 4, seed 0)"
    assert expected in message


def test_too_many_trials_are_refused_before_they_are_made(tmp_path: Path) -> None:
    seeds = str(list(range(3000)))
    assert "the axes make 12000 trials; allowed: at most 10000" in refusal(tmp_path, f"grid.seed={seeds}")


def test_numbers_with_an_exponent_need_no_dot(tmp_path: Path) -> None:
    text = FILE.replace("lr: 1.0e-2", "lr: 1E2").replace("seed: [0, 1]", "training.epsilon: [1e-8, .5e-6, 1.0e3]")
    experiment = load_experiment(write(tmp_path, text))
    assert experiment.training.lr == 0.001
    assert experiment.methods[1].settings["lr"] == 100.0
    assert experiment.grid["training.epsilon"] == (1e-8, 0.5e-6, 1000.0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("name: a\nname: b\n", "line 2: not valid YAML: the key 'name' occurs twice"),
        ("model: {name: a, name: b}\n", "line 1: not valid YAML: the key 'name' occurs twice"),
        ("a: &x [1]\nb: *x\n", "line 2: not valid YAML: aliases"),
        ("a: &x [*x]\n", "line 1: not valid YAML: aliases"),
        ("a: !!python/object/apply:os.system [touch /tmp/x]\n", "line 1: not valid YAML: the tag !!python"),
        ("name: [unclosed\n", "not valid YAML"),
        ("true: 3\n", "the key 'true' is not text"),
        ("a: 2001-99-99\n", 'a: "2001-99-99": unknown key'),
        ("a: " + "9" * 5000 + "\n", "not valid YAML"),
        ("[" * 20000, "not valid YAML: nested too deeply"),
        ("a: \x07\n", "not valid YAML"),
        ("", "null: is not an experiment"),
        ("- a\n- b\n", '["a", "b"]: is not an experiment'),
        ("--- a\n--- b\n", "not valid YAML"),
        ("x: " + "y" * 300_000, "too large for an experiment file"),
        ("1: 2\n", "the key '1' is not text"),
        ('"\\e[31mred": 1\n', "unknown key"),
    ],
)
def test_a_file_that_is_not_plain_yaml_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ExperimentError) as caught:
        load_experiment(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert complaint in message
    assert message.replace("\n", "").isprintable()
    assert all(len(line) < 800 for line in message.splitlines())


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    write(tmp_path, FILE)
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(bytes(range(256)))
    for path, complaint in [
        (tmp_path / "smal.yaml", f"no such file, did you mean '{tmp_path / 'small.yaml'}'?"),
        (tmp_path / "nowhere" / "small.yaml", "no such file (nor a folder"),
        (tmp_path, "is not a file"),
        (Path("/dev/zero"), "is not a file"),
        (binary, "not a text file in UTF-8"),
        (Path("a\0b"), "cannot be read"),
    ]:
        with pytest.raises(ExperimentError) as caught:
            load_experiment(path)
        assert complaint in str(caught.value)


def test_overrides_reach_every_place_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, FILE)
    overrides = [
        "training.lr=1e-4",
        "training.clip_norm=null",
        "methods.0.alpha=32",
        "methods.vera.lr=3e-3",
        "grid.method.rank=[2]",
        "grid.model.dtype=[bfloat16, float32]",
        "data.columns.text=body",
        "workers.num_workers=2",
        "question=a=b",
    ]
    experiment = load_experiment(path, overrides)
    assert (experiment.training.lr, experiment.training.clip_norm) == (1e-4, None)
    assert [block.settings for block in experiment.methods] == [{"alpha": 32.0}, {"lr": 3e-3}]
    assert experiment.grid == {"seed": (0, 1), "method.rank": (2,), "model.dtype": ("bfloat16", "float32")}
    assert experiment.data.columns == {"text": "body"}
    assert experiment.workers.num_workers == 2
    assert experiment.question == "a=b"


def test_an_override_changes_a_copy_of_every_matching_block() -> None:
    mapping: dict[str, Any] = {
        "name": "x",
        "model": {"name": "m"},
        "data": {"name": "d"},
        "training": {"steps": 1},
        "methods": [{"name": "lora", "alpha": 8}, "vera", {"name": "lora", "alpha": 16}],
    }
    experiment = experiment_from_mapping(mapping, "x", ["methods.lora.rank=2", "training.steps=5"])
    assert [block.settings.get("rank") for block in experiment.methods] == [2, None, 2]
    assert mapping["training"] == {"steps": 1}
    assert mapping["methods"][0] == {"name": "lora", "alpha": 8}


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("steps", "--set: steps: is not an override; allowed: key.path=value"),
        ("=3", "--set: =3: is not an override"),
        ("training..lr=3", "is not an override"),
        ("model.name.x=3", '--set: model.name.x: 3: there are no keys in "some-model"'),
        ("methods.9.rank=3", 'there is no method \'9\'; the methods are 0 ("lora"), 1 ("vera")'),
        ("methods.lroa.rank=3", "there is no method 'lroa'"),
        ("name=[", "--set name: line 1: not valid YAML"),
    ],
)
def test_an_override_that_leads_nowhere_is_refused(tmp_path: Path, override: str, complaint: str) -> None:
    assert complaint in refusal(tmp_path, override)


def python_experiment(**changes: Any) -> Experiment:
    sections: dict[str, Any] = {
        "name": "x",
        "model": ModelConfig(name="m"),
        "data": DataConfig(name="d"),
        "training": TrainingConfig(steps=3),
        "methods": ["lora"],
    }
    return Experiment(**(sections | changes))


def test_an_experiment_in_python_equals_the_file(tmp_path: Path) -> None:
    written = Experiment(
        name="small",
        question="Which one?",
        model=ModelConfig(name="some-model"),
        data={"name": "chitchat"},
        training=TrainingConfig(steps=20, batch_size=4, lr=1e-3),
        methods=["lora", MethodConfig(name="vera", lr=1e-2, grid={"rank": [64, 256]})],
        grid={"seed": [0, 1], "method.rank": [4, 8]},
    )
    assert written == load_experiment(write(tmp_path, FILE))


def test_python_gets_the_same_checks_as_a_file() -> None:
    python_experiment()
    mistakes: list[tuple[dict[str, Any], str]] = [
        ({"methods": [{"name": "lora", "rnak": 3}]}, "rnak"),
        ({"grid": {"method.rnak": [3]}}, "method.rnak"),
        ({"grid": {"seed": []}}, "seed"),
        ({"nme": 3}, "nme"),
    ]
    for changes, key in mistakes:
        with pytest.raises(ValueError, match=key):
            python_experiment(**changes)
    with pytest.raises(ValueError, match="lr"):
        TrainingConfig(steps=3, lr=math.nan)
    with pytest.raises(ValueError, match="did you mean 'rank'"):
        MethodConfig(name="lora", rnak=3)


def test_values_take_the_type_of_their_field() -> None:
    block = MethodConfig(name="lora", alpha=16, target_modules=["q_proj"], grid={"dropout": [0, 0.5]})
    assert repr(block.settings) == "{'alpha': 16.0, 'target_modules': ('q_proj',)}"
    assert repr(block.grid) == "{'dropout': (0.0, 0.5)}"


def test_sections_cannot_be_changed_and_can_group_trials(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, FILE))
    with pytest.raises(ValueError, match="frozen"):
        experiment.training.lr = 3.0
    assert len({DataConfig(name="a", columns={"text": "b"}), DataConfig(name="a", columns={"text": "b"})}) == 1


def test_an_experiment_and_its_refusal_survive_the_way_between_processes(tmp_path: Path) -> None:
    experiment = load_experiment(write(tmp_path, FILE))
    assert pickle.loads(pickle.dumps(experiment)) == experiment
    assert Experiment.model_validate(experiment.model_dump(mode="json", exclude_unset=True)) == experiment
    with pytest.raises(ExperimentError) as caught:
        load_experiment(write(tmp_path, FILE), ["training.lr=-1"])
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (["early_stopping.grace_steps=20"], "early_stopping.grace_steps", "no trial of 20 steps would ever be stopped"),
        (["early_stopping.reduction_factor=3"], "early_stopping.grace_steps", "is missing"),
        (["early_stopping.grace_steps=2", "early_stopping.reduction_factor=1"], "reduction_factor", "from 2 to 1000"),
        (["early_stopping.grace_steps=2", "early_stopping.metric=accuracy"], "metric", "eval/loss, train/loss"),
        (["early_stopping.grace_steps=2", "early_stopping.kind=hyperband"], "kind", "successive_halving"),
        (["early_stopping.grace_steps=2", "early_stopping.within=queue"], "within", "method, sweep"),
    ],
)
def test_early_stopping_that_could_not_work_is_refused(
    tmp_path: Path, overrides: list[str], key: str, said: str
) -> None:
    message = refusal(tmp_path, *overrides)
    assert key in message
    assert said in message


@pytest.mark.parametrize(
    ("overrides", "key", "said"),
    [
        (["confirm.seeds=2"], "confirm.seeds", "from 3 to 1000; fewer seeds support no claim about a method"),
        (["confirm.seeds=1001"], "confirm.seeds", "from 3 to 1000"),
        (["confirm.sets=3"], "confirm.sets", "seeds"),
        (["confirm={}", f"grid={{seed: [{2**32 - 3}]}}"], "grid.seed", f"whole numbers from 0 to {2**32 - 4}"),
    ],
)
def test_a_confirmation_that_could_show_nothing_is_refused(
    tmp_path: Path, overrides: list[str], key: str, said: str
) -> None:
    message = refusal(tmp_path, *overrides)
    assert key in message
    assert said in message


def test_nothing_is_confirmed_by_default(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path, FILE)).confirm is None
    asked = load_experiment(write(tmp_path, FILE), ["confirm={}"]).confirm
    assert asked is not None
    assert asked.seeds == 3
    assert load_experiment(write(tmp_path, FILE), ["confirm={}", f"grid={{seed: [{2**32 - 4}]}}"]).confirm is not None


def test_early_stopping_is_off_by_default(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path, FILE)).early_stopping is None
    asked = load_experiment(write(tmp_path, FILE), ["early_stopping={grace_steps: 2}"]).early_stopping
    assert asked is not None
    assert (asked.metric, asked.grace_steps, asked.reduction_factor, asked.within) == ("eval/loss", 2, 3, "method")
