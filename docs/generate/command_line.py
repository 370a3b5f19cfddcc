"""The reference of the command line, made from the typer application itself."""

import inspect
from typing import Any

import typer

from docs.generate.markdown import MissingDescriptionError, fenced, page, table
from loragrid.cli.main import app

INTRODUCTION = """
`python -m loragrid` is the same as `loragrid`. Results are kept in `storage.path`, by default the folder
`loragrid-store` of the current directory: `mlflow.db`, the artifacts, reports and the states of half-trained trials.
"""

EXIT_CODES = """
| code | meaning |
|---|---|
| 0 | every trial finished |
| 1 | a trial failed (the others ran and are recorded), or MLflow does not have the whole record yet |
| 2 | the request was wrong; nothing was started |
| 3 | Ray could not be started, or its cluster could not be reached; nothing was trained |
| 130 | interrupted with Ctrl-C |
| 143 | ended by SIGTERM |
"""


def commands() -> dict[str, Any]:
    """Name -> command, in the order of `loragrid --help`.

    The commands are click's: those of the package click up to typer 0.15, those inside typer in later versions.
    """
    return dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


def command_line_page() -> str:
    """The page, in Markdown."""
    parts = ["## Exit codes", EXIT_CODES]
    for name, command in commands().items():
        parts += [f"## loragrid {name}", inspect.cleandoc(command.help or ""), fenced("text", _usage(name, command))]
        if rows := [_row(parameter) for parameter in command.params]:
            parts.append(table(["argument or option", "meaning", "default"], rows))
    return page("Command line", INTRODUCTION, parts)


def _usage(name: str, command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    words = [_name(parameter) if parameter.required else f"[{_name(parameter)}]" for parameter in arguments]
    options = [f"{parameter.opts[0]} ..." for parameter in command.params if _is_required_option(parameter)]
    return " ".join(["loragrid", name, *words, *options, "[OPTIONS]"])


def _name(parameter: Any) -> str:
    return parameter.name.upper() if parameter.param_type_name == "argument" else ", ".join(parameter.opts)


def _is_required_option(parameter: Any) -> bool:
    return bool(parameter.param_type_name == "option" and parameter.required)


def _row(parameter: Any) -> tuple[str, str, str]:
    if not parameter.help:
        raise MissingDescriptionError(f"loragrid: {_name(parameter)}: the option has no help text")
    return f"`{_name(parameter)}`", parameter.help, _default(parameter)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    return "" if parameter.default in (None, False, (), []) or callable(parameter.default) else f"`{parameter.default}`"
