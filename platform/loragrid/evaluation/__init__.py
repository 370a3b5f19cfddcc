"""Scores the members of a pack: on a task, on held-out text, and row by row on the test rows."""
