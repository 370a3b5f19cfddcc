"""Expands an experiment into trials and packs; the names under which trials are recorded."""
