"""Rows and a task whose answers a tiny model learns to write in sixty steps."""

from loragrid.tasks.kinds.exact_match import ExactMatch

STEPS = 60
NUM_EVAL, NUM_TEST = 10, 7
EXACT = ExactMatch(answer_pattern="(#+)", max_new_tokens=12)
"""The answer is the run of `#`. Writing four of them is all that a tiny model learns in sixty steps."""


def sums() -> list[dict[str, str]]:
    """Sixty rows with three different answers, each of several tokens."""
    return [
        {"prompt": f"What makes {n} and {n % 3}?", "completion": f" It is #### {('7', '1,250', '-33')[n % 3]}"}
        for n in range(60)
    ]
