"""The page of the example experiments: every file of `experiments/` with its question."""

from pathlib import Path

from docs.generate.markdown import fenced, page
from loragrid.config.yaml_reader import parse_yaml

INTRODUCTION = """
One file per question, in the folder `experiments/`. Copy one and change it. Files that name a data set or a model of
the hub need network access once; files that name `chitchat` and `smollm2-135m-instruct` need none.
"""


def examples_page(folder: Path) -> str:
    """The page, in Markdown; every file has the anchor of its name."""
    parts = []
    for path in sorted(folder.glob("*.yaml")):
        text = path.read_text(encoding="utf-8")
        question = parse_yaml(text, path.name)["question"]
        parts.append(f"## {path.stem} {{ #{path.stem} }}\n\n*{question}*\n\n{fenced('yaml', text)}")
    return page("Example experiments", INTRODUCTION, parts)
