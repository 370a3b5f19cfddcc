"""Options that several commands have in common, and the terminal that the commands write to."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from loragrid.comparison.table import Comparison

DEFAULT_STORAGE = "loragrid-store"

ExperimentFile = Annotated[Path, typer.Argument(help="An experiment file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key of the file: training.steps=10. Can be repeated.")
]
ExperimentName = Annotated[str, typer.Argument(help="The experiment's name.", show_default=False)]
SweepName = Annotated[str | None, typer.Option(help="One sweep of the experiment. Default: the latest.")]
Apart = Annotated[
    list[str] | None,
    typer.Option(help="An axis (a column): compare at each of its values, choose no best value. Can be repeated."),
]
Storage = Annotated[str, typer.Option(help="The folder a sweep was stored in (`storage.path`).")]
TrackingUri = Annotated[
    str | None, typer.Option("--tracking-uri", help="MLflow's store. Default: the one in --storage.")
]


def terminal() -> Console:
    """The console for a command's results."""
    console = Console()
    # Without a terminal (in a log, a pipe) rich would cut tables at 80 columns.
    return console if console.is_terminal else Console(width=120)


def escaped(text: str) -> str:
    """The text with its markup escaped: rich prints it unchanged."""
    from rich.markup import escape

    return escape(text)


def say(console: Console, sentence: str, style: str | None = None) -> None:
    """Print a sentence unchanged: without markup, automatic colours or line breaks."""
    console.print(sentence, style=style, highlight=False, markup=False, soft_wrap=True)


def store_in(storage: str, tracking_uri: str | None) -> str:
    """Return the tracking URI of an existing store.

    Raises:
        ValueError: the store does not exist yet.
    """
    from loragrid.tracking.store_uri import default_tracking_uri, sqlite_path

    uri = default_tracking_uri(storage, tracking_uri)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise ValueError(f"--storage {storage}: no MLflow store there ({path}); run an experiment first")
    return uri


def print_verdict(console: Console, comparison: "Comparison", apart: Sequence[str] = ()) -> None:
    """Print the verdict on each task of a sweep, and the trial to export."""
    from loragrid.comparison.settings import tasks_of
    from loragrid.comparison.verdict import load_verdict, trial_to_keep
    from loragrid.report.verdict_table import export_line, render_verdict

    for label, part in tasks_of(comparison).items():
        console.print()
        if label:
            console.print(label, style="bold", highlight=False, markup=False)
        verdict = load_verdict(part, apart)
        console.print(render_verdict(verdict, console.width))
        if trial_id := trial_to_keep(part, verdict):
            say(console, export_line(part, verdict, trial_id))
