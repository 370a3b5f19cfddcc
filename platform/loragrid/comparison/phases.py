"""Separates the trials that tune from the trials that confirm the tuned settings with fresh seeds."""

from loragrid.comparison.table import Comparison


def split_phases(comparison: Comparison) -> tuple[Comparison, Comparison | None]:
    """(The trials that tune, the trials that confirm); None without confirming trials."""
    return comparison, None
