"""The command line: one module for commands on experiment files, one for commands on recorded sweeps."""
