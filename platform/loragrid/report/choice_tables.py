"""Builds the tables of a verdict: the chosen settings with their figures, and the tested pairs of methods."""

from collections.abc import Callable, Sequence
from typing import Any

from loragrid.comparison.captions import was_chosen
from loragrid.comparison.choice import Choice, SeedSummary, reported_summary
from loragrid.comparison.claims import Claim
from loragrid.comparison.metric_text import (
    MISSING,
    format_difference,
    format_metric,
    format_p,
    format_range,
    format_size,
)
from loragrid.comparison.ranking import metric_words
from loragrid.comparison.settings import mean_figure, show_setting
from loragrid.comparison.table import Comparison
from loragrid.comparison.verdict import Verdict
from loragrid.formatting import count_of, format_count, format_value
from loragrid.report.tables import Cell, PageTable


def choice_table(verdict: Verdict, comparison: Comparison) -> PageTable:
    """One row per choice, best first, with the figure of its untuned default; then one per reference."""
    everyone = [*verdict.choices, *verdict.references]
    has_test = verdict.metric.startswith("test/")
    heads = ([metric_words(verdict.metric)] if has_test else []) + [
        metric_words(choice.metric) for choice in everyone[:1]
    ]
    rows = []
    for choice in everyone:
        marks = tuple(
            f"{axis} {format_value(value)} is the {choice.edge_sides.get(axis, 'last')} tried: extend the ladder"
            for axis, value in choice.edges.items()
        )
        figures = [estimate_cell(verdict, choice)] if has_test else []
        figures.append(summary_cell(choice.metric, choice.evaluation))
        is_reference = choice in verdict.references
        rows.append(
            (
                Cell(text=choice.name, notes=("trains nothing: for reference",) if is_reference else ()),
                Cell(text=show_setting(choice.setting), notes=marks, is_marked=bool(marks)),
                *figures,
                Cell(text=MISSING, is_number=True) if is_reference else _default_cell(choice, verdict.metric),
                _tried_cell(verdict, choice),
                _figure_cell(comparison, choice, "parameters/trainable", format_count),
            )
        )
    header = (
        "method",
        "chosen setting" if was_chosen(verdict) else "setting",
        *heads,
        "untuned default",
        "settings tried",
        "trained params",
    )
    return PageTable(header=header, rows=tuple(rows))


def _tried_cell(verdict: Verdict, choice: Choice) -> Cell:
    """The number of settings tried, with the optimism of the choice if it is known."""
    optimism = verdict.optimism.get(choice.name)
    notes: tuple[str, ...] = ()
    if optimism is not None:
        notes = (f"optimism {format_difference(verdict.metric, optimism.value)}",)
    return Cell(text=str(choice.num_settings), notes=notes, is_number=True)


def estimate_cell(verdict: Verdict, choice: Choice) -> Cell:
    """The expected figure over new seeds and rows with its interval; without one, the mean over seeds."""
    estimate = verdict.estimate(choice.name)
    if estimate is None:
        return summary_cell(verdict.metric, reported_summary(choice, verdict.metric))
    interval = format_range(verdict.metric, estimate.low, estimate.high)
    return Cell(
        text=format_metric(verdict.metric, estimate.mean),
        notes=() if interval == MISSING else (f"{interval} (95 %, new seeds and rows)",),
        is_number=True,
    )


def summary_cell(metric: str, summary: SeedSummary | None) -> Cell:
    """The mean over seeds, and how much the seeds differ."""
    if summary is None:
        return Cell(text=MISSING, is_number=True)
    notes = [count_of(summary.num, "seed")]
    if summary.std is not None:
        notes.insert(0, f"deviation {format_size(metric, summary.std)}")
    return Cell(text=format_metric(metric, summary.mean), notes=(", ".join(notes),), is_number=True)


def _default_cell(choice: Choice, metric: str) -> Cell:
    default = choice.default
    if default is None:
        reason = "nothing was chosen" if choice.num_settings == 1 else "not in the sweep"
        return Cell(text=MISSING, notes=(choice.default_fault or reason,), is_number=True)
    if default.setting.values == choice.setting.values:
        return Cell(text="the same", is_number=True)
    # A missing test figure is not replaced by the evaluation figure, which must not be compared with test figures.
    cell = summary_cell(metric, reported_summary(default, metric))
    fault = (choice.default_fault,) if choice.default_fault else ()
    return Cell(text=cell.text, notes=(*cell.notes, show_setting(default.setting), *fault), is_number=True)


def against_table(verdict: Verdict) -> PageTable:
    """Every compared method against the one that the answer names; empty if it names none."""
    anchor = verdict.answer.recommended or verdict.answer.leader
    claims = [claim for claim in verdict.claims if anchor in (claim.better, claim.worse)]
    return _as_table(verdict, claims, anchor)


def other_pairs_table(verdict: Verdict) -> PageTable:
    """All pairs without the method that the answer names."""
    anchor = verdict.answer.recommended or verdict.answer.leader
    return _as_table(verdict, [claim for claim in verdict.claims if anchor not in (claim.better, claim.worse)])


def pairs_table(verdict: Verdict) -> PageTable:
    """All pairs."""
    return _as_table(verdict, verdict.claims)


def _as_table(verdict: Verdict, claims: Sequence[Claim], anchor: str = "") -> PageTable:
    rows = [_claim_row(verdict, claim, anchor) for claim in claims]
    header = ("pair", "what it shows", "difference", "95 % interval", "p (Holm)")
    return PageTable(header=header, rows=tuple(rows))


def _claim_row(verdict: Verdict, claim: Claim, anchor: str) -> tuple[Cell, ...]:
    """One pair, the better method first; with an anchor, the anchor first."""
    test, metric = claim.test, verdict.metric
    first = anchor or claim.better
    second = claim.worse if first == claim.better else claim.better
    side = 1 if test.first == first else -1
    low, high = sorted((side * test.low, side * test.high))
    shown = f"{format_difference(metric, low)} to {format_difference(metric, high)}"
    return (
        Cell(text=f"{first} − {second}"),
        Cell(text=conclusion(claim), notes=(claim.mark,) if claim.is_marked else (), is_marked=claim.is_marked),
        Cell(text=format_difference(metric, side * test.difference), is_number=True),
        Cell(text=MISSING if test.refusal else shown, is_number=True),
        Cell(text=format_p(test.p_adjusted), is_number=True),
    )


def conclusion(claim: Claim) -> str:
    """What a pair shows, in words."""
    if claim.test.refusal:
        return f"no claim: {claim.test.refusal}"
    if not claim.test.in_family:
        return "not among the planned pairs"
    if claim.is_shown:
        return f"{claim.better} is better"
    return f"{claim.better} is ahead, not confirmed" if claim.is_marked else "not told apart"


def _figure_cell(comparison: Comparison, choice: Choice, key: str, write: Callable[[Any], str]) -> Cell:
    value = mean_figure(comparison, list(choice.setting.trial_ids.values()), key)
    return Cell(text=MISSING if value is None else write(value), is_number=True)
