"""The command line: run, plan, compare, report, sync, export, methods, ui.

Exit codes:
    0    success
    1    a trial failed (the others are recorded), or MLflow does not have the whole record yet
    2    the request was wrong: an unknown option, a refused experiment, a store that does not exist
    3    the environment failed: Ray could not be started, or its cluster could not be reached; nothing was trained
    130  interrupted (SIGINT)
    143  ended by SIGTERM
"""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown
from rich.table import Table

from loragrid.cli import experiments, records
from loragrid.cli.options import escaped, terminal

app = typer.Typer(
    help="Compare LoRA, LoRA-FA, VeRA, Delta-LoRA and LoRA+ on your model and your data.",
    epilog="Exit codes: 0 success; 1 a trial failed, or MLflow does not have the whole record yet; 2 the request was "
    "wrong; 3 Ray could not be started or reached; 130 interrupted; 143 ended by SIGTERM.",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line and exit; a user's mistake ends in one message and exit code 2, never in a traceback."""
    try:
        app()
    except ValueError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escaped(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted", style="yellow")
        sys.exit(130)


def methods(
    name: Annotated[str | None, typer.Argument(help="One method. Default: all.", show_default=False)] = None,
) -> None:
    """Print the methods' cards: paper, update rule, differences from the paper, hyperparameters."""
    from loragrid_methods import get_method, method_names

    console = terminal()
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


# `loragrid --help` lists the commands in this order.
for command in (
    experiments.run,
    experiments.plan,
    records.compare,
    records.report,
    records.sync,
    records.export,
    methods,
    records.ui,
):
    app.command()(command)
