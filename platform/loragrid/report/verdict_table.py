"""Shows a verdict in the terminal: the answer, one line per method, then what the answer rests on."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loragrid.comparison.captions import was_chosen
from loragrid.comparison.choice import Choice, reported_summary
from loragrid.comparison.metric_text import MISSING, format_metric, format_size
from loragrid.comparison.ranking import is_higher_better, metric_words, ranking_metric
from loragrid.comparison.table import Comparison
from loragrid.comparison.verdict import Verdict
from loragrid.formatting import format_value

EDGE_MARKS = {"lowest": "↓", "highest": "↑"}
_BAR_CELLS = 17


def render_verdict(verdict: Verdict, width: int = 100) -> RenderableType:
    """The answer; one line per method with its figure, interval and place; then the basis and the warnings.

    The table is left out if nothing was chosen and no method has an interval, because the table of trials shows the
    same. width: in characters; below 100 the bars are left out.
    """
    parts: list[RenderableType] = []
    if verdict.sentences:
        style = "bold green" if verdict.answer.recommended else "bold"
        parts += [Text(verdict.sentences[0], style=style), Text()]
    rows = (*verdict.choices, *verdict.references)
    if any(choice.num_settings > 1 or choice.evaluation.num > 1 for choice in rows):
        parts += [_table(verdict, width), Text()]
    parts += [Text(sentence) for sentence in verdict.sentences[1:]]
    parts += [Text(f"note: {warning}", style="yellow") for warning in verdict.warnings]
    return Group(*parts)


def place_words(verdict: Verdict, choice: Choice) -> str:
    """The method's place against the one that the answer names, such as "behind by 0.0123" or "not told apart"."""
    anchor = verdict.answer.recommended or verdict.answer.leader
    if not anchor or verdict.estimate(choice.name) is None:
        return MISSING
    if choice.name == anchor:
        return "recommended" if verdict.answer.recommended else "best mean, not shown"
    claim = verdict.claim(anchor, choice.name)
    if claim is None or claim.test.refusal:
        return "no claim"
    size = format_size(verdict.metric, claim.test.difference)
    if not claim.test.in_family:
        return "not planned"
    if claim.is_shown:
        return f"behind by {size}" if claim.worse == choice.name else f"ahead by {size}"
    return "unconfirmed" if claim.is_marked else "not told apart"


def export_line(comparison: Comparison, verdict: Verdict, trial_id: str) -> str:
    """Which trial to export, and why that one."""
    metric = ranking_metric(comparison.table)
    row = next(row for row in comparison.table.to_dict("records") if row["trial_id"] == trial_id)
    order = "highest" if is_higher_better(metric) else "lowest"
    named = verdict.answer.recommended or verdict.answer.leader
    of = f"of {named}, " if named else ""
    figure = format_metric(metric, row[metric])
    return f"to export: {trial_id} ({of}{order} {metric_words(metric)} of a single trial, {figure})"


def _table(verdict: Verdict, width: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    everyone = (*verdict.choices, *verdict.references)
    has_places = bool(verdict.answer.recommended or verdict.answer.leader)
    span = _span(verdict)
    bars = span is not None and width >= 100
    table.add_column("method", overflow="fold", vertical="bottom")
    if was_chosen(verdict):
        table.add_column("setting (of tried)", overflow="fold", vertical="bottom")
    words = metric_words(verdict.metric or "test/loss").replace(" ", "\n", 1)
    table.add_column(words, justify="right", no_wrap=True, vertical="bottom")
    if span is not None:
        table.add_column("95 % interval\n(seeds and rows)", justify="right", vertical="bottom")
    else:
        table.add_column("seeds", justify="right", vertical="bottom")
    if bars:
        table.add_column("", no_wrap=True)
    if has_places:
        anchor = verdict.answer.recommended or verdict.answer.leader
        table.add_column(Text(f"against\n{anchor}"), overflow="fold", vertical="bottom")
    for index, choice in enumerate(everyone):
        is_reference = index >= len(verdict.choices)
        style = "dim" if is_reference else "bold green" if choice.name == verdict.answer.recommended else "bold"
        cells: list[Text] = [Text(choice.name, style=style)]
        if was_chosen(verdict):
            cells.append(_setting_cell(choice))
        cells += _figure_cells(verdict, choice, has_interval=span is not None)
        if bars and span is not None:
            cells.append(Text(_bar(verdict, choice, span)))
        if has_places:
            cells.append(Text("reference" if is_reference else place_words(verdict, choice)))
        table.add_row(*cells)
    return table


def _figure_cells(verdict: Verdict, choice: Choice, *, has_interval: bool) -> list[Text]:
    """The expected figure with its interval; a choice that is not compared has the mean over its seeds."""
    estimate, summary = verdict.estimate(choice.name), reported_summary(choice, verdict.metric)
    mean = estimate.mean if estimate is not None else None if summary is None else summary.mean
    figure = Text(format_metric(verdict.metric, mean))
    if not has_interval:
        return [figure, Text(str(0 if summary is None else summary.num))]
    if estimate is None or estimate.low is None or estimate.high is None:
        return [figure, Text(MISSING)]
    low, high = (format_metric(verdict.metric, end).removesuffix(" %") for end in (estimate.low, estimate.high))
    return [figure, Text(f"{low} to {high}")]


def _span(verdict: Verdict) -> tuple[float, float] | None:
    """The lowest and the highest end of any interval; None without intervals."""
    estimates = verdict.result.estimates if verdict.result is not None else ()
    ends = [end for estimate in estimates for end in (estimate.low, estimate.high) if end is not None]
    return (min(ends), max(ends)) if ends else None


def _bar(verdict: Verdict, choice: Choice, span: tuple[float, float]) -> str:
    """The interval as a line of characters, with a dot at the mean."""
    estimate = verdict.estimate(choice.name)
    if estimate is None or estimate.low is None or estimate.high is None or span[1] <= span[0]:
        return ""

    def cell(value: float) -> int:
        return round((value - span[0]) / (span[1] - span[0]) * (_BAR_CELLS - 1))

    low, mean, high = cell(estimate.low), cell(estimate.mean), cell(estimate.high)
    return "".join("●" if at == mean else "─" if low <= at <= high else " " for at in range(_BAR_CELLS))


def _setting_cell(choice: Choice) -> Text:
    parts: Sequence[Text] = [
        Text(f"{axis} {format_value(value)}").append(
            EDGE_MARKS.get(choice.edge_sides.get(axis, ""), ""), style="yellow"
        )
        for axis, value in choice.setting.values.items()
        if axis not in choice.apart
    ]
    cell = Text(", ").join(parts)
    return cell.append(f" of {choice.num_settings}", style="dim") if choice.num_settings > 1 else Text(MISSING)
