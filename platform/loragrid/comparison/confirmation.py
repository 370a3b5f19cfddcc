"""Replaces the figures of a choice by those of its trials with fresh seeds, which did not take part in the choice."""

from dataclasses import replace

from loragrid.comparison.choice import Choice, summarize
from loragrid.comparison.phases import confirmed_setting
from loragrid.comparison.settings import figure_in
from loragrid.comparison.table import Comparison


def confirmed(choice: Choice, confirm: Comparison, reported: str) -> Choice:
    """The choice with the test figures of the trials that trained its setting again with fresh seeds.

    confirm: the confirming trials of the sweep, see `split_phases`. reported: the test metric that is compared. Without
    finished confirming trials of this setting, the choice has no test figures.
    """
    setting = confirmed_setting(choice.setting, confirm)
    trials = dict(setting.trial_ids) if setting is not None else {}
    rows = {str(row["trial_id"]): row for row in confirm.table.to_dict("records")}
    figures = [value for trial_id in trials.values() if (value := figure_in(rows[trial_id], reported)) is not None]
    return replace(choice, test=summarize(figures) if figures else None, reported_trials=trials, is_confirmed=True)
