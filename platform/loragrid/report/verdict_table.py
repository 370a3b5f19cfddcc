"""Shows a verdict in the terminal: one line per method's choice, then what was found in words."""

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from loragrid.comparison.findings import show_interval
from loragrid.comparison.ranking import metric_words, test_metrics
from loragrid.comparison.selection import Choice, Verdict, reported_interval
from loragrid.formatting import format_value

EDGE_MARKS = {"lowest": "↓", "highest": "↑"}


def render_verdict(verdict: Verdict) -> RenderableType:
    """The choices, best first, with their figures as mean ± half of the 95 % interval (n), and the sentences below.

    Where every method has one setting, nothing was chosen, and one trial of it, no interval is known: then the table
    of trials above says it all, and the sentences stand alone.
    """
    parts: list[RenderableType] = []
    rows = (*verdict.choices, *verdict.references)
    if any(choice.num_settings > 1 or choice.validation.num > 1 for choice in rows):
        parts += [_table(verdict), Text()]
    parts += [Text(sentence) for sentence in verdict.sentences]
    parts += [Text(f"note: {warning}", style="yellow") for warning in verdict.warnings]
    return Group(*parts)


def _table(verdict: Verdict) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    is_chosen = any(choice.num_settings > 1 for choice in (*verdict.choices, *verdict.references))
    has_test = verdict.metric in test_metrics()
    has_defaults = any(choice.default is not None for choice in verdict.choices)
    validation = verdict.choices[0].metric if verdict.choices else verdict.references[0].metric
    table.add_column("method", overflow="fold", vertical="bottom")
    if is_chosen:
        table.add_column("best setting", overflow="fold", vertical="bottom")
    table.add_column(f"{metric_words(validation)}\n± 95 % (seeds)", justify="right", overflow="fold", vertical="bottom")
    if has_test:
        heading = f"{metric_words(verdict.metric)}\n± 95 % (seeds)"
        table.add_column(heading, justify="right", overflow="fold", vertical="bottom")
    if has_defaults:
        table.add_column("at its\ndefault", justify="right", overflow="fold", vertical="bottom")
    for index, choice in enumerate((*verdict.choices, *verdict.references)):
        is_reference = index >= len(verdict.choices)
        figures = [show_interval(choice.validation)]
        if has_test:
            figures.append("–" if choice.test is None else show_interval(choice.test))
        cells = [Text(choice.name, style="dim" if is_reference else "bold")]
        if is_chosen:
            cells.append(_setting_cell(choice))
        cells += [Text(figure, style="bold green" if index == 0 else "") for figure in figures]
        if has_defaults:
            cells.append(_default_cell(choice, verdict.metric))
        table.add_row(*cells)
    return table


def _setting_cell(choice: Choice) -> Text:
    cell = Text(", ").join(
        Text(f"{axis} {format_value(value)}").append(
            EDGE_MARKS.get(choice.edge_sides.get(axis, ""), ""), style="yellow"
        )
        for axis, value in choice.setting.values.items()
        if axis not in choice.apart
    )
    return cell.append(f" of {choice.num_settings}", style="dim") if choice.num_settings > 1 else Text("–")


def _default_cell(choice: Choice, metric: str) -> Text:
    if choice.default is None:
        return Text("–")
    if choice.default.setting == choice.setting:
        return Text("the same")
    interval = reported_interval(choice.default, metric)
    return Text("–" if interval is None else show_interval(interval))
