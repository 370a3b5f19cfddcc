"""Builds the HTML report: one page that contains everything it shows and makes no requests."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from loragrid.comparison.captions import heading_of_choices, is_confirmed, trials_caption, was_chosen
from loragrid.comparison.costs import STEP_TIME, cost_of
from loragrid.comparison.data_record import data_record_of
from loragrid.comparison.fingerprint import fingerprint_of
from loragrid.comparison.phases import split_phases
from loragrid.comparison.ranking import EVALUATION_LOSS, is_higher_better, metric_words
from loragrid.comparison.sample_answers import SampleTable, load_samples
from loragrid.comparison.settings import Setting, mean_figure, settings_of, show_setting, tasks_of
from loragrid.comparison.sweep_record import SweepRecord
from loragrid.comparison.table import Comparison
from loragrid.comparison.verdict import Verdict, load_verdict
from loragrid.formatting import format_bytes, format_seconds
from loragrid.report.bar_charts import MEMORY_PARTS, TIME_PARTS, Bar, bar_chart
from loragrid.report.charts import method_styles
from loragrid.report.choice_tables import against_table, choice_table, other_pairs_table
from loragrid.report.cost_charts import COSTS, Point, pareto_charts
from loragrid.report.curve_charts import Line, curve_charts
from loragrid.report.forest_plot import forest_plots
from loragrid.report.heat_maps import SettingFigures, heat_maps
from loragrid.report.retention_table import retention_table
from loragrid.report.sample_answers import sample_sentences, sample_table
from loragrid.report.tables import (
    end_of,
    estimate_table,
    parts_table,
    trial_table,
    unfinished_table,
)
from loragrid.report.tuning_charts import TuningCurve, tuning_charts
from loragrid.tracking.store_uri import Scalar

MEMORY_PEAKS = {
    "memory/peak_allocated_bytes": "peak allocated, training",
    "memory/peak_reserved_bytes": "peak reserved, training",
    "memory/eval_peak_allocated_bytes": "peak allocated, evaluation",
    "memory/peak_resident_bytes": "peak of the process (RAM)",
}
CARD_FIELDS = {
    "paper": "paper",
    "authors": "authors",
    "year": "year",
    "arxiv": "arXiv",
    "update_rule": "update rule",
    "differences": "what differs from the paper",
    "peft_equivalent": "PEFT equivalent",
}
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+(?=@)")


@dataclass(frozen=True, kw_only=True)
class Part:
    """The part of a sweep on one model and one data set. label: names the two if the sweep has several; else ""."""

    label: str
    comparison: Comparison
    settings: Sequence[Setting]
    verdict: Verdict
    samples: SampleTable | None = None


def load_parts(comparison: Comparison, apart: Collection[str] = ()) -> list[Part]:
    """The parts of a sweep with their verdicts, see `load_verdict`."""
    parts = []
    for label, part in tasks_of(comparison).items():
        verdict = load_verdict(part, apart)
        samples = load_samples(part, verdict.choices)
        settings = settings_of(split_phases(part)[0])
        parts.append(Part(label=label, comparison=part, settings=settings, verdict=verdict, samples=samples))
    return parts


def render_page(record: SweepRecord, parts: Sequence[Part]) -> str:
    """The report as HTML.

    Equal records lead to equal bytes, because the page contains no times except the sweep's own.
    """
    environment = Environment(
        loader=PackageLoader("loragrid.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    comparison, fingerprint = record.comparison, fingerprint_of(record.comparison)
    return environment.get_template("report.html.j2").render(
        comparison=comparison,
        record=record,
        parts=[_contents(record, part) for part in parts],
        when=_period(record),
        counts=count_ends(comparison),
        swatches=card_swatches(comparison),
        unfinished=unfinished_table(comparison),
        trials=trial_table(comparison, fingerprint.marked),
        cards=record.cards,
        card_fields=CARD_FIELDS,
        fingerprint=fingerprint,
        estimates=estimate_table(record),
        yaml=None if record.experiment_yaml is None else _CREDENTIALS.sub("…", record.experiment_yaml),
    )


def _contents(record: SweepRecord, part: Part) -> dict[str, Any]:
    comparison, verdict, rows = part.comparison, part.verdict, data_record_of(part.comparison)
    styles = method_styles(record.comparison.table["method"], [*verdict.choices, *verdict.references])
    chosen = _lines(comparison, verdict)
    shown = trials_caption(verdict)
    curves, missing_curves = curve_charts(record, comparison.curves, chosen, styles, shown)
    points, metric = setting_points(part), evaluation_metric(verdict)
    # The verdict's own direction can differ: settings may be chosen by accuracy and reported by loss.
    higher_is_better = is_higher_better(metric)
    fronts, missing_fronts = pareto_charts(points, metric, higher_is_better, styles)
    by_label = [(line.label, line.trial_ids) for line in chosen]
    figures = figures_by_method(part, metric)
    return {
        "label": part.label,
        "verdict": verdict,
        "rows": [] if rows is None else [rows.size_sentence(), *rows.sentences()],
        "heading": heading_of_choices(verdict),
        "choices": choice_table(verdict, comparison),
        "was_chosen": was_chosen(verdict),
        "chosen_by": metric_words(metric),
        "against": against_table(verdict),
        "other_pairs": other_pairs_table(verdict),
        "forest": forest_plots(verdict, styles),
        "has_test": any(choice.test is not None for choice in verdict.choices),
        "is_confirmed": is_confirmed(verdict),
        "samples": None if part.samples is None else sample_table(part.samples),
        "sample_sentences": [] if part.samples is None else sample_sentences(part.samples),
        "retention": retention_table(comparison, by_label),
        "curves": curves,
        "missing_curves": missing_curves,
        "fronts": fronts,
        "missing_fronts": missing_fronts if points else [],
        "tuning": tuning_charts(_tuning_curves(verdict, figures), comparison.axes, metric, styles),
        "heat_maps": heat_maps(figures, comparison.axes, metric, higher_is_better),
        "memory_chart": bar_chart(
            "Memory by part",
            _bars(comparison, chosen, MEMORY_PARTS),
            MEMORY_PARTS,
            format_bytes,
            f"One worker, every trial measured solo. {shown}.",
        ),
        "memory_table": parts_table(comparison, by_label, {**MEMORY_PARTS, **MEMORY_PEAKS}, format_bytes),
        "time_chart": bar_chart(
            "Time by part", _bars(comparison, chosen, TIME_PARTS), TIME_PARTS, format_seconds, _TIME_CAPTION
        ),
        "time_table": parts_table(
            comparison, by_label, {STEP_TIME: "one step, measured solo", **TIME_PARTS}, format_seconds
        ),
    }


def evaluation_metric(verdict: Verdict) -> str:
    """The metric by which settings were chosen; the loss if none was chosen."""
    if verdict.choices:
        return verdict.choices[0].metric
    return EVALUATION_LOSS


def card_swatches(comparison: Comparison) -> dict[str, dict[str, str]]:
    """Method -> its entry in the table (a label or its name) -> the colour of its curves."""
    swatches: dict[str, dict[str, str]] = {}
    for shown, style in method_styles(comparison.table["method"]).items():
        swatches.setdefault(comparison.methods.get(shown, shown), {})[shown] = style.colour
    return swatches


def count_ends(comparison: Comparison) -> dict[str, int]:
    """How trials ended, in words -> the number of trials."""
    counts: dict[str, int] = {}
    for row in comparison.table.to_dict("records"):
        counts[end_of(row)] = counts.get(end_of(row), 0) + 1
    return counts


def setting_points(part: Part) -> list[Point]:
    """The points of the Pareto charts: every setting with all seeds, with its figure on the evaluation rows."""
    metric, everyone = evaluation_metric(part.verdict), [*part.verdict.choices, *part.verdict.references]
    chosen = {tuple(choice.setting.trial_ids.values()): choice.name for choice in everyone}
    points = []
    for setting in _with_all_seeds(part):
        trial_ids = tuple(setting.trial_ids.values())
        figure = mean_figure(part.comparison, trial_ids, metric)
        if figure is None:
            continue
        costs = {key: cost_of(part.comparison, trial_ids, key) for _, keys, _ in COSTS for key, _ in keys}
        points.append(
            Point(
                name=chosen.get(trial_ids, setting.method),
                label=f"{setting.method} {show_setting(setting)}" if setting.values else setting.method,
                figure=figure,
                costs={key: cost for key, cost in costs.items() if cost is not None},
                is_chosen=trial_ids in chosen,
            )
        )
    return points


def _lines(comparison: Comparison, verdict: Verdict) -> list[Line]:
    """One line per choice and reference; if there are none, one per method over all of its trials."""
    everyone = [*verdict.choices, *verdict.references]
    if everyone:
        return [Line(label=choice.name, trial_ids=tuple(choice.setting.trial_ids.values())) for choice in everyone]
    groups = comparison.table.groupby("method")["trial_id"]
    return [Line(label=str(method), trial_ids=tuple(trial_ids)) for method, trial_ids in groups]


def _bars(comparison: Comparison, lines: Sequence[Line], parts: Mapping[str, str]) -> list[Bar]:
    bars = []
    for line in lines:
        values = {key: mean_figure(comparison, line.trial_ids, key) for key in parts}
        bars.append(Bar(label=line.label, parts={key: value for key, value in values.items() if value is not None}))
    return bars


def figures_by_method(part: Part, metric: str) -> Mapping[str, SettingFigures]:
    """Method -> its settings with their mean figures over seeds; None if a setting lacks seeds that others have."""
    figures: dict[str, list[tuple[Mapping[str, Scalar], float | None]]] = {}
    whole = _with_all_seeds(part)
    for setting in part.settings:
        trial_ids = list(setting.trial_ids.values())
        figure = mean_figure(part.comparison, trial_ids, metric) if setting in whole else None
        figures.setdefault(setting.method, []).append((setting.values, figure))
    return figures


def _tuning_curves(verdict: Verdict, figures: Mapping[str, SettingFigures]) -> list[TuningCurve]:
    """One curve per contestant, over the settings of its method that match its values of the axes in `apart`."""
    return [
        TuningCurve(
            name=choice.name,
            settings=[
                (values, figure)
                for values, figure in figures[choice.method]
                if all(values.get(axis) == value for axis, value in choice.apart.items())
            ],
            chosen=choice.setting.values,
        )
        for choice in sorted(verdict.choices, key=lambda choice: choice.name)
    ]


def _with_all_seeds(part: Part) -> list[Setting]:
    """The chosen settings, and those with as many finished trials as the most complete setting of their method.

    Settings with fewer seeds are left out, because they could look good by chance.
    """
    chosen = [choice.setting.trial_ids for choice in (*part.verdict.choices, *part.verdict.references)]
    most: dict[str, int] = {}
    for setting in part.settings:
        most[setting.method] = max(most.get(setting.method, 0), len(setting.trial_ids))
    return [
        setting
        for setting in part.settings
        if setting.trial_ids in chosen or 0 < len(setting.trial_ids) == most[setting.method]
    ]


def _period(record: SweepRecord) -> str:
    if record.started is None:
        return ""
    started = datetime.fromtimestamp(record.started, UTC)
    text = f"{started:%Y-%m-%d %H:%M} UTC"
    return text if record.ended is None else f"{text}, {format_seconds(record.ended - record.started)}"


_TIME_CAPTION = (
    "Times of the packs that the trials trained in: members of one pack share them, so they show where a sweep's time "
    "went, not which method is faster. For that, see the step time measured solo."
)
