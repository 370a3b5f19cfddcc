"""The command line: run, plan, compare, report, sync, export, methods, ui.

Exit codes: 0 all went well; 1 a trial failed (the others are recorded), or MLflow does not have the whole record;
2 the request was wrong; 130 interrupted, 143 ended by SIGTERM.
"""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from loragrid.counts import count_of

if TYPE_CHECKING:
    from loragrid.comparison import Comparison

app = typer.Typer(
    help="Compare LoRA, LoRA-FA, VeRA, Delta-LoRA and LoRA+ on your model and your data.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ExperimentFile = Annotated[Path, typer.Argument(help="An experiment file (YAML).", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Option("--set", help="Change one key of the file: training.steps=10. Can be repeated.")
]
Storage = Annotated[str, typer.Option(help="The folder a sweep was stored in (`storage.path`).")]
TrackingUri = Annotated[str | None, typer.Option("--tracking-uri", help="MLflow's store, if not the one in --storage.")]

DEFAULT_STORAGE = "loragrid-store"


def main() -> None:
    """Run the command line; a user's mistake is one message and exit code 2, never a traceback."""
    try:
        app()
    except ValueError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {_escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="yellow")
        sys.exit(130)


@app.command()
def run(
    file: ExperimentFile,
    set_: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster: auto, or HOST:PORT. Default: one for this run.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The sweep's name. Default: the experiment's, numbered.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the latest sweep (or --name): train what it has not finished.")
    ] = False,
) -> None:
    """Run an experiment: train every trial, record it in MLflow, print the comparison."""
    # Ray reads this when it is imported. A pack's five processes are more than Ray expects on two CPUs, and it says so.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "maximum expected startup concurrency")
    from loragrid.config import load_experiment
    from loragrid.report import plot_loss_curves, render_table
    from loragrid.rounds import SweepInterrupted
    from loragrid.storage import local_folder
    from loragrid.sweep import run as run_sweep

    experiment = load_experiment(file, set_ or ())
    console = _console()
    if experiment.question:
        console.print(f"[bold]{_escaped(experiment.question)}[/]", highlight=False)
    try:
        result = run_sweep(experiment, address=address, name=name, resume=resume, console=console)
    except SweepInterrupted as interruption:
        words = ["loragrid", "run", str(file), *(word for override in set_ or () for word in ("--set", override))]
        again = shlex.join([*words, "--name", interruption.sweep, "--resume"])
        console.print(f"interrupted; to go on: {again}", style="yellow", highlight=False, markup=False, soft_wrap=True)
        raise typer.Exit(128 + interruption.signal) from None
    if result.waiting_record is not None:
        console.print(
            f"MLflow has not taken all of the record: the rest waits in {result.waiting_record}; when it answers "
            f"again: loragrid sync --storage {local_folder(experiment)}; then, for the report: "
            f"{shlex.join(['loragrid', 'report', experiment.name, '--sweep', result.name, '--out', 'report.html'])}",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        raise typer.Exit(1)
    comparison = result.comparison()
    console.print(render_table(comparison, console.width))
    _print_verdict(console, comparison)
    if not comparison.curves.empty:
        picture = plot_loss_curves(comparison, local_folder(experiment) / f"{result.name}.png")
        console.print(f"loss curves   {picture}", highlight=False, markup=False, soft_wrap=True)
    _keep_report(console, comparison, local_folder(experiment) / f"{result.name}.html")
    console.print(f"MLflow store  {result.tracking_uri}", highlight=False, markup=False, soft_wrap=True)
    console.print(
        f"browse it     loragrid ui --storage {local_folder(experiment)}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    if not result.succeeded:
        raise typer.Exit(1)


@app.command()
def plan(
    file: ExperimentFile,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Time some real steps of every shape of pack on this machine first.")
    ] = False,
    calibration_seconds: Annotated[
        float, typer.Option(help="After so long, --calibrate takes up no further shape of pack.")
    ] = 120.0,
) -> None:
    """Print what would run: trials, parameter counts, packs, time. Without --calibrate it loads no weights."""
    from loragrid.config import load_experiment
    from loragrid.forecast import forecast, gpu_memory_here, too_large
    from loragrid.plan_table import render_plan
    from loragrid.planning import plan as make_plan

    # What is said on the way must not come between the lines of the JSON.
    told = Console(stderr=True)
    the_plan, estimate = forecast(
        make_plan(load_experiment(file, set_ or ())), told, calibrated=calibrate, budget_seconds=calibration_seconds
    )
    if as_json:
        typer.echo(json.dumps(the_plan.to_dict() | {"time_on_this_machine": estimate.to_dict()}, indent=2))
    else:
        _console().print(render_plan(the_plan, estimate))
        memory = gpu_memory_here()
        for sentence in too_large(the_plan, memory) if memory is not None else ():
            _console().print(sentence, style="yellow", highlight=False, markup=False)


@app.command()
def compare(
    name: Annotated[str, typer.Argument(help="The experiment's name.", show_default=False)],
    sweep: Annotated[str | None, typer.Option(help="One sweep of it. Default: the latest.")] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the loss curves to this PNG file.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a sweep whose trials ran on unlike code, hardware or inputs.")
    ] = False,
    apart: Annotated[
        list[str] | None,
        typer.Option(help="An axis (a column) to compare at each of its values, not to choose over. Can be repeated."),
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Print the table of a sweep and what it shows, from MLflow alone."""
    from loragrid.comparison import load_comparison
    from loragrid.fingerprint import fingerprint_of, refuse_mixed
    from loragrid.report import plot_loss_curves, render_table

    if as_csv and as_json:
        raise ValueError("--csv and --json: one of them at a time")
    comparison = load_comparison(name, _store(storage, tracking_uri), sweep)
    if strict:
        refuse_mixed(fingerprint_of(comparison))
    if plot is not None:
        plot_loss_curves(comparison, plot)
    if as_csv:
        typer.echo(comparison.to_csv(), nl=False)
    elif as_json:
        report = fingerprint_of(comparison).to_dict()
        typer.echo(json.dumps(json.loads(comparison.to_json()) | {"fingerprint": report}, indent=2))
    else:
        console = _console()
        console.print(render_table(comparison, console.width))
        _print_verdict(console, comparison, apart or ())
        if plot is not None:
            console.print(f"loss curves  {plot}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def report(
    name: Annotated[str, typer.Argument(help="The experiment's name.", show_default=False)],
    out: Annotated[Path, typer.Option(help="The file to write: .html, .md, .csv or .json.", show_default=False)],
    sweep: Annotated[str | None, typer.Option(help="One sweep of it. Default: the latest.")] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="html, md, csv, json; or peft: a folder of result files for PEFT's app."),
    ] = None,
    apart: Annotated[
        list[str] | None,
        typer.Option(help="An axis whose values are compared instead of chosen between: rank. Can be repeated."),
    ] = None,
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write the report of a sweep, from MLflow alone: one page that holds all it shows and opens offline."""
    from loragrid.comparison import load_comparison
    from loragrid.report_files import format_of, write_report

    format_of(out, format_)
    comparison = load_comparison(name, _store(storage, tracking_uri), sweep)
    console = _console()
    for sentence in write_report(comparison, out, format_, apart or ()):
        console.print(sentence, style="yellow", highlight=False, markup=False, soft_wrap=True)
    console.print(f"report  {out}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def sync(storage: Storage = DEFAULT_STORAGE) -> None:
    """Deliver to MLflow what a sweep could not: the store was away, or the program was killed."""
    from loragrid.sync import sync as deliver

    folder = Path(storage).expanduser()
    if not folder.is_dir():
        raise ValueError(f"--storage {storage}: no such folder; allowed: the `storage.path` of a sweep that was run")
    delivered = deliver(folder.resolve() / "spool")
    console = _console()
    for sweep, number in delivered.items():
        console.print(f"{sweep}: {count_of(number, 'operation')} delivered", highlight=False, markup=False)
    if not delivered:
        console.print("nothing waits: MLflow has it all", highlight=False)


@app.command()
def export(
    run_id: Annotated[str, typer.Argument(help="A trial's MLflow run id, or its trial id.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="The folder to write; must not exist yet.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="A whole model with the adapter merged in.")] = False,
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a trial's adapter, as PEFT loads it, or the merged model."""
    from loragrid.artifacts import export_run

    export_run(run_id, _store(storage, tracking_uri), to, merged=merged)
    _console().print(f"{'merged model' if merged else 'adapter'}  {to}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method. Default: all.", show_default=False)] = None,
) -> None:
    """Print the methods' cards: paper, update rule, what differs from the paper, hyperparameters."""
    from loragrid_methods import get_method, method_names

    console = _console()
    for method_name in [name] if name else method_names():
        method = get_method(method_name)
        console.print(Markdown(method.card.to_markdown()))
        table = Table("hyperparameter", "default", box=None, header_style="dim", padding=(0, 2))
        for key, value in method.defaults().items():
            table.add_row(key, str(value))
        console.print(f"name in an experiment file: [bold]{method_name}[/]", highlight=False)
        if table.row_count:
            console.print(table)
        console.print()


@app.command()
def ui(
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
    host: Annotated[str, typer.Option(help="The address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to serve on.")] = 5000,
) -> None:
    """Open MLflow's pages on the store."""
    from loragrid.tracking import experiment_pages, tracking_ui_command

    store = _store(storage, tracking_uri)
    command = tracking_ui_command(store, host, port)
    console = _console()
    for name, page in experiment_pages(store, f"http://{host}:{port}").items():
        console.print(f"{name}  {page}", highlight=False, markup=False, soft_wrap=True)
    console.print("MLflow is starting; Ctrl-C ends it", highlight=False)
    raise typer.Exit(subprocess.run(command, check=False).returncode)


def _keep_report(console: Console, comparison: "Comparison", out: Path) -> None:
    """Write a finished sweep's page and keep it in MLflow; the sweep is recorded, and does not fail for want of it."""
    from mlflow.exceptions import MlflowException

    from loragrid.report_files import keep_report

    try:
        keep_report(comparison, out)
    except (OSError, ValueError, MlflowException) as error:
        again = shlex.join(["loragrid", "report", comparison.experiment_name, "--sweep", comparison.sweep])
        console.print(
            f"the report could not be kept ({error}); to write it: {again} --out report.html",
            style="yellow",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        return
    console.print(f"report        {out}", highlight=False, markup=False, soft_wrap=True)


def _store(storage: str, tracking_uri: str | None) -> str:
    from loragrid.tracking import default_tracking_uri, sqlite_path

    uri = default_tracking_uri(storage, tracking_uri)
    path = sqlite_path(uri)
    if path is not None and not path.exists():
        raise ValueError(f"--storage {storage}: no MLflow store there ({path}); run an experiment first")
    return uri


def _print_verdict(console: Console, comparison: "Comparison", apart: Sequence[str] = ()) -> None:
    from loragrid.settings import tasks_of
    from loragrid.verdict import load_verdict
    from loragrid.verdict_table import render_verdict

    for label, part in tasks_of(comparison).items():
        console.print()
        if label:
            console.print(label, style="bold", highlight=False, markup=False)
        console.print(render_verdict(load_verdict(part, apart)))


def _console() -> Console:
    console = Console()
    # Without a terminal (a log, a pipe) rich would cut the table at 80 columns.
    return console if console.is_terminal else Console(width=120)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)
