"""Collects the pages of the site in one folder, which Zensical reads: `python -m docs.generate build/docs`."""

import sys
from pathlib import Path

from docs.generate.collect import collect

if __name__ == "__main__":
    collect(Path(__file__).resolve().parents[2], Path(sys.argv[1]))
