"""Words above tables and below charts that depend on a verdict: which trials are shown, and what was chosen."""

from loragrid.comparison.verdict import Verdict


def was_chosen(verdict: Verdict) -> bool:
    """Whether any method has more than one setting."""
    return any(choice.num_settings > 1 for choice in (*verdict.choices, *verdict.references))


def is_confirmed(verdict: Verdict) -> bool:
    """Whether the reported figures are of fresh seeds, which did not take part in the choice."""
    return any(choice.is_confirmed for choice in verdict.choices)


def trials_caption(verdict: Verdict) -> str:
    """The first half of a chart's caption: which trials represent each method, and that they are averaged."""
    everyone = (*verdict.choices, *verdict.references)
    who = "contestant" if any(choice.apart for choice in everyone) else "method"
    if not everyone:
        return "All trials of every method, because none has a figure to choose a setting by: mean over them"
    if not was_chosen(verdict):
        return f"The only setting of every {who}: mean over its seeds"
    rest = "" if all(choice.num_settings > 1 for choice in everyone) else ", or its only one"
    return f"The chosen setting of every {who}{rest}: mean over its seeds"


def heading_of_choices(verdict: Verdict) -> str:
    """The heading of the table of choices."""
    return "Every method at its best setting" if was_chosen(verdict) else "Every method's figures"
