"""Installed versions of dependencies whose behaviour differs across the supported range."""

import importlib.metadata


def version_of(distribution: str) -> tuple[int, int]:
    """The first two numbers of an installed distribution's version: ("transformers") -> (5, 17)."""
    major, minor = importlib.metadata.version(distribution).split(".")[:2]
    return int(major), int(minor)
