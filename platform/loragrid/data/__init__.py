"""Turns files, hub data sets and embedded data into tokenised, split rows."""
