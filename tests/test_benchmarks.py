"""The benchmarks that need no GPU to run: two processes share a pack's rows, and the base too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
STRATEGIES = ("replicate", "shard")

pytestmark = pytest.mark.end_to_end


def test_workers_have_the_losses_of_one_whether_they_hold_the_base_or_share_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.data_parallel", "--model", "tiny", "--device", "cpu"]
    options = ["--workers", "1", "2", "--strategies", *STRATEGIES, "--members", "1", "5", "--rows", "2"]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "platform", ROOT / "methods", ROOT)))}
    environment = {**os.environ, **paths, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    table = tmp_path / "table.md"
    subprocess.run(
        [*command, *options, "--length", "32", "--out", str(table)], cwd=tmp_path, env=environment, check=True
    )
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in table.read_text(encoding="utf-8").splitlines()
        if re.match(r"\| \d", line)
    ]
    assert [(pack.partition(" ")[0], strategy, workers) for pack, strategy, workers, *_ in rows] == [
        (members, strategy, workers)
        for members in ("1", "5")
        for strategy, workers in (("replicate", "1"), ("replicate", "2"), ("shard", "2"))
    ]
    for row in rows:
        assert float(row[8]) < 1e-5  # float32's rounding, in sums of another order, over ten steps
    assert all(float(row[3]) > 0 for row in rows)
