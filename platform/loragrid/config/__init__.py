"""Turns YAML into a checked `Experiment`; imports neither torch nor Ray."""
