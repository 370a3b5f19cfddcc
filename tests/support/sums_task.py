"""Rows and a task whose answers a tiny model learns to write in sixty steps."""

from loragrid.tasks.kinds.exact_match import ExactMatch

STEPS = 60
NUM_EVAL, NUM_TEST = 10, 7
EXACT = ExactMatch(answer_pattern="(#+)", max_new_tokens=12)
"""As much as so small a model learns in so few steps: to write four of these."""


def sums() -> list[dict[str, str]]:
    """Rows whose answer is one of three, and of several tokens."""
    return [
        {"prompt": f"What makes {n} and {n % 3}?", "completion": f" It is #### {('7', '1,250', '-33')[n % 3]}"}
        for n in range(60)
    ]
