"""Writes a sweep's report in the format that is asked for, from MLflow alone: HTML, Markdown, CSV, JSON, PEFT's own."""

import csv
import dataclasses
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from mlflow import MlflowClient

from loragrid.comparison import Comparison
from loragrid.local_path import reason_of
from loragrid.peft_results import write_peft_results
from loragrid.report_page import render_page
from loragrid.report_tables import PageTable, choice_table, contrast_table, unfinished_table
from loragrid.selection import Choice, Setting, Verdict
from loragrid.statistics import Interval
from loragrid.sweep_record import SweepRecord, load_record
from loragrid.tracking import quiet_store

ReportFormat = Literal["html", "md", "csv", "json", "peft"]
REPORT_ARTIFACT = "report"
"""The artifact folder of the sweep's run that holds `report.html`."""


def format_of(out: Path, asked: str | None) -> ReportFormat:
    """The format asked for, else the one that the file's suffix names.

    ValueError: there is none of that name.
    """
    allowed = get_args(ReportFormat)
    found = asked if asked is not None else out.suffix.removeprefix(".").lower()
    if found not in allowed or (asked is None and found == "peft"):
        key = f"--format {asked}" if asked is not None else f"--out {out}"
        raise ValueError(f"{key}: no such format; allowed: a file ending in .html, .md, .csv or .json, or --format peft")
    return found  # type: ignore[return-value]


def write_report(comparison: Comparison, out: Path, asked: str | None = None) -> list[str]:
    """Write the report to the file `out` (to the folder `out` for PEFT's format); gives what it could not say.

    Raises:
        ValueError: no such format, `out` cannot be written, or the sweep has nothing of what the format must hold.
    """
    form = format_of(out, asked)
    record = load_record(comparison)
    settings, verdict = judge_sweep(comparison)
    try:
        if form == "peft":
            return write_peft_results(record, verdict, out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report_text(form, record, settings, verdict), encoding="utf-8", newline="\n")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written: {reason_of(error)}") from error
    return []


def keep_report(comparison: Comparison, out: Path) -> None:
    """Write the HTML report of a sweep that has ended, and keep it with the sweep's run as `report/report.html`.

    The record must be delivered: the report is written from it. Raises what MLflow raises where it does not answer.
    """
    write_report(comparison, out, "html")
    with quiet_store():
        MlflowClient(tracking_uri=comparison.tracking_uri).log_text(
            comparison.sweep_run_id, out.read_text(encoding="utf-8"), f"{REPORT_ARTIFACT}/report.html"
        )


def report_text(
    form: Literal["html", "md", "csv", "json"], record: SweepRecord, settings: Sequence[Setting], verdict: Verdict
) -> str:
    """The report as text, in one of the formats that are one file."""
    match form:
        case "html":
            return render_page(record, settings, verdict)
        case "md":
            return to_markdown(record.comparison, verdict)
        case "csv":
            return to_csv(verdict)
        case "json":
            return to_json(record.comparison, verdict)


def to_markdown(comparison: Comparison, verdict: Verdict) -> str:
    """Verdict, choices, contrasts and what did not finish, as Markdown without HTML."""
    parts = [f"# {_plain(comparison.question or comparison.experiment_name)}"]
    parts.append(f"{_plain(comparison.experiment_name)}, sweep {_plain(comparison.sweep)}, {len(comparison.table)} trials.")
    parts.append("\n".join(f"- {_plain(sentence)}" for sentence in verdict.sentences) or "No verdict.")
    parts += [f"**Beware:** {_plain(warning)}" for warning in verdict.warnings]
    for heading, table in (
        ("Every method at its best setting", choice_table(verdict, comparison)),
        ("Method against method", contrast_table(verdict)),
        ("Failed, stopped and out of memory", unfinished_table(comparison)),
    ):
        if table.rows:
            parts += [f"## {heading}", _markdown_table(table)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: PageTable) -> str:
    lines = [table.header, tuple("---" for _ in table.header)]
    lines += [tuple(_plain("; ".join((cell.text, *cell.notes))) for cell in row) for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown and HTML take for nothing but text."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", one_line).replace("&", "&amp;").replace("<", "&lt;")


def to_csv(verdict: Verdict) -> str:
    """One line per choice with its intervals; what is missing is an empty cell."""
    names = list(dict.fromkeys(name for choice in verdict.choices for name in choice.setting.values))
    figures = ("mean", "std", "low", "high", "num")
    groups = ("validation", "test", "default_validation", "default_test")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["method", *names, "validation_metric", "metric", "at_edge", "num_settings"]
        + [f"{group}_{figure}" for group in groups for figure in figures]
    )
    for choice in verdict.choices:
        default = choice.default
        intervals = [choice.validation, choice.test, default and default.validation, default and default.test]
        writer.writerow(
            [choice.method, *(_cell(choice.setting.values.get(name)) for name in names)]
            + [choice.metric, verdict.metric, " ".join(choice.edges), choice.num_settings]
            + [_cell(value) for interval in intervals for value in _figures(interval)]
        )
    return text.getvalue()


def _figures(interval: Interval | None) -> list[float | None]:
    if interval is None:
        return [None] * 5
    return [interval.mean, interval.std, interval.low, interval.high, interval.num]


def _cell(value: object) -> object:
    return "" if value is None else value


def to_json(comparison: Comparison, verdict: Verdict) -> str:
    """The comparison with the verdict as data, `null` for what is missing."""
    content = json.loads(comparison.to_json())
    content["verdict"] = {
        "metric": verdict.metric,
        "higher_is_better": verdict.higher_is_better,
        "sentences": list(verdict.sentences),
        "warnings": list(verdict.warnings),
        "choices": [_choice(choice) for choice in verdict.choices],
        "contrasts": [dataclasses.asdict(contrast) for contrast in verdict.contrasts],
    }
    return json.dumps(content, indent=2, allow_nan=False, default=_number) + "\n"


def _choice(choice: Choice) -> dict[str, object]:
    return {
        "method": choice.method,
        "setting": dict(choice.setting.values),
        "trial_ids": {str(seed): trial_id for seed, trial_id in choice.setting.trial_ids.items()},
        "metric": choice.metric,
        "validation": dataclasses.asdict(choice.validation),
        "test": None if choice.test is None else dataclasses.asdict(choice.test),
        "at_edge": dict(choice.edges),
        "num_settings": choice.num_settings,
        "default": None if choice.default is None else _choice(choice.default),
    }


def _number(value: object) -> object:
    """A numpy scalar as the Python number that it is."""
    return value.item()  # type: ignore[attr-defined]


def judge_sweep(comparison: Comparison) -> tuple[list[Setting], Verdict]:
    """The sweep's settings and what they show."""
    raise NotImplementedError
