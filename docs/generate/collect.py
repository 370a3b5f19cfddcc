"""Copies hand-written pages, writes generated ones and turns links between files into links between pages."""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath

from docs.generate.command_line import command_line_page
from docs.generate.examples import examples_page
from docs.generate.experiment_file import experiment_file_page
from docs.generate.methods import methods_page
from docs.generate.metrics_and_tags import metrics_and_tags_page

GENERATED: Mapping[str, Callable[[], str]] = {
    "reference/experiment_file.md": experiment_file_page,
    "reference/metrics_and_tags.md": metrics_and_tags_page,
    "reference/command_line.md": command_line_page,
    "reference/methods.md": methods_page,
}
EXAMPLES_PAGE = "reference/examples.md"

COPIED_PAGES: Mapping[str, str] = {
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/README.md": "benchmarks/index.md",
}
ALIASES: Mapping[str, str] = {"README.md": "index.md"}
"""Files that are no page of their own: a link to one becomes a link to the page."""
"""Files outside `docs/` that are pages of the site: file -> page. A file that does not exist yet is left out."""

ATTACHED_SUFFIXES = (".png", ".html", ".yaml", ".js", ".txt")
LINK = re.compile(r"\[([^\[\]]*)\]\((?!https?:|mailto:|#)([^)\s#]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```[^\S\n]*$)", re.MULTILINE | re.DOTALL)


class BrokenLinkError(ValueError):
    """A page links to a file that is neither a page nor a file of the repository."""


def collect(root: Path, target: Path) -> None:
    """Write all pages below `target`, a folder that is emptied first.

    Raises:
        BrokenLinkError: a page of the repository links to a file that does not exist.
        MissingDescriptionError: a key of an experiment file has no description.
    """
    if target.exists():
        shutil.rmtree(target)
    pages = pages_of(root)
    for name, make in GENERATED.items():
        _write(target / name, make())
    _write(target / EXAMPLES_PAGE, examples_page(root / "experiments"))
    for source, page in pages.items():
        if source.endswith(".md"):
            if (root / source).is_file():
                text = (root / source).read_text(encoding="utf-8")
                _write(target / page, with_page_links(text, source, pages, root, target))
        else:
            _copy(root / source, target / page)


def pages_of(root: Path) -> dict[str, str]:
    """File of the repository -> its place in the site, for all pages and what lies beside them."""
    places = {name: page for name, page in COPIED_PAGES.items() if (root / name).is_file()}
    places |= {f"docs/{name}": name for name in (*GENERATED, EXAMPLES_PAGE)}
    for path in sorted((root / "docs").rglob("*")):
        name = path.relative_to(root).as_posix()
        if path.suffix in (".md", *ATTACHED_SUFFIXES) and not name.startswith("docs/generate/"):
            # A page `x.md` becomes `x.html`: a file of that name beside it must have another.
            is_taken = path.suffix == ".html" and path.with_suffix(".md").is_file()
            place = path.with_name(f"{path.stem}_report.html") if is_taken else path
            places[name] = place.relative_to(root / "docs").as_posix()
    for path in sorted((root / "benchmarks" / "results").glob("*.md")):
        places[f"benchmarks/results/{path.name}"] = f"benchmarks/{path.name}"
    return places


def with_page_links(text: str, source: str, pages: Mapping[str, str], root: Path, target: Path) -> str:
    """The text of a file, with its links to files changed to links between the pages of the site."""
    folder = PurePosixPath(pages[source]).parent

    def link(match: re.Match[str]) -> str:
        label, path, anchor = match[1], match[2], match[3] or ""
        file = os.path.normpath(PurePosixPath(source).parent / path)
        if file.startswith("experiments/") and file.endswith(".yaml"):
            place, anchor = EXAMPLES_PAGE, f"#{PurePosixPath(file).stem}"
        elif file in pages or file in ALIASES:
            place = pages.get(file) or ALIASES[file]
        elif (root / file).is_file():
            place = f"files/{file}.txt" if PurePosixPath(file).suffix in ("", ".md", ".toml") else f"files/{file}"
            _copy(root / file, target / place)
        elif (root / file).is_dir():
            return label  # a site has no folder to look into
        else:
            raise BrokenLinkError(f"{source}: links to {path}, which is no file of the repository")
        return f"[{label}]({os.path.relpath(place, folder)}{anchor})"

    parts = FENCE.split(text)  # blocks of code lie at the odd places
    return "".join(part if number % 2 else LINK.sub(link, part) for number, part in enumerate(parts))


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _copy(source: Path, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, place)
