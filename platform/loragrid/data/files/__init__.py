"""Reads files and hub data sets as rows, strictly: what other readers change or drop in silence is refused."""
