"""Runs a sweep on Ray: cluster, Tune trials, trainers, failures, resumption."""
