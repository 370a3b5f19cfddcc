"""The generated reference is complete and its examples are valid."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from pydantic.fields import FieldInfo

import loragrid as lg
from docs.generate import experiment_file
from docs.generate.collect import BrokenLinkError, pages_of, with_page_links
from docs.generate.command_line import command_line_page, commands
from docs.generate.examples import examples_page
from docs.generate.experiment_file import example_of, experiment_file_page, keys_with_fields
from docs.generate.markdown import MissingDescriptionError
from docs.generate.methods import methods_page
from docs.generate.metrics_and_tags import OTHER_TAGS, PREFIXES, metrics_and_tags_page
from loragrid.comparison.fingerprint import PARTS
from loragrid.config.experiment import Experiment, TrainingConfig
from loragrid.schema.fields import Section
from loragrid.trials.metrics import CURVE_METRICS, summary_metrics, sweep_metrics
from loragrid_methods import get_method, method_names
from tests.support.documents import ROOT, with_minimal

KEYS = list(keys_with_fields())


def path_of(section: str, key: str) -> str:
    return f"{section}.{key}" if section else key


def test_the_page_has_every_key_with_its_default() -> None:
    page = experiment_file_page()
    for section, _, key, field in KEYS:
        entry = page.partition(f"### `{path_of(section, key)}`")[2].partition("\n##")[0]
        assert str(field.description).split("`")[0].split("_")[0] in entry
        assert "```yaml" in entry
    assert "| a whole number of tokens from 2 on | `512` | tokens |" in page


@pytest.mark.parametrize(("section", "model", "key", "field"), KEYS, ids=[path_of(key[0], key[2]) for key in KEYS])
def test_examples_of_a_key_are_valid(section: str, model: type[Section], key: str, field: FieldInfo) -> None:
    assert field.examples
    for example in field.examples:
        experiment = with_minimal(example_of(section, model, key, example))
        if key == "test_split" or key == "test_name":
            experiment["data"]["num_test"] = 1
        if key == "num_forgetting":
            experiment["data"]["forgetting_name"] = "text.txt"
        if section == "workers":
            experiment["workers"]["num_workers"] = experiment["workers"].get("num_workers", 2)
        if key == "answer_at":
            experiment["task"]["answer_after"] = "####"
        if section == "task" and key in ("top_p", "seed"):
            experiment["task"]["temperature"] = 1.0
        lg.experiment_from_mapping(experiment, path_of(section, key))


def test_a_key_without_a_description_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingConfig.model_fields["lr"], "description", None)
    with pytest.raises(MissingDescriptionError, match=r"training\.lr: the field has no description"):
        experiment_file_page()


def test_a_key_without_an_example_stops_the_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingConfig.model_fields["lr"], "examples", None)
    with pytest.raises(MissingDescriptionError, match=r"training\.lr: the field has no examples"):
        experiment_file_page()


def test_every_section_has_a_heading() -> None:
    page = experiment_file_page()
    for name, field in Experiment.model_fields.items():
        is_section = experiment_file.section_of(field.annotation) is not None or name == "methods"
        assert f"\n## {name}\n" in page if is_section else f"\n### `{name}`" in page


def test_every_metric_and_fingerprint_tag_is_listed() -> None:
    page = metrics_and_tags_page()
    for key in (*CURVE_METRICS, *summary_metrics(), *sweep_metrics(), *(part.tag for part in PARTS)):
        assert f"| `{key}` |" in page


def tags_in_the_code() -> Iterator[str]:
    """Every text that looks like a tag and is no name of a module."""
    rooms = {path.name for path in (ROOT / "platform" / "loragrid").iterdir()}
    for path in (ROOT / "platform").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if re.fullmatch(r"loragrid(\.[a-z_0-9]+)+\.?", text) and text.split(".")[1] not in rooms:
                yield text


def test_every_tag_in_the_code_is_listed() -> None:
    listed = {*OTHER_TAGS, *(part.tag for part in PARTS)}
    found = set(tags_in_the_code())
    assert "loragrid.kind" in found
    for tag in found:
        assert tag in listed or tag.startswith(tuple(PREFIXES)), tag


def test_every_command_and_option_is_listed() -> None:
    page = command_line_page()
    for name, command in commands().items():
        section = page.partition(f"## loragrid {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            assert (parameter.opts[0] if parameter.param_type_name == "option" else parameter.name.upper()) in section


def test_every_method_is_listed_with_its_hyperparameters() -> None:
    page = methods_page()
    for name in method_names():
        section = page.partition(f"{{ #{name} }}")[2].partition("\n## ")[0]
        for key in get_method(name).defaults():
            assert f"| `{key}` |" in section


def test_every_example_experiment_is_shown() -> None:
    page = examples_page(ROOT / "experiments")
    for path in (ROOT / "experiments").glob("*.yaml"):
        assert path.read_text(encoding="utf-8").strip() in page


def test_a_link_to_a_missing_file_stops_the_build(tmp_path: Path) -> None:
    with pytest.raises(BrokenLinkError, match=r"docs/index.md: links to no_such.md"):
        with_page_links("[x](no_such.md)", "docs/index.md", pages_of(ROOT), ROOT, tmp_path)


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("docs/index.md", "../benchmarks/README.md", "benchmarks/index.md"),
        ("docs/findings/gsm8k_tuned.md", "gsm8k_tuned.html", "gsm8k_tuned_report.html"),
        ("docs/how_to/gpu.md", "../../experiments/quickstart.yaml", "../reference/examples.md#quickstart"),
        ("docs/how_to/cluster.md", "../../cluster.yaml", "../files/cluster.yaml"),
        ("benchmarks/results/two_cores.md", "worker_loss.md#x", "worker_loss.md#x"),
        ("docs/how_to/cluster.md", "../../README.md", "../index.md"),
    ],
)
def test_links_between_files_become_links_between_pages(source: str, link: str, expected: str, tmp_path: Path) -> None:
    text = with_page_links(f"[a]({link})", source, pages_of(ROOT), ROOT, tmp_path)
    assert text == f"[a]({expected})"


def test_a_link_to_a_folder_becomes_its_text(tmp_path: Path) -> None:
    assert with_page_links("[a](../methods)", "docs/index.md", pages_of(ROOT), ROOT, tmp_path) == "a"
