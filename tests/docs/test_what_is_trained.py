"""The page that lists the kinds of silent mistakes names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "what_is_trained.md"


def test_every_kind_of_mistake_names_tests_that_exist() -> None:
    rows = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    kinds = [row for row in rows if not row.startswith("| kind |")]
    assert len(kinds) > 80
    for row in kinds:
        named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", row)
        assert named, row
        for file, test in named:
            source = ROOT / file
            assert source.is_file(), file
            assert not test or f"def {test}(" in source.read_text(encoding="utf-8"), f"{file}::{test}"
