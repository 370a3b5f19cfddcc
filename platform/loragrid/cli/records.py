"""The commands on recorded sweeps: compare, report, sync, export, ui."""

import json
import subprocess
from pathlib import Path
from typing import Annotated

import typer

from loragrid.cli.options import (
    DEFAULT_STORAGE,
    Apart,
    ExperimentName,
    Storage,
    SweepName,
    TrackingUri,
    print_verdict,
    say,
    store_in,
    terminal,
)
from loragrid.config.local_path import local_path
from loragrid.formatting import count_of, format_bytes


def compare(
    name: ExperimentName,
    sweep: SweepName = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write the loss curves to this PNG file.")] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Refuse a sweep whose trials ran on different code, hardware or inputs.")
    ] = False,
    apart: Apart = None,
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Print a sweep's table and verdict; reads only MLflow."""
    from loragrid.comparison.fingerprint import fingerprint_of, refuse_mixed
    from loragrid.comparison.selection import check_apart
    from loragrid.comparison.table import load_comparison
    from loragrid.report.loss_curves import plot_loss_curves
    from loragrid.report.terminal import render_table

    if as_csv and as_json:
        raise ValueError("--csv and --json exclude each other; allowed: one of them")
    if apart and (as_csv or as_json):
        raise ValueError(
            "--apart: the CSV and the JSON of `compare` list trials and choose none, so --apart has no effect there; "
            "allowed: leave it out, or use `loragrid report --apart`"
        )
    comparison = load_comparison(name, store_in(storage, tracking_uri), sweep)
    check_apart(comparison, apart or ())
    if strict:
        refuse_mixed(fingerprint_of(comparison))
    if plot is not None:
        plot_loss_curves(comparison, local_path("--plot", str(plot), to_be_written=True))
    if as_csv:
        typer.echo(comparison.to_csv(), nl=False)
    elif as_json:
        report = fingerprint_of(comparison).to_dict()
        typer.echo(json.dumps(json.loads(comparison.to_json()) | {"fingerprint": report}, indent=2))
    else:
        console = terminal()
        console.print(render_table(comparison, console.width))
        print_verdict(console, comparison, apart or ())
        if plot is not None:
            say(console, f"loss curves  {plot}")


def report(
    name: ExperimentName,
    out: Annotated[Path, typer.Option(help="The file to write: .html, .md, .csv or .json.", show_default=False)],
    sweep: SweepName = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="html, md, csv, json; or peft: a folder of result files for PEFT's app."),
    ] = None,
    apart: Apart = None,
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a sweep's report, one page that opens offline; reads only MLflow."""
    from loragrid.comparison.table import load_comparison
    from loragrid.report.files import format_of, write_report

    format_of(out, format_)
    comparison = load_comparison(name, store_in(storage, tracking_uri), sweep)
    console = terminal()
    for sentence in write_report(comparison, out, format_, apart or ()):
        say(console, sentence, "yellow")
    say(console, f"report  {out}")


def sync(storage: Storage = DEFAULT_STORAGE) -> None:
    """Deliver the records that MLflow lacks because MLflow was unreachable or the sweep was killed."""
    from loragrid.tracking.sync import sync_storage

    delivered = sync_storage(storage)
    console = terminal()
    for sweep, number in delivered.items():
        say(console, f"{sweep}: {count_of(number, 'operation')} delivered")
    if not delivered:
        say(console, "nothing to deliver: MLflow has the whole record")


def export(
    run_id: Annotated[str, typer.Argument(help="A trial's MLflow run id, or its trial id.", show_default=False)],
    to: Annotated[Path, typer.Option("--to", help="The folder to write. It must not exist yet.", show_default=False)],
    merged: Annotated[bool, typer.Option("--merged", help="Write the whole model with the adapter merged in.")] = False,
    base: Annotated[
        str | None, typer.Option(help="The folder or hub id of the base. Default: where the trial's worker found it.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Export although the base differs from the recorded one, and say so.")
    ] = False,
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
) -> None:
    """Write a trial's result as a folder that loads without LoraGrid: an adapter in PEFT's format, or a whole model."""
    store = store_in(storage, tracking_uri)  # before the slow import
    from loragrid.tracking.artifacts import export_run

    to = local_path("--to", str(to), to_be_written=True)
    export = export_run(run_id, store, to, merged=merged, base=base, force=force)
    console = terminal()
    for notice in export.notices:
        say(console, f"note: {notice}", "yellow")
    say(console, f"{export.kind}  {export.folder}  ({export.what}; {format_bytes(export.num_bytes)}); to load it:")
    say(console, export.snippet)


def ui(
    storage: Storage = DEFAULT_STORAGE,
    tracking_uri: TrackingUri = None,
    host: Annotated[str, typer.Option(help="The address to serve on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The port to serve on.")] = 5000,
) -> None:
    """Serve MLflow's pages on the store."""
    from loragrid.tracking.pages import experiment_pages, tracking_ui_command

    store = store_in(storage, tracking_uri)
    command = tracking_ui_command(store, host, port)
    console = terminal()
    for name, page in experiment_pages(store, f"http://{host}:{port}").items():
        say(console, f"{name}  {page}")
    say(console, "MLflow is starting; press Ctrl-C to stop it")
    raise typer.Exit(subprocess.run(command, check=False).returncode)
