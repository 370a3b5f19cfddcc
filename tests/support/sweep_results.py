"""An assertion about a sweep that says how each trial ended, because a bare `False` cannot be explained afterwards."""

import psutil

import loragrid as lg


def assert_succeeded(result: lg.SweepResult, printed: str = "") -> None:
    """Assert that every trial ended as planned; otherwise show each trial's end and what the sweep printed.

    printed: the output of the sweep, if the test kept it.
    """
    assert result.succeeded, how_it_ended(result, printed)


def how_it_ended(result: lg.SweepResult, printed: str = "") -> str:
    """How each trial of the sweep ended and why, what is outstanding, and how full this machine's memory is."""
    statuses, reasons = result.outcome.statuses, result.outcome.reasons
    trials = [
        f"{trial.trial_id}: {statuses.get(trial.trial_id, 'no status')} {reasons.get(trial.trial_id, '')}"
        for trial in result.plan.trials
    ]
    return "\n".join(
        [
            *trials,
            f"unconfirmed: {result.unconfirmed!r}; record that waits for MLflow: {result.waiting_record}",
            f"memory in use now: {psutil.virtual_memory().percent:.0f} % (Ray ends workers at 95 %)",
            printed,
        ]
    )
