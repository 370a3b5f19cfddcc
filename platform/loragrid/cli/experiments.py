"""The commands that read an experiment file: run, plan."""

import json
import os
import shlex
from typing import Annotated

import typer
from rich.console import Console

from loragrid.cli.options import ExperimentFile, Overrides, escaped, print_verdict, say, terminal

ENVIRONMENT = 3
"""The exit code if Ray cannot be started or reached."""


def run(
    file: ExperimentFile,
    set_: Overrides = None,
    address: Annotated[
        str | None, typer.Option(help="A running Ray cluster: auto, or HOST:PORT. Default: start one for this run.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The sweep's name. Default: the experiment's, numbered.")] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Continue the latest sweep (or --name): train the trials that have not finished."
        ),
    ] = False,
) -> None:
    """Run an experiment: train every trial, record it in MLflow, print the comparison."""
    # Refuse a bad file before the slow imports below.
    from loragrid.trials.load import load_experiment

    experiment = load_experiment(file, set_ or ())
    # Ray reads this variable on import. Without it, Ray warns on two CPUs that a pack's five processes are too many.
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", "maximum expected startup concurrency")
    from loragrid.comparison.table import load_comparison
    from loragrid.report.loss_curves import has_losses, plot_loss_curves
    from loragrid.report.terminal import render_table
    from loragrid.sweep.ray_start import RayStartError
    from loragrid.sweep.run import run as run_sweep
    from loragrid.sweep.signals import SweepInterrupted
    from loragrid.sweep.storage import local_folder

    console = terminal()
    words = ["loragrid", "run", str(file), *(word for override in set_ or () for word in ("--set", override))]
    if experiment.question:
        console.print(f"[bold]{escaped(experiment.question)}[/]", highlight=False)
    try:
        result = run_sweep(experiment, address=address, name=name, resume=resume, console=console)
    except RayStartError as error:
        say(Console(stderr=True), f"error: {error}", "red")
        raise typer.Exit(ENVIRONMENT) from None
    except SweepInterrupted as interruption:
        again = shlex.join([*words, "--name", interruption.sweep, "--resume"])
        say(console, f"interrupted; to continue: {again}", "yellow")
        raise typer.Exit(128 + interruption.signal) from None
    if result.unconfirmed:
        again = shlex.join([*words, "--name", result.name, "--resume"])
        say(console, f"{result.unconfirmed}; to try it again: {again}", "yellow")
    if result.waiting_record is not None:
        say(
            console,
            f"MLflow does not have the whole record; the rest waits in {result.waiting_record}. When MLflow answers "
            f"again, run: loragrid sync --storage {local_folder(experiment)}; then, for the report: "
            f"{shlex.join(['loragrid', 'report', experiment.name, '--sweep', result.name, '--out', 'report.html'])}",
            "yellow",
        )
        raise typer.Exit(1)
    comparison = load_comparison(experiment.name, result.tracking_uri, result.name, curves=result.curves)
    console.print(render_table(comparison, console.width))
    print_verdict(console, comparison)
    if has_losses(comparison):
        picture = plot_loss_curves(comparison, local_folder(experiment) / f"{result.name}.png")
        say(console, f"loss curves   {picture}")
    if result.report is not None:
        say(console, f"report        {result.report}")
    say(console, f"MLflow store  {result.tracking_uri}")
    say(console, f"browse it     loragrid ui --storage {local_folder(experiment)}")
    if not result.succeeded:
        raise typer.Exit(1)


def plan(
    file: ExperimentFile,
    set_: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    load: Annotated[
        bool,
        typer.Option("--load", help="Load each model's weights too, one model at a time, and check that it can train."),
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="First time some real steps of every shape of pack on this machine.")
    ] = False,
    calibration_seconds: Annotated[
        float, typer.Option(help="The time after which --calibrate starts no further shape of pack, in seconds.")
    ] = 120.0,
) -> None:
    """Print what would run, on which rows: trials, parameter counts, packs, time.

    It reads and tokenises the data, and refuses what run would refuse. It loads no weights unless --load or --calibrate
    is given.
    """
    # Refuse a bad file before the slow imports below.
    from loragrid.trials.load import load_experiment

    experiment = load_experiment(file, set_ or ())
    from loragrid.cli.plan_table import render_plan
    from loragrid.planning.dry_run import prepare
    from loragrid.planning.row_notes import row_notes
    from loragrid.sweep.forecast import forecast, gpu_memory_here, too_large
    from loragrid.sweep.noise_forecast import forecast_noise

    # Progress goes to stderr: with --json, stdout must hold only the JSON.
    progress = Console(stderr=True)
    the_plan, rows = prepare(experiment, waiting=lambda sentence: say(progress, sentence, "dim"))
    if load:
        from loragrid.sweep.model_checks import check_loaded_models

        check_loaded_models(the_plan, lambda sentence: say(progress, sentence, "dim"))
    the_plan, estimate = forecast(
        the_plan, progress, rows.tokenized if calibrate else None, budget_seconds=calibration_seconds
    )
    noise = forecast_noise(the_plan)
    if as_json:
        own = {
            "time_on_this_machine": estimate.to_dict(),
            "noise_floor": [one.to_dict() for one in noise],
            "notes": row_notes(the_plan),
        }
        typer.echo(json.dumps(the_plan.to_dict() | own, indent=2))
    else:
        terminal().print(render_plan(the_plan, estimate, noise))
        memory = gpu_memory_here()
        for sentence in too_large(the_plan, memory) if memory is not None else ():
            say(terminal(), sentence, "yellow")
