"""The command line: one module for the commands on experiments, one for those on records."""
