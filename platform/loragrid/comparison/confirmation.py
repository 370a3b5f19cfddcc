"""Replaces the figures of a choice by those of its trials with fresh seeds, which did not take part in the choice."""

from dataclasses import replace

from loragrid.comparison.choice import Choice, summarize
from loragrid.comparison.settings import figure_in, seed_of
from loragrid.comparison.table import Comparison, plain_value


def confirmed(choice: Choice, confirm: Comparison, reported: str) -> Choice:
    """The choice with the test figures of the trials that trained its setting again with fresh seeds.

    confirm: the confirming trials of the sweep, see `split_phases`. reported: the test metric that is compared. Without
    finished confirming trials of this setting, the choice has no test figures.
    """
    rows = [
        row
        for row in confirm.table.to_dict("records")
        if row["method"] == choice.method
        and row["status"] == "FINISHED"
        and all(plain_value(row[axis]) == value for axis, value in choice.setting.values.items())
    ]
    trials = {seed_of(confirm, row): str(row["trial_id"]) for row in rows}
    figures = [value for row in rows if (value := figure_in(row, reported)) is not None]
    return replace(choice, test=summarize(figures) if figures else None, reported_trials=trials, is_confirmed=True)
