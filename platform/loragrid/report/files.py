"""Writes a sweep's report as HTML, Markdown, CSV, JSON or PEFT result files, only from what MLflow holds."""

import csv
import dataclasses
import io
import json
import math
import re
import shlex
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import pandas as pd
from mlflow import MlflowClient

from loragrid.comparison.captions import heading_of_choices
from loragrid.comparison.choice import Choice, SeedSummary
from loragrid.comparison.data_record import data_record_of
from loragrid.comparison.findings import pair_sentence
from loragrid.comparison.selection import check_apart
from loragrid.comparison.sweep_record import SweepRecord, load_record
from loragrid.comparison.table import Comparison, load_comparison
from loragrid.comparison.verdict import Verdict
from loragrid.config.local_path import local_path, reason_of
from loragrid.formatting import count_of
from loragrid.report.choice_tables import choice_table, pairs_table
from loragrid.report.html_page import Part, load_parts, render_page
from loragrid.report.peft_results import write_peft_results
from loragrid.report.sample_answers import sample_table
from loragrid.report.tables import PageTable, unfinished_table
from loragrid.report.verdict_table import place_words
from loragrid.tracking.mlflow_internals import quiet_store

ReportFormat = Literal["html", "md", "csv", "json", "peft"]
TRAINED_HEADING = "These trained models, not their methods"
REPORT_ARTIFACT = "report"
"""The artifact folder of the sweep's run that holds `report.html`."""


def format_of(out: Path, report_format: str | None) -> ReportFormat:
    """The format `report_format`, or if that is None the one of the file's suffix.

    Raises:
        ValueError: there is no such format.
    """
    allowed = get_args(ReportFormat)
    found = report_format if report_format is not None else out.suffix.removeprefix(".").lower()
    if found not in allowed or (report_format is None and found == "peft"):
        key = f"--format {report_format}" if report_format is not None else f"--out {out}"
        raise ValueError(
            f"{key}: no such format; allowed: a file ending in .html, .md, .csv or .json, or --format peft"
        )
    return found  # type: ignore[return-value]


def write_report(
    comparison: Comparison, out: str | Path, report_format: str | None = None, apart: Collection[str] = ()
) -> list[str]:
    """Write the report of a sweep to the file `out`; return sentences about trials that had to be left out.

    report_format: `html` (one page that opens offline), `md`, `csv` or `json`; None: by the suffix of the file. With
    `peft`, `out` is a folder that receives result files for PEFT's `method_comparison` app.
    apart: axes (columns of `comparison.table`) that are compared at each of their values, see `choose`.

    Raises:
        ValueError: there is no such format or axis, `out` cannot be written, or the sweep lacks figures that the format
            requires.
    """
    out = local_path("--out", str(out), to_be_written=True)
    form = format_of(out, report_format)
    check_apart(comparison, apart)
    record, parts = load_record(comparison), load_parts(comparison, apart)
    try:
        if form == "peft":
            return write_peft_results(record, [part.verdict for part in parts], out)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(report_text(form, record, parts), encoding="utf-8", newline="\n")
    except OSError as error:
        raise ValueError(f"--out {out}: cannot be written: {reason_of(error)}") from error
    return []


def keep_report(comparison: Comparison, out: Path) -> None:
    """Write the HTML report of a sweep that has ended, and keep it with the sweep's run as `report/report.html`.

    MLflow must have the whole record already. Raises whatever MLflow raises if it does not answer.
    """
    write_report(comparison, out, "html")
    with quiet_store():
        MlflowClient(tracking_uri=comparison.tracking_uri).log_text(
            comparison.sweep_run_id, out.read_text(encoding="utf-8"), f"{REPORT_ARTIFACT}/report.html"
        )


def leave_report(
    experiment_name: str,
    tracking_uri: str,
    sweep: str,
    folder: Path,
    tell: Callable[[str], None],
    *,
    curves: pd.DataFrame | None = None,
) -> Path | None:
    """Keep the report of a sweep that has ended, also as `<sweep>.html` in the folder; return that file.

    A sweep does not fail because its report cannot be written: `tell` then receives the reason, and None is returned.
    curves: see `load_comparison`.
    """
    out = folder / f"{sweep}.html"
    try:
        keep_report(load_comparison(experiment_name, tracking_uri, sweep, curves=curves), out)
    except Exception as error:  # from MLflow, a database driver, matplotlib or the disk
        again = shlex.join(["loragrid", "report", experiment_name, "--sweep", sweep, "--out", "report.html"])
        tell(f"the report could not be kept ({type(error).__name__}: {error}); to write it: {again}")
        return None
    return out


def report_text(form: Literal["html", "md", "csv", "json"], record: SweepRecord, parts: Sequence[Part]) -> str:
    """The report as text, in one of the formats that consist of one file."""
    match form:
        case "html":
            return render_page(record, parts)
        case "md":
            return to_markdown(record.comparison, parts)
        case "csv":
            return to_csv(parts)
        case "json":
            return to_json(record.comparison, parts)


def to_markdown(comparison: Comparison, parts: Sequence[Part]) -> str:
    """Answer, choices, tested pairs and unfinished trials as Markdown without HTML."""
    blocks = [f"# {_plain(comparison.question or comparison.experiment_name)}"]
    size = count_of(len(comparison.table), "trial")
    blocks.append(_plain(f"{comparison.experiment_name}, sweep {comparison.sweep}, {size}."))
    for part in parts:
        if part.label:
            blocks.append(f"# {_plain(part.label)}")
        rows = data_record_of(part.comparison)
        blocks += [] if rows is None else [_plain(" ".join([rows.size_sentence(), *rows.sentences()]))]
        answer, *basis = part.verdict.sentences or ("No verdict.",)
        blocks.append(f"**{_plain(answer)}**")
        blocks += ["\n".join(f"- {_plain(sentence)}" for sentence in basis)] if basis else []
        blocks += [f"**Beware:** {_plain(warning)}" for warning in part.verdict.warnings]
        blocks += _headed(heading_of_choices(part.verdict), choice_table(part.verdict, part.comparison))
        blocks += _headed("Method against method", pairs_table(part.verdict))
        if part.samples is not None:
            blocks += _headed("Sample answers", sample_table(part.samples))
        if part.verdict.trained_sentences:
            blocks += [f"## {TRAINED_HEADING}", *map(_plain, part.verdict.trained_sentences)]
    blocks += _headed("Failed, stopped and out of memory", unfinished_table(comparison))
    return "\n\n".join(blocks) + "\n"


def _headed(heading: str, table: PageTable) -> list[str]:
    return [f"## {heading}", _markdown_table(table)] if table.rows else []


def _markdown_table(table: PageTable) -> str:
    lines = [table.header, tuple("---" for _ in table.header)]
    lines += [tuple(_plain("; ".join((cell.text, *cell.notes))) for cell in row) for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """The text in one line; characters that are special in Markdown or HTML are escaped."""
    one_line = " ".join(text.split())
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", one_line).replace("&", "&amp;").replace("<", "&lt;")


def to_csv(parts: Sequence[Part]) -> str:
    """One line per choice with its figures; a missing value is an empty cell."""
    choices = [(part, choice) for part in parts for choice in (*part.verdict.choices, *part.verdict.references)]
    axes = list(dict.fromkeys(name for _, choice in choices for name in choice.setting.values))
    groups = ("evaluation", "test", "default_evaluation", "default_test")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        ["task", "method", *axes, "evaluation_metric", "metric", "place", "expected", "expected_low", "expected_high"]
        + ["behind_at_most", "at_edge", "num_settings", "is_confirmed"]
        + [f"{group}_{figure}" for group in groups for figure in ("mean", "std", "num")]
    )
    for part, choice in choices:
        default, estimate = choice.default, part.verdict.estimate(choice.name)
        summaries = [choice.evaluation, choice.test, *([default.evaluation, default.test] if default else [None, None])]
        expected = [None] * 4 if estimate is None else [estimate.mean, estimate.low, estimate.high, estimate.behind]
        writer.writerow(
            [part.label, choice.name, *(choice.setting.values.get(name) for name in axes)]
            + [choice.metric, part.verdict.metric, place_words(part.verdict, choice), *expected]
            + [" ".join(choice.edges), choice.num_settings, choice.is_confirmed]
            + [value for summary in summaries for value in _figures(summary)]
        )
    return text.getvalue()


def _figures(summary: SeedSummary | None) -> list[float | None]:
    return [None] * 3 if summary is None else [summary.mean, summary.std, summary.num]


def to_json(comparison: Comparison, parts: Sequence[Part]) -> str:
    """The comparison with its verdicts (one per task) as JSON; a missing value is `null`."""
    content = json.loads(comparison.to_json())
    content["verdicts"] = [
        {"task": part.label, **verdict_to_dict(part.verdict), "rows": _rows(part.comparison)} for part in parts
    ]
    return json.dumps(content, indent=2, allow_nan=False, default=_number) + "\n"


def _rows(comparison: Comparison) -> dict[str, object] | None:
    record = data_record_of(comparison)
    return None if record is None else record.to_dict()


def verdict_to_dict(verdict: Verdict) -> dict[str, object]:
    """The verdict as JSON can hold it."""
    content = {
        "metric": verdict.metric,
        "higher_is_better": verdict.higher_is_better,
        "answer": dataclasses.asdict(verdict.answer),
        "sentences": list(verdict.sentences),
        "warnings": list(verdict.warnings),
        "margin": verdict.margin,
        "optimism": {name: None if own is None else own.value for name, own in verdict.optimism.items()},
        "seeds": list(verdict.seeds),
        "choices": [_choice(choice) for choice in verdict.choices],
        "references": [_choice(choice) for choice in verdict.references],
        "comparison": None if verdict.result is None else dataclasses.asdict(verdict.result),
        "claims": [
            {
                "better": claim.better,
                "worse": claim.worse,
                "is_shown": claim.is_shown,
                "mark": claim.mark,
                "sentence": pair_sentence(claim, verdict.metric),
            }
            for claim in verdict.claims
        ],
        "trained_models": None if verdict.trained is None else dataclasses.asdict(verdict.trained),
        "trained_models_sentences": list(verdict.trained_sentences),
    }
    return {key: finite(value) for key, value in content.items()}


def _choice(choice: Choice) -> dict[str, object]:
    return {
        "method": choice.method,
        "name": choice.name,
        "setting": dict(choice.setting.values),
        "trial_ids": {str(seed): trial_id for seed, trial_id in choice.setting.trial_ids.items()},
        "reported_trial_ids": {str(seed): trial_id for seed, trial_id in choice.reported_trials.items()},
        "is_confirmed": choice.is_confirmed,
        "metric": choice.metric,
        "evaluation": dataclasses.asdict(choice.evaluation),
        "test": None if choice.test is None else dataclasses.asdict(choice.test),
        "at_edge": dict(choice.edges),
        "num_settings": choice.num_settings,
        "default": None if choice.default is None else _choice(choice.default),
    }


def finite(value: Any) -> Any:
    """The value with every number that JSON cannot hold (infinite degrees of freedom) as `null`."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: object) -> object:
    """A numpy scalar as a Python number."""
    return value.item()  # type: ignore[attr-defined]
