"""Shows a comparison as a table in the terminal."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.cells import cell_len
from rich.table import Table
from rich.text import Text

from loragrid.comparison.costs import STEP_TIME, cost_of
from loragrid.comparison.fingerprint import FingerprintReport, fingerprint_of
from loragrid.comparison.metric_text import format_cost, format_metric
from loragrid.comparison.ranking import ranking_metric, sort_best_first
from loragrid.comparison.table import PHASE_COLUMN, Comparison, is_stopped_early
from loragrid.formatting import (
    count_of,
    format_bytes,
    format_count,
    format_roughly,
    format_seconds,
    format_value,
    is_missing,
)
from loragrid.tasks.discovery import figure_of, task_figures

MARK = "†"
"""Follows the method of a trial whose fingerprint differs from that of most others."""

STATUS_STYLES = {"FAILED": "red", "KILLED": "yellow", "RUNNING": "yellow"}


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table. priority: columns with the highest number are left out first; 0 is never left out."""

    header: str
    cells: Sequence[Text]
    priority: int = 0

    @property
    def width(self) -> int:
        lines = [*self.header.split("\n"), *(cell.plain for cell in self.cells)]
        return max(cell_len(line) for line in lines)


# The metrics in the table: (key, heading, formatter, priority). The CSV and MLflow have all metrics.
METRIC_COLUMNS: tuple[tuple[str, str, Callable[[Any], str], int], ...] = (
    ("parameters/trainable", "trained\nparams", format_count, 1),
    ("memory/saved_activation_bytes", "activation\nmemory", format_bytes, 2),
    ("memory/peak_allocated_bytes", "peak GPU\nmemory", format_bytes, 4),
    (STEP_TIME, "step\ntime", format_seconds, 3),
    ("throughput/tokens_per_second", "tokens\nper s", format_roughly, 6),
    ("convergence/steps_to_threshold", "steps to\nthreshold", str, 5),
)


def render_table(comparison: Comparison, width: int = 100) -> Table:
    """One row per trial, the best first: by the task's figure, otherwise by evaluation loss.

    Trials that did not finish have their status in the table and their reason below it. Metrics that do not fit into
    `width` (characters) are named below the table; settings are never left out.
    """
    rows, metric = sort_best_first(comparison.table).to_dict("records"), ranking_metric(comparison.table)
    fingerprint = fingerprint_of(comparison)
    columns = [Column(header="method", cells=[_method_cell(row, fingerprint) for row in rows])]
    if PHASE_COLUMN in comparison.table:
        columns.append(Column(header=PHASE_COLUMN, cells=[Text(row[PHASE_COLUMN]) for row in rows]))
    for name in comparison.axes:
        columns.append(Column(header=name, cells=[Text(format_value(row[name])) for row in rows]))
    for key in dict.fromkeys((metric, "eval/final_loss")):
        cells = [_figure_cell(row, key) for row in rows]
        figure = figure_of(key)
        columns.append(Column(header=f"eval\n{'loss' if figure is None else figure.words}", cells=cells))
    for key, header, write, priority in METRIC_COLUMNS:
        values = [row.get(key) for row in rows]
        if not all(is_missing(value) for value in values):
            cells = [_cost_cell(comparison, row, key, write) for row in rows]
            columns.append(Column(header=header, cells=cells, priority=priority))
    shown, left_out = _fit(columns, width)

    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
        title=_title(comparison, fingerprint),
        title_justify="left",
        title_style="",
        caption=_caption(comparison, left_out, fingerprint),
        caption_justify="left",
        caption_style="",
        min_width=min(width, 60),
    )
    for column in shown:
        justify: Literal["left", "right"] = "left" if column.header == "method" else "right"
        table.add_column(column.header, justify=justify, no_wrap=True, vertical="bottom", min_width=column.width)
    for i in range(len(rows)):
        table.add_row(*(column.cells[i] for column in shown))
    return table


def _fit(columns: Sequence[Column], width: int) -> tuple[list[Column], list[Column]]:
    """(The columns that fit into `width`, the columns left out)."""
    shown = list(columns)
    while sum(column.width + 2 for column in shown) > width:
        last = max(shown, key=lambda column: column.priority)
        if last.priority == 0:
            break
        shown.remove(last)
    return shown, [column for column in columns if column not in shown]


def _cost_cell(comparison: Comparison, row: Mapping[Any, Any], key: str, write: Callable[[Any], str]) -> Text:
    """A metric of one trial; a step time as the range of its measurements."""
    if is_missing(row.get(key)):
        return Text("–")
    cost = cost_of(comparison, [row["trial_id"]], key) if key == STEP_TIME else None
    return Text(write(row[key]) if cost is None else format_cost(key, cost, write))


def _figure_cell(row: Mapping[Any, Any], metric: str) -> Text:
    if is_stopped_early(row):
        return Text("stopped", style="dim")
    if row["status"] != "FINISHED":
        return Text(row["status"].lower(), style=STATUS_STYLES.get(row["status"], ""))
    figure = row.get(metric)
    if is_missing(figure):
        return Text("–")
    return Text(format_metric(metric, figure))


def _method_cell(row: Mapping[Any, Any], fingerprint: FingerprintReport) -> Text:
    cell = Text(row["method"], style="bold")
    return cell.append(f" {MARK}", style="bold yellow") if row["trial_id"] in fingerprint.marked else cell


def _title(comparison: Comparison, fingerprint: FingerprintReport) -> Text:
    title = Text(comparison.experiment_name, style="bold")
    rows = comparison.table.to_dict("records")
    num_stopped = sum(is_stopped_early(row) for row in rows)
    counts = Counter(row["status"] for row in rows if not is_stopped_early(row))
    title.append(f"  {comparison.sweep}, {count_of(len(comparison.table), 'trial')}", style="not bold dim")
    for status, style in STATUS_STYLES.items():
        if counts[status]:
            title.append(f", {counts[status]} {status.lower()}", style=f"not bold {style}")
    if num_stopped:
        title.append(f", {num_stopped} stopped early", style="not bold dim")
    if comparison.question:
        title.append(f"\n{comparison.question}", style="not bold italic")
    for sentence in fingerprint.sentences():
        title.append(f"\n{sentence}", style="not bold yellow")
    title.append("\n")
    return title


def _caption(comparison: Comparison, left_out: Sequence[Column], fingerprint: FingerprintReport) -> Text:
    caption = Text()
    for what, trial_ids in fingerprint.marked_together().items():
        caption.append(f"{MARK} ", style="bold yellow")
        caption.append(f"{', '.join(trial_ids)} {what}\n")
    for key, name in (("eval/loss", "loss"), *((f"eval/{figure.name}", figure.words) for figure in task_figures())):
        start = comparison.curves.query("key == @key and step == 0")["value"]
        if not start.empty:
            low, high = format_metric(key, start.min()), format_metric(key, start.max())
            caption.append(f"eval {name} before training: {low if low == high else f'{low} to {high}'}\n", style="dim")
    if left_out:
        names = ", ".join(column.header.replace("\n", " ") for column in left_out)
        caption.append(f"no room here, but in the CSV: {names}\n", style="dim")
    rows = comparison.table.to_dict("records")
    # Trials that early stopping ended are only counted; the CSV and MLflow have their reasons.
    rungs = Counter(row["reason"].partition(":")[0] for row in rows if is_stopped_early(row))
    for rung, number in sorted(rungs.items()):
        caption.append(f"{count_of(number, 'trial')} {rung}\n", style="dim")
    for row in rows:
        if row["status"] != "FINISHED" and row["reason"] and not is_stopped_early(row):
            caption.append(f"{row['trial_id']} {row['status'].lower()}: ", style=STATUS_STYLES.get(row["status"], ""))
            caption.append(f"{row['reason'].strip().splitlines()[0]}\n")
    caption.rstrip()
    return Text("\n").append(caption) if caption else caption
